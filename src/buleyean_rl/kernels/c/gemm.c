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
    Plan p = {.depth = round_up(g->depth, BLOCK)};
    int64_t row_threads = g->rows < 2 * THREAD_ROWS ? 1 : smaller(g->rows / THREAD_ROWS, threads);
    p.slices = split(p.depth, PANEL_KC, 1, BLOCK, &p.panel_kc);
    p.pieces = split(p.panel_kc, KC, 1, BLOCK, &p.kc);
    int64_t fitting = PANEL_WORDS / BLOCK / ((p.panel_kc + g->depth2) / VNNI) * BLOCK;
    p.panels = split(g->columns, fitting < BLOCK ? BLOCK : fitting, (threads + row_threads - 1) / row_threads, BLOCK, &p.nc);
    p.parts = split(g->rows, p.slices > 1 ? SUMS_WORDS / p.nc : g->rows, row_threads, ROW_UNIT, &p.mc);
    return p;
}

/* MR rows of a, of which `rows` are there, from k on. a^T is transposed, its depth filled up with zeros. */
static const Packed *pack_a_strip(const GemmArgs *g, int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t *stride,
                                  Packed *strip, Packed *buffer) {
    const bf16 *a = part_of(g->a, row, k).data;
    *stride = g->a.row_stride;
    if (g->a.column_stride == 1) return pack_a(a, stride, rows, MR, depth, strip);
    int64_t width = round_up(smaller(rows, MR), TILE);
    for (int64_t z = 0; z < depth; z += BLOCK) {
        int64_t from = g->a.column_stride;
        const Packed *block = pack_a(a + z * from, &from, g->depth - k - z, BLOCK, width, buffer);
        pack_a_transposed(block, from, BLOCK, width, (uint32_t *)(buffer + BLOCK * MR), (uint32_t *)(strip + z), depth / VNNI);
    }
    *stride = depth;
    return strip;
}

static void gemm_task(const GemmArgs *g, const Plan *p, int64_t task) {
    int64_t column = task % p->panels * p->nc, columns = smaller(g->columns - column, p->nc), depth2 = g->depth2;
    int64_t top = task / p->panels * p->mc, rows = smaller(g->rows - top, p->mc);
    int64_t waiting_rows = p->slices > 1 ? round_up(p->mc, MR) : p->pieces > 1 ? MR : 0;
    uint32_t *panel;
    float *waiting, block[MR * BLOCK];
    Packed *strip, *strip2, *buffer_a;
    if (!SCRATCH(BUFFER(panel, (p->panel_kc + depth2) / VNNI * p->nc), BUFFER(waiting, waiting_rows * p->nc),
                 BUFFER(strip, p->kc * MR), BUFFER(strip2, depth2 * MR), BUFFER(buffer_a, 2 * BLOCK * MR)))
        return;
    TileConfig before;
    amx_begin(&before);
    for (int64_t k = 0; k < p->depth; k += p->panel_kc) {
        int64_t end = smaller(k + p->panel_kc, p->depth), own = (end - k) / BLOCK;
        int64_t panel_blocks = own + (end == p->depth ? depth2 / BLOCK : 0);
        pack_b_panel(part_of(g->b, k, column), smaller(g->depth, end) - k, columns, panel, panel_blocks, 0);
        if (panel_blocks > own) pack_b_panel(part_of(g->b2, 0, column), depth2, columns, panel, panel_blocks, own);
        AMX_FENCE;
        for (int64_t piece = 0; piece < (rows + MR - 1) / MR * p->pieces; piece++) {
            int64_t i = piece / p->pieces * MR, z = k + piece % p->pieces * p->kc, left = rows - i;
            if (z >= end) continue;
            int64_t kc = smaller(p->kc, end - z), last = z + kc == p->depth, kc2 = last ? depth2 : 0, stride, stride2 = 0;
            int height = (int)smaller(left, MR);
            const Packed *a = pack_a_strip(g, top + i, left, z, kc, &stride, strip, buffer_a), *a2 = NULL;
            if (kc2) {
                stride2 = g->a2.row_stride;
                a2 = pack_a(g->a2.data + (top + i) * stride2, &stride2, left, MR, kc2, strip2);
            }
            for (int64_t j = 0; j < columns; j += BLOCK) {
                PackedB b = panel_block(panel, panel_blocks, j / BLOCK, (z - k) / BLOCK);
                float *sums = waiting + (p->slices > 1 ? i : 0) * p->nc + j * MR, *c = sums;
                int64_t place = (top + i) * g->y_stride + column + j, c_stride = BLOCK;
                if (last && g->c) c = g->c + place, c_stride = g->y_stride;
                else if (last) c = block;
                Accumulator acc = acc_load(z ? sums : NULL, BLOCK, c, c_stride);
                microkernel(&acc, a, stride, height, b, kc / BLOCK);
                if (kc2) {
                    PackedB b2 = panel_block(panel, panel_blocks, j / BLOCK, own);
                    microkernel(&acc, a2, stride2, height, b2, kc2 / BLOCK);
                }
                acc_store(&acc);
                AMX_FENCE;
                if (last && !g->c) store_block(c, g->added ? g->added + place : NULL, g->y + place, g->y_stride, height);
            }
        }
    }
    AMX_FENCE;
    amx_end(&before);
}

void gemm(const GemmArgs *g, int threads) {
    if (!g->rows || !g->columns) return;
    Plan plan = plan_of(g, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < plan.panels * plan.parts; task++) gemm_task(g, &plan, task);
}
