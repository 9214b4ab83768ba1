/* A processor's vectors of floats, and bf16 made of them. */
#ifndef LANES_H
#define LANES_H
#include "bf16.h"

#include <string.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif !defined(LANES) /* tests take them as wide as other processors have them */
#define LANES 8
#endif

/* They are read from any place and put there. */
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
static inline Lanes lanes(const float *from) { return *(const Lanes *)from; }
static inline void put(Lanes x, float *to) { *(Lanes *)to = x; }

#define LOG2E 1.44269504f
#define LN2 0.693147181f

/* 2^power x, for x near 1; 0 where that is far below. Numbers are rounded to the nearest, ties to even. */
#if defined(__AVX512F__)
static inline Lanes larger(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }
static inline Lanes nearest(Lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Lanes times_power_of_2(Lanes x, Lanes power) { return _mm512_scalef_ps(x, power); }
static inline float sum_of(Lanes x) { return _mm512_reduce_add_ps(x); }

static inline Lanes wide(const number *from) {
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
#elif defined(__AVX2__)
static inline Lanes larger(Lanes x, Lanes y) { return _mm256_max_ps(x, y); }
static inline Lanes nearest(Lanes x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

static inline Lanes times_power_of_2(Lanes x, Lanes power) {
    __m256i moved = _mm256_add_epi32((__m256i)x, _mm256_slli_epi32(_mm256_cvtps_epi32(power), 23));
    return _mm256_and_ps((__m256)moved, _mm256_cmp_ps(power, _mm256_set1_ps(-125.0f), _CMP_GT_OQ));
}

static inline float sum_of(Lanes x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline Lanes wide(const number *from) {
    return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
}
#else
static inline Lanes larger(Lanes x, Lanes y) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] > y[i] ? x[i] : y[i];
    return x;
}

static inline Lanes nearest(Lanes x) {
    for (int i = 0; i < LANES; i++) x[i] = rintf(x[i]);
    return x;
}

static inline Lanes times_power_of_2(Lanes x, Lanes power) {
    for (int i = 0; i < LANES; i++) x[i] = power[i] < -125 ? 0 : ldexpf(x[i], (int)power[i]);
    return x;
}

static inline float sum_of(Lanes x) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

static inline Lanes wide(const number *from) {
    Lanes x;
    for (int i = 0; i < LANES; i++) x[i] = widen(from[i]);
    return x;
}
#endif

/* Two vectors as one row of numbers. */
#if defined(__AVX512BF16__)
static inline void narrow_row(Lanes left, Lanes right, number *to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}
#elif defined(__AVX512F__)
static inline __m512i narrow_bits(__m512i x) {
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
}

static inline void narrow_row(Lanes left, Lanes right, number *to) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(narrow_bits((__m512i)left)));
    _mm256_storeu_si256((__m256i *)(to + LANES), _mm512_cvtepi32_epi16(narrow_bits((__m512i)right)));
}
#elif defined(__AVX2__)
static inline __m256i narrow_bits(__m256i x) {
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
}

static inline void narrow_row(Lanes left, Lanes right, number *to) {
    __m256i both = _mm256_packus_epi32(narrow_bits((__m256i)left), narrow_bits((__m256i)right)); /* by quarters */
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(both, 0xd8));
}
#else
static inline void narrow_row(Lanes left, Lanes right, number *to) {
    for (int i = 0; i < LANES; i++) to[i] = narrow(left[i]), to[LANES + i] = narrow(right[i]);
}
#endif

/* 2^x, within 2e-7 of it; 0 where x is far below. */
static inline Lanes power_of_2(Lanes x) {
    Lanes n = nearest(x), r = x - n;
    Lanes p = 1.3264659e-3f * r + 9.6715659e-3f; /* the five terms of `exponential`, of r ln 2 */
    p = p * r + 5.5507343e-2f;
    p = p * r + 2.4022241e-1f;
    p = p * r + 6.9314698e-1f;
    return times_power_of_2(p * r + 1, n);
}

/* A multiple of 32 floats as numbers, and the other way round. */
static inline void narrow_many(const float *x, int64_t size, number *to) {
    for (int64_t i = 0; i < size; i += 2 * LANES) narrow_row(lanes(x + i), lanes(x + i + LANES), to + i);
}

static inline void widen_many(const number *x, int64_t size, float *to) {
    for (int64_t i = 0; i < size; i += LANES) put(wide(x + i), to + i);
}
#endif
