/* Products of few rows with weights as they lie: packing those would take longer than the products.
 *
 * Each sum has a vector's lanes of partial sums along the depth. Which rows there are does not change the order in which any
 * of them is added: a row's results are the same alone and beside others.
 */
#pragma once
#include "gemm.h"

#define ROWS_AT_ONCE 8 /* whose sums with a column fit in registers, and do not wait for each other */
#define ROW_BLOCK 48

/* Elements along the depth in one vector: of a row, packed, of a weight, and the sums of their products. */
#if VNNI == 2
#define DEPTH 32
typedef __m512bh Operand;
INLINE Operand load_packed(const Packed *x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE Operand load_weight(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE SimdF32 add_products(SimdF32 sums, Operand x, Operand y) { return _mm512_dpbf16_ps(sums, x, y); }
/* Two elements of a query times words of as many keys as there are lanes. */
INLINE SimdF32 add_words(SimdF32 sums, const bf16 *x, const bf16 *words) {
    int32_t word;
    memcpy(&word, x, 4);
    return add_products(sums, (__m512bh)_mm512_set1_epi32(word), load_weight(words));
}
#else
#define DEPTH LANES
typedef SimdF32 Operand;
INLINE Operand load_packed(const Packed *x) { return simd_load(x); }
INLINE Operand load_weight(const bf16 *x) { return simd_load_bf16(x); }
INLINE SimdF32 add_products(SimdF32 sums, Operand x, Operand y) { return MM(fmadd_ps)(x, y, sums); }
INLINE SimdF32 add_words(SimdF32 sums, const bf16 *x, const bf16 *words) {
    SimdU32 both = *(const SimdWords *)words;
    sums = add_products(sums, simd_set(bf16_to_f32(x[0])), (SimdF32)(both << 16));
    return add_products(sums, simd_set(bf16_to_f32(x[1])), (SimdF32)(both & 0xffff0000));
}
#endif

/* Rows, packed, and a column's or more columns' weights, as many elements each. */
typedef struct { const Packed *x; const bf16 *w; int64_t depth; } Factors;

static inline Factors factors(const Packed *x, const bf16 *w, int64_t depth, int64_t row, int64_t column) {
    return (Factors){x + row * depth, w + column * depth, depth};
}

INLINE void add_factors(int rows, SimdF32 *sums, Factors f) {
    for (int64_t k = 0; k < f.depth; k += DEPTH) {
        Operand w = load_weight(f.w + k);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) sums[i] = add_products(sums[i], load_packed(f.x + i * f.depth + k), w);
    }
}

/* The sums over four vectors' lanes. */
INLINE __m128 add_lanes(const SimdF32 *x) {
    __m256 half[4], sums;
    for (int i = 0; i < 4; i++)
#if LANES == 16
        half[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm512_extractf32x8_ps(x[i], 1));
#else
        half[i] = x[i];
#endif
    sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* c = x w^T + hidden b^T, of some rows and 32 columns. */
INLINE void multiply_rows(int rows, Factors base, Factors adapter, float *c) {
    float columns[BLOCK * ROWS_AT_ONCE];
    for (int j = 0; j < BLOCK; j++, base.w += base.depth, adapter.w += adapter.depth) {
        SimdF32 sums[ROWS_AT_ONCE] = {0};
        add_factors(rows, sums, base);
        add_factors(rows, sums, adapter);
#pragma GCC unroll 2
        for (int i = 0; i < rows; i += 4) _mm_storeu_ps(columns + j * ROWS_AT_ONCE + i, add_lanes(sums + i));
    }
    for (int j = 0; j < BLOCK; j += 8)
        transpose8((uint32_t *)columns + j * ROWS_AT_ONCE, ROWS_AT_ONCE, (uint32_t *)c + j, BLOCK);
}

/* The same of up to ROW_BLOCK rows; c has room for ROWS_AT_ONCE more. While later rows are multiplied, `next` is fetched, the
 * columns that are multiplied next, if there are. */
static __attribute__((noinline)) void multiply_block(int64_t rows, Factors base, Factors adapter, const bf16 *next, float *c) {
    for (int64_t i = 0, fetched = 0, some; i < rows; i += some) {
        for (; next && fetched < BLOCK * base.depth * i / rows; fetched += 32) __builtin_prefetch(next + fetched);
        Factors f = factors(base.x, base.w, base.depth, i, 0), f2 = factors(adapter.x, adapter.w, adapter.depth, i, 0);
#define CASE(n) case n: multiply_rows(n, f, f2, c + i * BLOCK); break;
        switch (some = even_part((int)(rows - i), ROWS_AT_ONCE)) {
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        }
#undef CASE
    }
}

/* 32 columns of a linear layer, of up to ROW_BLOCK rows: x w^T + hidden b^T + bias. */
static void linear_block(const RowLinear *l, const Packed *x, const Packed *hidden, int64_t row, int64_t rows, int64_t column,
                         float *c) {
    Factors base = factors(x, l->w, l->depth, row, column), adapter = {x, l->w, 0};
    if (l->rank) adapter = factors(hidden, l->b, l->rank, row, column);
    multiply_block(rows, base, adapter, column + BLOCK < l->columns ? base.w + BLOCK * l->depth : NULL, c);
    for (int64_t i = 0; l->bias && i < rows; i++)
        for (int j = 0; j < BLOCK; j++) c[i * BLOCK + j] += bf16_to_f32(l->bias[column + j]);
}
