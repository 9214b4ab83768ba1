/* Element-wise passes, each one sweep over its tensors, in fp32 inside. Threads share the rows, always in the same way, so
 * that results are the same from run to run. */
#include "elementwise.h"

#define BLOCK 32 /* elements that SwiGLU works on at a time */

/* Its gradient, if grad_y is there. */
void rms_norm(const RmsNormArgs *g, int threads) {
    int64_t width = g->width;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < g->rows; i++) {
        const bf16 *restrict x = g->x + i * width, *restrict weight = g->weight;
        float scale = inverse_rms(x, width, g->epsilon), dot = 0;
        if (g->grad_y) {
            const bf16 *restrict grad_y = g->grad_y + i * width, *restrict added = g->added ? g->added + i * width : NULL;
            bf16 *restrict grad_x = g->grad_x + i * width;
            for (int64_t j = 0; j < width; j++) dot += bf16_to_f32(grad_y[j]) * bf16_to_f32(weight[j]) * bf16_to_f32(x[j]);
            dot *= scale * scale / width;
            for (int64_t j = 0; j < width; j++) {
                float grad = scale * (bf16_to_f32(grad_y[j]) * bf16_to_f32(weight[j]) - bf16_to_f32(x[j]) * dot);
                grad_x[j] = f32_to_bf16(grad + (added ? bf16_to_f32(added[j]) : 0));
            }
        }
        if (g->y) norm(x, weight, g->epsilon, width, g->y + i * width);
    }
}

/* BLOCK elements; y where it is wanted, of the gradient too. */
INLINE void swiglu_block(const bf16 *gate, const bf16 *up, const bf16 *grad_y, bf16 *grad_gate, bf16 *grad_up, bf16 *y) {
    for (int j = 0; j < BLOCK; j += 2 * LANES) {
        SimdF32 out[2], out_gate[2], out_up[2];
        for (int half = 0; half < 2; half++) {
            int k = j + half * LANES;
            SimdF32 x = simd_load_bf16(gate + k), u = simd_load_bf16(up + k), s = sigmoid(x);
            out[half] = x * s * u;
            if (!grad_y) continue;
            SimdF32 grad = simd_load_bf16(grad_y + k);
            out_gate[half] = grad * u * s * (1 + x * (1 - s));
            out_up[half] = grad * x * s;
        }
        if (y) simd_store_bf16(out[0], out[1], y + j);
        if (!grad_y) continue;
        simd_store_bf16(out_gate[0], out_gate[1], grad_gate + j);
        simd_store_bf16(out_up[0], out_up[1], grad_up + j);
    }
}

/* Its gradient, if grad_y is there. */
void swiglu(const SwigluArgs *g, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < g->rows; i++) {
        int64_t width = g->width;
        const bf16 *gate = g->gate_up + i * g->stride, *grad_y = g->grad_y ? g->grad_y + i * width : NULL;
        bf16 *grad_gate = g->grad_gate_up ? g->grad_gate_up + i * g->stride : NULL, *y = g->y ? g->y + i * width : NULL;
        for (int64_t j = 0; j < width; j += BLOCK) {
            if (!grad_y) swiglu_block(gate + j, gate + width + j, NULL, NULL, NULL, y + j);
            else swiglu_block(gate + j, gate + width + j, grad_y + j, grad_gate + j, grad_gate + width + j, y ? y + j : NULL);
        }
    }
}

void rope(const RopeArgs *g, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < g->x.tokens; t++)
        for (int64_t h = 0; h < g->x.heads; h++) {
            const bf16 *x = g->x.data + h * g->x.head_stride + t * g->x.token_stride;
            bf16 *y = g->y.data + h * g->y.head_stride + t * g->y.token_stride;
            rotate(x, g->cosine + t * g->head_width, g->sine + t * g->head_width, (int)g->backward, g->head_width / 2, y);
        }
}
