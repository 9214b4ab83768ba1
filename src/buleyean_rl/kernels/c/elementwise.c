/* Element-wise passes, each one sweep over its tensors, in fp32 inside. Threads share the rows, always in the same way, so
 * that results are the same from run to run. */
#include "elementwise.h"

static void norm_backward(const bf16 *restrict x, const bf16 *restrict weight, const bf16 *restrict grad_y,
                          const bf16 *restrict added, float epsilon, int64_t width, bf16 *restrict grad_x) {
    float scale = inverse_rms(x, width, epsilon), dot = 0;
    for (int64_t j = 0; j < width; j++) dot += bf16_to_f32(grad_y[j]) * bf16_to_f32(weight[j]) * bf16_to_f32(x[j]);
    dot *= scale * scale / width;
    for (int64_t j = 0; j < width; j++) {
        float grad = scale * (bf16_to_f32(grad_y[j]) * bf16_to_f32(weight[j]) - bf16_to_f32(x[j]) * dot);
        grad_x[j] = f32_to_bf16(grad + (added ? bf16_to_f32(added[j]) : 0));
    }
}

void rms_norm(const bf16 *x, const bf16 *weight, float epsilon, const bf16 *grad_y, const bf16 *added, int64_t rows,
              int64_t width, bf16 *y, bf16 *grad_x, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows * width; i += width) {
        if (grad_y) norm_backward(x + i, weight, grad_y + i, added ? added + i : NULL, epsilon, width, grad_x + i);
        if (y) norm(x + i, weight, epsilon, width, y + i);
    }
}

/* 32 elements of SwiGLU; y where it is wanted, of the gradient too. */
INLINE void swiglu_block(const bf16 *gate, const bf16 *up, const bf16 *grad_y, bf16 *grad_gate, bf16 *grad_up, bf16 *y) {
    for (int j = 0; j < 32; j += 2 * LANES) {
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

void swiglu(const bf16 *gate_up, int64_t stride, const bf16 *grad_y, int64_t rows, int64_t width, bf16 *y, bf16 *grad_gate_up,
            int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j += 32) {
            const bf16 *gate = gate_up + i * stride + j;
            bf16 *grad = grad_y ? grad_gate_up + i * stride + j : NULL, *to = y ? y + i * width + j : NULL;
            if (!grad) swiglu_block(gate, gate + width, NULL, NULL, NULL, to);
            else swiglu_block(gate, gate + width, grad_y + i * width + j, grad, grad + width, to);
        }
}

void rope(const Heads *x, const bf16 *cosine, const bf16 *sine, int64_t width, int backward, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < x->tokens; t++)
        for (int64_t h = 0; h < x->heads; h++)
            rotate(x->data + h * x->head_stride + t * x->token_stride, cosine + t * width, sine + t * width, backward, width / 2);
}
