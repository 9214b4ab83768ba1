/* What element-wise passes share with others. */
#pragma once
#include "kernels.h"

static inline float inverse_rms(const bf16 *restrict x, int64_t width, float epsilon) {
    return 1 / sqrtf(dot(x, x, width) / width + epsilon);
}

/* y = weight * x / rms(x); x * scale is rounded before it meets the weight, as in transformers. y may be x. */
static inline void norm(const bf16 *x, const bf16 *weight, float epsilon, int64_t width, bf16 *y) {
    float scale = inverse_rms(x, width, epsilon);
#pragma omp simd
    for (int64_t j = 0; j < width; j++)
        y[j] = f32_to_bf16(bf16_to_f32(weight[j]) * bf16_to_f32(f32_to_bf16(bf16_to_f32(x[j]) * scale)));
}

static inline SimdF32 sigmoid(SimdF32 x) { return 1 / (1 + simd_exp2(simd_min(simd_set(120), -LOG2E * x))); }

/* x cos + (-x2, x1) sin, x1 and x2 being the halves of a head, or its gradient, in place. */
static inline void rotate(bf16 *x, const bf16 *cosine, const bf16 *sine, int backward, int64_t half) {
    const bf16 *sine1 = sine + (backward ? half : 0), *sine2 = sine + (backward ? 0 : half); /* the transpose swaps them */
    float sign = backward ? -1.0f : 1.0f;
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
        float first = bf16_to_f32(x[j]), second = bf16_to_f32(x[half + j]);
        x[j] = f32_to_bf16(first * bf16_to_f32(cosine[j]) - sign * second * bf16_to_f32(sine1[j]));
        x[half + j] = f32_to_bf16(second * bf16_to_f32(cosine[half + j]) + sign * first * bf16_to_f32(sine2[j]));
    }
}
