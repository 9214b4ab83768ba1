/* Online softmax of 32 rows of scores, 32 columns at a time: weights are powers of 2 of what a score is above its row_max,
 * which is raised only when a score is well above it. */
#pragma once
#include "gemm.h"

#define MARGIN 40 /* powers of 2 by which a score may exceed its row_max */

/* c (+)= a b. a: packed, (rows, depth); b: its first 32 columns, the next ones `columns_stride` words on. All sizes are
 * multiples of 32. */
static void multiply(const Packed *a, int64_t a_stride, PackedB b, int64_t columns_stride, int64_t rows, int64_t columns,
                     int64_t depth, int accumulate, float *c, int64_t c_stride) {
    for (int64_t j = 0; j < columns; j += BLOCK, b.words += columns_stride)
        for (int64_t i = 0; i < rows; i += BLOCK) { /* these of b are in L1 now */
            Operands x = {a + i * a_stride, a_stride, depth / BLOCK, b};
            float *sums = c + i * c_stride + j;
            microkernel(accumulate ? sums : NULL, c_stride, sums, c_stride, BLOCK, &x, 1);
        }
}

/* Sums of a row's weights by the lane, and of the same as they are rounded for products. row_max is in powers of 2. */
typedef struct { float row_max[BLOCK]; SimdF32 sum_exp[BLOCK], sum_rounded[BLOCK]; } OnlineSoftmax;

/* Raises a row_max that its scores are well above, and makes smaller what was summed, the `done` weights before, and `sums` of
 * products. By whole powers of 2, so that weights are not rounded anew. */
static __attribute__((noinline)) void raise_row_max(OnlineSoftmax *softmax, int row, float above, Packed *weights, int64_t done,
                                                    float *sums, int64_t width) {
    float factor = exp2f(-floorf(above));
    softmax->row_max[row] += floorf(above);
    softmax->sum_exp[row] *= factor, softmax->sum_rounded[row] *= factor;
    for (int64_t j = 0; j < done; j++) weights[j] = scale_packed(factor, weights[j]);
    for (int64_t j = 0; j < width; j++) sums[j] *= factor;
}

/* Weights of 32 rows from their scores, after the `done` before them. sums: of products, (32, width), or NULL: then weights are
 * not summed as they are rounded. */
INLINE void softmax_weights(OnlineSoftmax *softmax, const float *scores, float scale, Packed *weights, int64_t stride,
                            int64_t done, float *sums, int64_t width) {
    for (int row = 0; row < BLOCK; row++) {
        const float *from = scores + row * BLOCK;
        Packed *to = weights + row * stride;
        SimdF32 above = {0}, sum_exp = softmax->sum_exp[row], sum_rounded = softmax->sum_rounded[row];
        for (int j = 0; j < BLOCK; j += LANES) above = simd_max(scale * simd_load(from + j) - softmax->row_max[row], above);
        int exceeds = 0;
        for (int i = 0; i < LANES; i++) exceeds |= above[i] > MARGIN;
        if (exceeds) {
            float largest = scale * simd_largest(from, BLOCK) - softmax->row_max[row];
            raise_row_max(softmax, row, largest, to, done, sums ? sums + row * width : NULL, width);
            sum_exp = softmax->sum_exp[row], sum_rounded = softmax->sum_rounded[row];
        }
        for (int j = 0; j < BLOCK; j += 2 * LANES) {
            SimdF32 x = simd_exp2(scale * simd_load(from + j) - softmax->row_max[row]);
            SimdF32 y = simd_exp2(scale * simd_load(from + j + LANES) - softmax->row_max[row]);
            simd_store_packed(x, y, to + done + j);
            sum_exp += x + y;
            if (sums) sum_rounded = add_packed(sum_rounded, to + done + j);
        }
        softmax->sum_exp[row] = sum_exp, softmax->sum_rounded[row] = sum_rounded;
    }
}
