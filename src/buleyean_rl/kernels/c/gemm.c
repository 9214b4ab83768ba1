/* Matrix products in bf16, block by block.
 *
 * A task is a panel of the result's columns and a part of its rows: each thread has rows of its own where there are
 * enough, as it has in the sweeps of `kernels.c`. The right operand's part is laid out tile by tile and stays in the core's
 * second cache, 32 rows of the left one in the first. Sums of 32 x 32 elements are rounded while the next ones are made.
 */
#include "kernels.h"
#include "tile.h"

#define DEPTH 576        /* of what is multiplied at a time: 32 rows of it fit in the first cache */
#define PANEL (1 << 18)  /* words of a right operand's part that fit in the second or third, and its depth */
#define PANEL_DEPTH 1536
#define SUMS (5 << 15)   /* words of sums that fit there beside it, where they wait for the next part */
#define ENOUGH 192       /* rows that are worth laying out a right operand for, for each thread */
#define FEW 4            /* rows that are not worth laying one out for */
#if defined(__AMX_BF16__) || LANES == SIDE
#define ROWS STEP /* of a left operand that are taken at a time, and what threads have a multiple of */
#define EVEN STEP
#else
#define ROWS 48 /* a multiple of the 6 whose sums fit in registers */
#define EVEN 6
#endif
#define OF_ROWS (ROWS * STEP) /* their sums, with 32 columns */
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

INLINE void put_rows(Beside *f, int some) {
    for (; some && f->row < f->rows; some--, f->row++) {
        const float *sums = f->sums + f->row * STEP;
        float both[STEP];
        if (f->added) {
            for (int j = 0; j < STEP; j++) both[j] = sums[j] + widen(f->added[f->row * f->stride + j]);
            sums = both;
        }
        narrow_many(sums, STEP, f->to + f->row * f->stride);
    }
}

INLINE void put_and_fetch(void *state) {
    Beside *f = state;
    put_rows(f, 2);
    for (int64_t row = 0; row < f->fetched; row++) __builtin_prefetch(f->ahead + row * f->apart, 0, 2);
    f->ahead += STEP;
}

/* In how many even parts of whole units to take a size, none larger than `most`; how large they are. */
static int64_t parts_of(int64_t size, int64_t most, int64_t multiple, int64_t unit, int64_t *part) {
    int64_t parts = filled((size + most - 1) / most, multiple);
    *part = filled((size + parts - 1) / parts, unit);
    return (size + *part - 1) / *part;
}

/* A matrix's rows as operands, one after the other. */
static const operand *rows_of(Matrix a, int64_t rows, int64_t depth, uint32_t **memory) {
    operand *to = take(memory, rows * depth / IN_WORD);
    for (int64_t i = 0; i < rows; i++) operands(a.at + i * a.row, depth, to + i * depth);
    return to;
}

/* `product` of few rows, where columns of b and d are read as they lie: their elements are next to each other. */
static void product_of_few(Matrix a, Matrix b, int64_t depth, Matrix c, Matrix d, int64_t inner, const number *added,
                           number *y, int64_t apart, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel num_threads(threads)
    {
        uint32_t *next = own_memory((rows * (depth + inner)) / IN_WORD + 2 * SIDE);
        const operand *of_a = rows_of(a, rows, depth, &next), *of_c = rows_of(c, rows, inner, &next);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < columns; j++)
            for (int64_t i = 0; i < rows; i++) {
                float sum = dot_rows(of_a + i * depth, b.at + j * b.column, depth);
                if (inner) sum += dot_rows(of_c + i * inner, d.at + j * d.column, inner);
                y[i * apart + j] = narrow(sum + (added ? widen(added[i * apart + j]) : 0));
            }
    }
}

/* y = a b + c d + added. a: (rows, depth) and c: (rows, inner), a row's elements next to each other; b: (depth, columns) and d:
 * (inner, columns), either side's. Without c and d `inner` is 0; the rows of y and of `added`, which may be NULL, are
 * `apart`. All but `rows` are multiples of STEP. */
void product(Matrix a, Matrix b, int64_t depth, Matrix c, Matrix d, int64_t inner, const number *added, number *y,
             int64_t apart, int64_t rows, int64_t columns, int threads) {
    if (rows <= FEW && b.row == 1 && (!inner || d.row == 1)) {
        product_of_few(a, b, depth, c, d, inner, added, y, apart, rows, columns, threads);
        return;
    }
    int64_t laid, deep, wide, tall;
    int64_t slices = parts_of(depth, PANEL_DEPTH, 1, STEP, &laid), steps = (laid + inner) / STEP;
    int64_t pieces = parts_of(laid, DEPTH, 1, STEP, &deep);
    int64_t owners = rows / ENOUGH < 1 ? 1 : rows / ENOUGH < threads ? rows / ENOUGH : threads;
    int64_t fitting = PANEL / STEP / (steps * DEEP) * STEP, sharing = (threads + owners - 1) / owners;
    int64_t panels = parts_of(columns, fitting < STEP ? STEP : fitting, sharing, STEP, &wide);
    int64_t parts = parts_of(rows, slices > 1 ? SUMS / wide : rows, owners, EVEN, &tall);
    int64_t waits = slices > 1 ? filled(tall, ROWS) : pieces > 1 ? ROWS : 0; /* rows whose sums do */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < panels * parts; task++) {
        int64_t first = task % panels * wide, width = columns - first < wide ? columns - first : wide;
        int64_t top = task / panels * tall, height = rows - top < tall ? rows - top : tall;
        uint32_t *next = own_memory(steps * DEEP * wide + 2 * OF_ROWS + (deep + inner) * ROWS / IN_WORD + 4 * SIDE +
                                    waits * wide);
        uint32_t *panel = take(&next, steps * DEEP * wide);
        float *blocks = take(&next, 2 * OF_ROWS), *waiting = take(&next, waits * wide);
        operand *spare = take(&next, deep * ROWS / IN_WORD), *spare_c = take(&next, inner * ROWS / IN_WORD);
        Beside beside = {.rows = 0};
        Configuration before;
        take_tiles(&before);
        for (int64_t k = 0; k < depth; k += laid) {
            int64_t end = k + laid < depth ? k + laid : depth, here = (end - k) / STEP, turns = 0;
            int64_t of_column = here + (end == depth ? inner / STEP : 0);
            lay_panel(b.at + k * b.row + first * b.column, b.row, b.column, end - k, width, panel, of_column, 0);
            if (end == depth) lay_panel(d.at + first * d.column, d.row, d.column, inner, width, panel, of_column, here);
            SETTLE;
            for (int64_t piece = 0; piece < (height + ROWS - 1) / ROWS * pieces; piece++) {
                int64_t i = piece / pieces * ROWS, z = k + piece % pieces * deep, left = height - i;
                int64_t some = (z + deep < end ? deep : end - z) / STEP, last = z + some * STEP == depth;
                int64_t more = last ? inner / STEP : 0, stride = a.row, stride_c = c.row;
                int height_here = left < ROWS ? left : ROWS;
                const number *rows_here = a.at + (top + i) * a.row + z;
                const operand *strip = left_of(rows_here, &stride, left, ROWS, some * STEP, spare);
                const operand *strip_c = NULL;
                if (more) strip_c = left_of(c.at + (top + i) * c.row, &stride_c, left, ROWS, inner, spare_c);
                beside.apart = a.row, beside.fetched = left >= 2 * ROWS ? (OF_ROWS + width - 1) / width : 0;
                for (int64_t j = 0; j < width; j += STEP) {
                    int64_t step = (z - k) / STEP;
                    Right right = in_panel(panel, of_column, j / STEP, step);
                    Right right_d = in_panel(panel, of_column, j / STEP, step + some);
                    float *sums = waiting + (slices > 1 ? i : 0) * wide + j * ROWS;
                    Sums block = begin_sums(z ? sums : NULL, STEP, last ? blocks + (turns = OF_ROWS - turns) : sums, STEP);
                    beside.ahead = rows_here + (ROWS + j / STEP * beside.fetched) * a.row;
                    add_dots(&block, strip, stride, height_here, right, 1, some, put_and_fetch, &beside);
                    add_dots(&block, strip_c, stride_c, height_here, right_d, 1, more, nothing, NULL);
                    put_rows(&beside, ROWS);
                    end_sums(&block);
                    if (!last) continue;
                    int64_t place = (top + i) * apart + first + j;
                    beside.sums = block.to, beside.to = y + place, beside.added = added ? added + place : NULL;
                    beside.stride = apart, beside.row = 0, beside.rows = height_here;
                }
            }
        }
        SETTLE;
        put_rows(&beside, ROWS);
        leave_tiles(&before);
    }
}

/* c = a^T b, sums over rows, in fp32. a: (rows, width), b: (rows, columns); c: (width, columns). All but `rows` are
 * multiples of STEP. */
void row_products(const number *a, int64_t a_row, const number *b, int64_t b_row, int64_t rows, int64_t width,
                  int64_t columns, float *c, int threads) {
    int64_t wide, panels = parts_of(columns, columns, threads, STEP, &wide);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++) {
        int64_t first = panel * wide, end = columns - first < wide ? columns - first : wide;
        uint32_t *next = own_memory(ROWS_AT_ONCE / IN_WORD * (width + wide) + 2 * DEEP * width + width * wide +
                                    SIDE * wide);
        uint32_t *across = take(&next, ROWS_AT_ONCE / IN_WORD * width), *panel_b = take(&next, ROWS_AT_ONCE / IN_WORD * wide);
        uint32_t *pairs = take(&next, DEEP * width);
        float *sums = take(&next, width * wide);
        operand *spare = take(&next, DEEP * width);
        number *spare_b = take(&next, SIDE * wide);
        Configuration before;
        take_tiles(&before);
        for (int64_t k = 0; k < rows; k += ROWS_AT_ONCE) {
            int64_t steps = (rows - k < ROWS_AT_ONCE ? filled(rows - k, STEP) : ROWS_AT_ONCE) / STEP;
            for (int64_t step = 0; step < steps; step++) {
                int64_t row = k + step * STEP, stride = a_row, stride_b = b_row;
                const operand *strip = left_of(a + row * a_row, &stride, rows - row, STEP, width, spare);
                as_left_across(strip, stride, STEP, width, pairs, across + step * DEEP, ROWS_AT_ONCE / IN_WORD);
                const number *strip_b = strip_of(b + row * b_row + first, &stride_b, rows - row, STEP, end, spare_b);
                lay_panel(strip_b, stride_b, 1, STEP, end, panel_b, ROWS_AT_ONCE / STEP, step);
            }
            SETTLE;
            for (int64_t i = 0; i < width; i += STEP)
                for (int64_t j = 0; j < end; j += STEP) {
                    float *here = sums + i * wide + j;
                    Sums block = begin_sums(k ? here : NULL, wide, here, wide);
                    const operand *strip = (operand *)across + i * ROWS_AT_ONCE;
                    Right right = in_panel(panel_b, ROWS_AT_ONCE / STEP, j / STEP, 0);
                    add_dots(&block, strip, ROWS_AT_ONCE, STEP, right, 1, steps, nothing, NULL);
                    end_sums(&block);
                }
            SETTLE;
        }
        for (int64_t i = 0; i < width; i++) memcpy(c + i * columns + first, sums + i * wide, 4 * end);
        leave_tiles(&before);
    }
}
