/* Vectors of floats, LANES at a time, and bf16: which is how everything lies in memory, while sums are floats. */
#pragma once
#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if !defined(__AVX2__) || !defined(__FMA__)
#error "the kernels need AVX2 and FMA"
#endif

#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.44269504f
#define LN2 0.693147181f
#define MASKED -1e30f /* a score whose weight is nothing */

typedef uint16_t bf16;

static inline float bf16_to_f32(bf16 x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

static inline bf16 f32_to_bf16(float x) { /* to the nearest, ties to even; adding to a NaN's bits could make a number of it */
    union { float value; uint32_t bits; } u = {x};
    uint32_t rounded = (u.bits + 0x7fff + (u.bits >> 16 & 1)) >> 16;
    return (u.bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

#if defined(__AMX_BF16__)
#define INSTRUCTION_SET "AMX"
#elif defined(__AVX512BF16__)
#define INSTRUCTION_SET "AVX512-BF16"
#elif defined(__AVX512F__)
#define INSTRUCTION_SET "AVX512F"
#else
#define INSTRUCTION_SET "AVX2"
#endif

#ifdef __AVX512F__
#define LANES 16
#define MM(name) _mm512_##name
#define HALF __m256i_u
#else
#define LANES 8
#define MM(name) _mm256_##name
#define HALF __m128i_u
#endif

typedef float SimdF32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t SimdU32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t SimdWords __attribute__((vector_size(4 * LANES), aligned(2), may_alias)); /* of two bf16 each */
typedef bf16 SimdBf16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
static inline SimdF32 simd_load(const float *from) { return *(const SimdF32 *)from; }
static inline void simd_store(SimdF32 x, float *to) { *(SimdF32 *)to = x; }
static inline SimdF32 simd_set(float x) { return (SimdF32){0} + x; }
static inline SimdF32 simd_load_bf16(const bf16 *from) {
    return (SimdF32)MM(slli_epi32)(MM(cvtepu16_epi32)(*(const HALF *)from), 16);
}

/* Two vectors as one row. */
static inline void simd_store_bf16(SimdF32 left, SimdF32 right, bf16 *to) {
#ifdef __AVX512BF16__
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left));
#else
    const SimdF32 x[2] = {left, right};
    for (int i = 0; i < 2; i++) {
        SimdU32 bits = (SimdU32)x[i], is_nan = (SimdU32)(x[i] != x[i]), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        *(SimdBf16 *)(to + i * LANES) = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), SimdBf16);
    }
#endif
}

/* simd_max, simd_min: the second where either is NaN. */
static inline SimdF32 simd_max(SimdF32 x, SimdF32 y) { return MM(max_ps)(x, y); }
static inline SimdF32 simd_min(SimdF32 x, SimdF32 y) { return MM(min_ps)(x, y); }

static inline float simd_sum(SimdF32 x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* Of a multiple of LANES floats, but for NaN. */
static inline float simd_largest(const float *x, int64_t size) {
    SimdF32 lanes = simd_set(-INFINITY);
    for (int64_t i = 0; i < size; i += LANES) lanes = simd_max(simd_load(x + i), lanes);
    float largest = lanes[0];
    for (int i = 1; i < LANES; i++) largest = fmaxf(largest, lanes[i]);
    return largest;
}

/* 2^x within 2e-7 of it, for x up to 127; 0 where x is far below; NaN of NaN. */
static inline SimdF32 simd_exp2(SimdF32 x) {
    __auto_type n = MM(cvtps_epi32)(x);
    SimdF32 r = x - MM(cvtepi32_ps)(n), p = 1.3264659e-3f * r + 9.6715659e-3f; /* minimax of 2^r between -1/2 and 1/2 */
    p = p * r + 5.5507343e-2f;
    p = p * r + 2.4022241e-1f;
    p = p * r + 6.9314698e-1f;
    SimdU32 power = (SimdU32)(p * r + 1) + ((SimdU32)n << 23);
    return (SimdF32)(power & ~(SimdU32)(x < -125));
}

static inline float dot(const bf16 *x, const bf16 *y, int64_t size) {
    float sum = 0;
    for (int64_t j = 0; j < size; j++) sum += bf16_to_f32(x[j]) * bf16_to_f32(y[j]);
    return sum;
}

/* A multiple of 32 floats to bf16, and the other way round. */
static inline void f32_to_bf16_many(const float *x, int64_t size, bf16 *to) {
    for (int64_t i = 0; i < size; i += 2 * LANES) simd_store_bf16(simd_load(x + i), simd_load(x + i + LANES), to + i);
}

static inline void bf16_to_f32_many(const bf16 *x, int64_t size, float *to) {
    for (int64_t i = 0; i < size; i += LANES) simd_store(simd_load_bf16(x + i), to + i);
}
