/* Matrix products in bf16, in tiles of a processor's matrix registers (AMX).
 *
 * A task is a panel of the result's columns and a part of its rows: each thread has rows of its own where there are
 * enough, as it has in the sweeps of `kernels.c`. The right operand's part is laid out tile by tile and stays in the core's
 * second cache, 32 rows of the left one in the first. Sums of 32 x 32 elements are rounded while the next ones are made.
 */
#include "passes.h"
#include "tiles.h"

#define DEPTH 576        /* of what is multiplied at a time: 32 rows of it fit in the first cache */
#define PANEL (1 << 18)  /* words of a right operand's part that fit in the second, and its depth */
#define PANEL_DEPTH 1536
#define SUMS (5 << 15)   /* words of sums that fit there beside it, where they wait for the next part */
#define ENOUGH 192       /* rows that are worth laying out a right operand for */
#define ROWS_AT_ONCE 128 /* of two matrices whose rows' products are summed */

/* Sums that become rows of a result, with what is `added` to them, if anything, and rows of a left operand that come to
 * the second cache. */
typedef struct {
    const float *sums;
    const number *added;
    number *to;
    int64_t stride, row, rows;
    const number *ahead;
    int64_t apart, fetched;
} Beside;

INLINE void finish(Beside *f, int some) {
    for (; some && f->row < f->rows; some--, f->row++) {
        const float *sums = f->sums + f->row * STEP;
        float both[STEP];
        if (f->added) {
            for (int j = 0; j < STEP; j++) both[j] = sums[j] + widen(f->added[f->row * f->stride + j]);
            sums = both;
        }
        narrow_row(lanes(sums), lanes(sums + SIDE), f->to + f->row * f->stride);
    }
}

INLINE void finish_and_fetch(void *state) {
    Beside *f = state;
    finish(f, 2);
    for (int64_t row = 0; row < f->fetched; row++) __builtin_prefetch(f->ahead + row * f->apart, 0, 2);
    f->ahead += STEP;
}

/* Up to 32 rows of a left operand: as they lie, or fewer of them with zeros after them, in `spare`. */
static const number *strip_of(const number *a, int64_t *stride, int64_t rows, int64_t depth, number *spare) {
    if (rows >= STEP) return a;
    for (int64_t i = 0; i < STEP; i++)
        if (i < rows) memcpy(spare + i * depth, a + i * *stride, 2 * depth);
        else memset(spare + i * depth, 0, 2 * depth);
    *stride = depth;
    return spare;
}

/* In how many even parts of whole STEPs to take a size, none larger than `most`; how large they are. */
static int64_t parts_of(int64_t size, int64_t most, int64_t multiple, int64_t *part) {
    int64_t parts = filled((size + most - 1) / most, multiple);
    *part = filled((size + parts - 1) / parts, STEP);
    return (size + *part - 1) / *part;
}

/* y = a b + c d + added. a: (rows, depth) and c: (rows, inner), a row's elements next to each other; b: (depth, columns) and d:
 * (inner, columns), either side's. Without c and d `inner` is 0; the rows of y and of `added`, which may be NULL, are
 * `apart`. All but `rows` are multiples of STEP. */
void product(Matrix a, Matrix b, int64_t depth, Matrix c, Matrix d, int64_t inner, const number *added, number *y,
             int64_t apart, int64_t rows, int64_t columns, int threads) {
    int64_t laid, deep, wide, tall;
    int64_t slices = parts_of(depth, PANEL_DEPTH, 1, &laid), steps = (laid + inner) / STEP;
    int64_t pieces = parts_of(laid, DEPTH, 1, &deep);
    int64_t owners = rows / ENOUGH < 1 ? 1 : rows / ENOUGH < threads ? rows / ENOUGH : threads;
    int64_t fitting = PANEL / STEP / (steps * SIDE) * STEP, sharing = (threads + owners - 1) / owners;
    int64_t panels = parts_of(columns, fitting < STEP ? STEP : fitting, sharing, &wide);
    int64_t parts = parts_of(rows, slices > 1 ? SUMS / wide : rows, owners, &tall);
    int64_t waits = slices > 1 ? tall : pieces > 1 ? STEP : 0; /* rows whose sums do */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < panels * parts; task++) {
        int64_t first = task % panels * wide, width = columns - first < wide ? columns - first : wide;
        int64_t top = task / panels * tall, height = rows - top < tall ? rows - top : tall;
        uint32_t *next = own_memory(steps * SIDE * wide + 2 * BLOCK + (deep + inner) * SIDE + 4 * SIDE + waits * wide);
        uint32_t *panel = take(&next, steps * SIDE * wide);
        float *blocks = take(&next, 2 * BLOCK), *waiting = take(&next, waits * wide);
        number *spare = take(&next, deep * SIDE), *spare_c = take(&next, inner * SIDE);
        Beside beside = {.rows = 0};
        Configuration before;
        take_tiles(&before);
        for (int64_t k = 0; k < depth; k += laid) {
            int64_t end = k + laid < depth ? k + laid : depth, here = (end - k) / STEP, turns = 0;
            int64_t of_column = here + (end == depth ? inner / STEP : 0);
            lay_panel(b.at + k * b.row + first * b.column, b.row, b.column, end - k, width, panel, of_column);
            if (end == depth)
                lay_panel(d.at + first * d.column, d.row, d.column, inner, width, panel + 2 * TILE * here, of_column);
            SETTLE;
            for (int64_t piece = 0; piece < (height + STEP - 1) / STEP * pieces; piece++) {
                int64_t i = piece / pieces * STEP, z = k + piece % pieces * deep, left = height - i;
                int64_t some = (z + deep < end ? deep : end - z) / STEP, last = z + some * STEP == depth;
                int64_t more = last ? inner / STEP : 0, stride = a.row, stride_c = c.row;
                const number *strip = strip_of(a.at + (top + i) * a.row + z, &stride, left, some * STEP, spare);
                const number *strip_c = more ? strip_of(c.at + (top + i) * c.row, &stride_c, left, inner, spare_c) : NULL;
                beside.apart = stride, beside.fetched = left >= 2 * STEP ? (STEP * STEP + width - 1) / width : 0;
                for (int64_t j = 0; j < width; j += STEP) {
                    const uint32_t *tiles = panel + 2 * TILE * (j / STEP * of_column + (z - k) / STEP);
                    float *sums = waiting + (slices > 1 ? i : 0) * wide + j * STEP;
                    if (z) load_sums(sums, STEP);
                    else clear_sums();
                    beside.ahead = strip + (STEP + j / STEP * beside.fetched) * stride;
                    add_dots(strip, stride, tiles, some, finish_and_fetch, &beside);
                    add_dots(strip_c, stride_c, tiles + 2 * TILE * some, more, nothing, NULL);
                    finish(&beside, STEP);
                    if (last) sums = blocks + (turns ^= BLOCK);
                    store_sums(sums, STEP);
                    if (!last) continue;
                    int64_t place = (top + i) * apart + first + j;
                    beside.sums = sums, beside.to = y + place, beside.added = added ? added + place : NULL;
                    beside.stride = apart, beside.row = 0, beside.rows = left < STEP ? left : STEP;
                }
            }
        }
        SETTLE;
        finish(&beside, STEP);
        leave_tiles(&before);
    }
}

/* c = a^T b, sums over rows, in fp32. a: (rows, width), b: (rows, columns); c: (width, columns). All but `rows` are
 * multiples of STEP. */
void row_products(const number *a, int64_t a_row, const number *b, int64_t b_row, int64_t rows, int64_t width,
                  int64_t columns, float *c, int threads) {
    int64_t wide, panels = parts_of(columns, columns, threads, &wide);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        int64_t first = panel * wide, end = columns - first < wide ? columns - first : wide;
        uint32_t *next = own_memory(ROWS_AT_ONCE / 2 * (width + wide) + SIDE * width + width * wide +
                                    SIDE * (width + wide));
        uint32_t *across = take(&next, ROWS_AT_ONCE / 2 * width), *tiles = take(&next, ROWS_AT_ONCE / 2 * wide);
        uint32_t *pairs = take(&next, SIDE * width);
        float *sums = take(&next, width * wide);
        number *spare = take(&next, STEP / 2 * width), *spare_b = take(&next, STEP / 2 * wide);
        Configuration before;
        take_tiles(&before);
        for (int64_t k = 0; k < rows; k += ROWS_AT_ONCE) {
            int64_t steps = (rows - k < ROWS_AT_ONCE ? filled(rows - k, STEP) : ROWS_AT_ONCE) / STEP;
            for (int64_t step = 0; step < steps; step++) {
                int64_t row = k + step * STEP, stride = a_row, stride_b = b_row;
                const number *strip = strip_of(a + row * a_row, &stride, rows - row, width, spare);
                pair_across(strip, stride, SIDE, width, pairs, across + step * SIDE, ROWS_AT_ONCE / 2);
                strip = strip_of(b + row * b_row + first, &stride_b, rows - row, end, spare_b);
                lay_panel(strip, stride_b, 1, STEP, end, tiles + step * 2 * TILE, ROWS_AT_ONCE / STEP);
            }
            SETTLE;
            for (int64_t i = 0; i < width; i += STEP)
                for (int64_t j = 0; j < end; j += STEP) {
                    float *block = sums + i * wide + j;
                    if (k) load_sums(block, wide);
                    else clear_sums();
                    const number *strip = (number *)(across + i * ROWS_AT_ONCE / 2);
                    add_dots(strip, ROWS_AT_ONCE, tiles + j * ROWS_AT_ONCE / 2, steps, nothing, NULL);
                    store_sums(block, wide);
                }
            SETTLE;
        }
        for (int64_t i = 0; i < width; i++) memcpy(c + i * columns + first, sums + i * wide, 4 * end);
        leave_tiles(&before);
    }
}
