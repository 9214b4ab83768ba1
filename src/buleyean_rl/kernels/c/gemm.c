/* Matrix products. The loops around the micro-kernel, by BLIS's names for the block sizes:
 *
 *     tasks, shared by the threads: nc columns and mc of the rows; a thread has rows of its own where there are enough
 *       panel_kc of the depth: pack_b_panel, which stays in L2                              +--- b: nc ---+
 *         MR rows and kc of the depth: pack_a, which stays in L1                    panel_kc|             |
 *           32 columns: micro-kernel over kc; sums wait for the next kc       a: +- kc -+   +-------------+
 *             epilogue: rounded to bf16                                     MR |      |   |  |MR|   y   |
 */
#include "gemm.h"

#define KC 576                /* MR rows of it fit in L1 */
#define PANEL_WORDS (1 << 18) /* of a panel of b that fit in L2 or L3 */
#define PANEL_KC 1536
#define SUMS_WORDS (5 << 15) /* of sums that fit beside it */
#define THREAD_ROWS 192      /* that are worth packing b for, for each thread */
#if defined(__AMX_BF16__) || LANES == TILE
#define MR BLOCK
#define ROW_UNIT BLOCK /* rows of a task are a multiple of it */
#else
#define MR 48 /* a multiple of the 6 rows whose sums fit in registers */
#define ROW_UNIT 6
#endif

/* Into how many even parts of whole units a size goes, a multiple of `multiple`, none larger than `largest`. */
static int64_t split(int64_t size, int64_t largest, int64_t multiple, int64_t unit, int64_t *part) {
    int64_t parts = round_up((size + largest - 1) / largest, multiple);
    *part = round_up((size + parts - 1) / parts, unit);
    return (size + *part - 1) / *part;
}

/* Block sizes: `panels` of nc columns, `parts` of mc rows, `slices` of panel_kc of the depth, each in `pieces` of kc. */
typedef struct { int64_t depth, nc, mc, panel_kc, kc, panels, parts, slices, pieces; } Plan;

static Plan plan_of(const GemmArgs *g, int threads) {
    Plan p = {.depth = round_up(g->b.rows, BLOCK)};
    int64_t rows = g->a.rows, row_threads = rows < 2 * THREAD_ROWS || g->b.quantised ? 1 : smaller(rows / THREAD_ROWS, threads);
    p.slices = split(p.depth, PANEL_KC, 1, BLOCK, &p.panel_kc);
    p.pieces = split(p.panel_kc, KC, 1, BLOCK, &p.kc);
    int64_t fitting = PANEL_WORDS / BLOCK / ((p.panel_kc + g->b2.rows) / VNNI) * BLOCK;
    p.panels = split(g->b.columns, fitting < BLOCK ? BLOCK : fitting, (threads + row_threads - 1) / row_threads, BLOCK, &p.nc);
    p.parts = split(rows, p.slices > 1 ? SUMS_WORDS / p.nc : rows, row_threads, ROW_UNIT, &p.mc);
    return p;
}

/* Up to MR rows of a. a^T is transposed, its depth filled up with zeros. */
static Operands pack_a_strip(Matrix a, int64_t depth, Packed *strip, Packed *buffer) {
    Operands x = {.a = strip, .a_stride = a.row_stride, .blocks = depth / BLOCK};
    if (a.column_stride == 1) {
        x.a = pack_a(a.data, &x.a_stride, a.rows, MR, depth, strip);
        return x;
    }
    int64_t width = round_up(a.rows, TILE);
    for (int64_t z = 0; z < depth; z += BLOCK) {
        int64_t from = a.column_stride;
        const Packed *block = pack_a(a.data + z * from, &from, a.columns - z, BLOCK, width, buffer);
        pack_a_transposed(block, from, BLOCK, width, (uint32_t *)(buffer + BLOCK * MR), (uint32_t *)(strip + z), depth / VNNI);
    }
    x.a_stride = depth;
    return x;
}

static void gemm_task(const GemmArgs *g, const Plan *p, int64_t task) {
    int64_t column = task % p->panels * p->nc, columns = smaller(g->b.columns - column, p->nc), depth2 = g->b2.rows;
    int64_t top = task / p->panels * p->mc, rows = smaller(g->a.rows - top, p->mc);
    int64_t waiting_rows = p->slices > 1 ? round_up(p->mc, MR) : p->pieces > 1 ? MR : 0;
    uint32_t *panel;
    float *waiting, block[MR * BLOCK];
    Packed *strip, *strip2, *buffer;
    if (!SCRATCH(BUFFER(panel, (p->panel_kc + depth2) / VNNI * p->nc), BUFFER(waiting, waiting_rows * p->nc),
                 BUFFER(strip, p->kc * MR), BUFFER(strip2, depth2 * MR), BUFFER(buffer, 2 * BLOCK * MR)))
        return;
    TileConfig before;
    amx_begin(&before);
    for (int64_t k = 0; k < p->depth; k += p->panel_kc) {
        int64_t end = smaller(k + p->panel_kc, p->depth), own = (end - k) / BLOCK;
        int64_t panel_blocks = own + (end == p->depth ? depth2 / BLOCK : 0);
        pack_b_panel(part_of(g->b, k, end - k, column, columns), panel, panel_blocks, 0);
        if (panel_blocks > own) pack_b_panel(part_of(g->b2, 0, depth2, column, columns), panel, panel_blocks, own);
        for (int64_t piece = 0; piece < (rows + MR - 1) / MR * p->pieces; piece++) {
            int64_t i = piece / p->pieces * MR, z = k + piece % p->pieces * p->kc, height = smaller(rows - i, MR);
            if (z >= end) continue;
            int64_t kc = smaller(p->kc, end - z), last = z + kc == p->depth, count = last && depth2 ? 2 : 1;
            Operands x[2] = {pack_a_strip(part_of(g->a, top + i, height, z, kc), kc, strip, buffer)};
            if (count > 1) x[1] = pack_a_strip(part_of(g->a2, top + i, height, 0, depth2), depth2, strip2, buffer);
            for (int64_t j = 0; j < columns; j += BLOCK) {
                float *sums = waiting + (p->slices > 1 ? i : 0) * p->nc + j * MR, *c = sums;
                int64_t place = (top + i) * g->y_stride + column + j, c_stride = BLOCK;
                if (last && g->c) c = g->c + place, c_stride = g->y_stride;
                else if (last) c = block;
                x[0].b = panel_block(panel, panel_blocks, j / BLOCK, (z - k) / BLOCK);
                x[1].b = panel_block(panel, panel_blocks, j / BLOCK, own);
                microkernel(z ? sums : NULL, BLOCK, c, c_stride, (int)height, x, (int)count);
                const bf16 *added = g->added ? g->added + (top + i) * g->added_stride + column + j : NULL;
                if (last && !g->c) store_block(c, added, g->added_stride, g->y + place, g->y_stride, (int)height);
            }
        }
    }
    amx_end(&before);
}

void dequantise(const QuantisedRows *x, int64_t rows, int64_t width, bf16 *to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) dequantise_part(x, row, 1, 0, width, to + row * width);
}

void gemm(const GemmArgs *g, int threads) {
    if (!g->a.rows || !g->b.columns) return;
    Plan plan = plan_of(g, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < plan.panels * plan.parts; task++) gemm_task(g, &plan, task);
}
