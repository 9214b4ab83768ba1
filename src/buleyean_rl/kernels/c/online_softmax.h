/* Online softmax of 32 rows of scores, 32 columns at a time: weights are powers of 2 of what a score is above its row_max,
 * which is raised only when a score is well above it. */
#ifndef ONLINE_SOFTMAX_H
#define ONLINE_SOFTMAX_H
#include "gemm.h"

#define MASKED -1e30f
#define MARGIN 40 /* powers of 2 by which a score may exceed its row_max */

/* c (+)= a b. a: packed, (rows, depth); b: packed, its columns next to each other. All sizes are multiples of 32. */
static void multiply(const Packed *a, int64_t a_stride, uint32_t *b, int64_t b_stride, int64_t rows, int64_t columns,
                     int64_t depth, int accumulate, float *c, int64_t c_stride) {
    AMX_FENCE;
    for (int64_t j = 0; j < columns; j += BLOCK)
        for (int64_t i = 0; i < rows; i += BLOCK) { /* these of b are in L1 now */
            float *sums = c + i * c_stride + j;
            Accumulator acc = acc_load(accumulate ? sums : NULL, c_stride, sums, c_stride);
            microkernel(&acc, a + i * a_stride, a_stride, BLOCK, (PackedB){b + j, b_stride, TILE, BLOCK_WORDS * b_stride}, 0,
                        depth / BLOCK, nothing, NULL);
            acc_store(&acc);
        }
    AMX_FENCE;
}

/* Sums of a row's weights by the lane, exact and as they are rounded for products. row_max is in powers of 2. */
typedef struct { float row_max[BLOCK]; SimdF32 sum_exp[BLOCK], sum_rounded[BLOCK]; } OnlineSoftmax;

static inline float block_max(const float *scores) {
    SimdF32 max = simd_set(-INFINITY);
    float largest = -INFINITY;
    for (int j = 0; j < BLOCK; j += LANES) max = simd_max(simd_load(scores + j), max); /* without NaN */
    for (int i = 0; i < LANES; i++) largest = fmaxf(largest, max[i]);
    return largest;
}

/* Raises what is well below a row's scores, and makes smaller what was summed, the `done` weights before, and `sums` of
 * products, (32, width), unless NULL. By whole powers of 2, so that weights are not rounded anew. */
static __attribute__((noinline, unused)) void raise_row_max(OnlineSoftmax *softmax, const float *scores, float scale,
                                                            Packed *weights, int64_t stride, int64_t done, float *sums,
                                                            int64_t width) {
    for (int row = 0; row < BLOCK; row++) {
        float above = floorf(scale * block_max(scores + row * BLOCK) - softmax->row_max[row]);
        if (!(above >= MARGIN)) continue;
        float factor = exp2f(-above);
        softmax->row_max[row] += above;
        softmax->sum_exp[row] *= factor, softmax->sum_rounded[row] *= factor;
        for (int64_t j = 0; j < done; j++) weights[row * stride + j] = scale_packed(factor, weights[row * stride + j]);
        for (int64_t j = 0; j < width; j++) sums[row * width + j] *= factor;
    }
}

/* Weights of 32 rows from their scores, after the `done` before them; `first`: there were none before. */
static inline void softmax_weights(OnlineSoftmax *softmax, const float *scores, float scale, Packed *weights, int64_t stride,
                                   int64_t done, int first, float *sums, int64_t width) {
    SimdF32 sum_exp[BLOCK], sum_rounded[BLOCK];
    for (int row = 0; row < BLOCK && first; row++) {
        float max = block_max(scores + row * BLOCK);
        softmax->row_max[row] = max > MASKED / 2 ? scale * max : 0;
    }
    for (int raised = 0;; raised = 1) {
        SimdF32 above = {0};
        for (int row = 0; row < BLOCK; row++) {
            sum_exp[row] = softmax->sum_exp[row], sum_rounded[row] = softmax->sum_rounded[row];
            for (int j = 0; j < BLOCK; j += 2 * LANES) {
                Packed *to = weights + row * stride + done + j;
                SimdF32 x = scale * simd_load(scores + row * BLOCK + j) - softmax->row_max[row];
                SimdF32 y = scale * simd_load(scores + row * BLOCK + j + LANES) - softmax->row_max[row];
                above = simd_max(x, simd_max(y, above)); /* without NaN, which is in the sums */
                x = simd_exp2(x), y = simd_exp2(y);
                sum_exp[row] += x + y;
                simd_store_packed(x, y, to);
                sum_rounded[row] = add_packed(sum_rounded[row], to);
            }
        }
        if (raised || !simd_any_above(above, MARGIN)) break;
        raise_row_max(softmax, scores, scale, weights, stride, done, sums, width);
    }
    memcpy(softmax->sum_exp, sum_exp, sizeof sum_exp);
    memcpy(softmax->sum_rounded, sum_rounded, sizeof sum_rounded);
}
#endif
