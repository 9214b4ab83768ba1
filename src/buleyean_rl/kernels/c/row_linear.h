/* Products of few rows with weights as they lie: packing those would take longer than the products.
 *
 * Each sum has a vector's lanes of partial sums along the depth. Which rows there are does not change the order in which any
 * of them is added: a row's results are the same alone and beside others.
 */
#pragma once
#include "gemm.h"

#define COLUMNS_AT_ONCE 4 /* whose sums with some rows fit in registers, and do not wait for each other */
#define ROWS_AT_ONCE (LANES == 16 ? 6 : 3)
#define ROW_BLOCK 128 /* that stay in L2 */
#define DEEP 768      /* beyond which only 8 columns, not 16, stay in L1 beside some rows */

#if LANES == 16
#define CAST _mm512_castps_si512
#else
#define CAST _mm256_castps_si256
#endif

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

/* y += x b. x: (depth); b: words of two rows, (depth / 2, width, 2); width: a multiple of two vectors. */
INLINE void add_word_rows(const bf16 *x, int64_t depth, const bf16 *b, int64_t width, float *y) {
    for (int64_t j = 0; j < width; j += 2 * LANES) {
        SimdF32 sums[2] = {simd_load(y + j), simd_load(y + j + LANES)};
        for (int64_t k = 0; k < depth; k += 2)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) sums[i] = add_words(sums[i], x + k, b + k * width + 2 * (j + i * LANES));
        simd_store(sums[0], y + j), simd_store(sums[1], y + j + LANES);
    }
}

/* The sums over four vectors' lanes. */
INLINE __m128 add_lanes(const SimdF32 *x) {
    SimdF32 pairs[2];
    for (int i = 0; i < 2; i++)
        pairs[i] = MM(unpacklo_ps)(x[2 * i], x[2 * i + 1]) + MM(unpackhi_ps)(x[2 * i], x[2 * i + 1]);
    SimdF32 low = (SimdF32)MM(unpacklo_epi64)(CAST(pairs[0]), CAST(pairs[1]));
    SimdF32 quads = low + (SimdF32)MM(unpackhi_epi64)(CAST(pairs[0]), CAST(pairs[1]));
#if LANES == 16
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
#else
    __m256 half = quads;
#endif
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* c = x w^T, of some rows and COLUMNS_AT_ONCE columns, `some` of them at a time. A row alone takes one after the other, by the
 * same instructions, which is what the processor's prefetching is made for. */
INLINE void multiply_tile(int rows, int some, const Packed *x, const bf16 *w, int64_t depth, float *c) {
    SimdF32 sums[ROWS_AT_ONCE][COLUMNS_AT_ONCE];
#pragma GCC unroll 1
    for (int first = 0; first < COLUMNS_AT_ONCE; first += some) {
        SimdF32 part[ROWS_AT_ONCE][COLUMNS_AT_ONCE] = {0};
        for (int64_t k = 0; k < depth; k += DEPTH) {
            Operand row[ROWS_AT_ONCE];
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                row[i] = load_packed(x + i * depth + k);
                __asm__("" : "+v"(row[i])); /* compilers would load it again for every column */
            }
#pragma GCC unroll 4
            for (int j = 0; j < some; j++) {
                Operand column = load_weight(w + (first + j) * depth + k);
#pragma GCC unroll 6
                for (int i = 0; i < rows; i++) part[i][j] = add_products(part[i][j], row[i], column);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < some; j++) sums[i][first + j] = part[i][j];
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) _mm_storeu_ps(c + i * BLOCK, add_lanes(sums[i]));
}

/* The same of up to ROW_BLOCK rows and up to 32 columns, some of which stay in L1 while all rows meet them. Meanwhile `next`
 * is fetched, the columns that are multiplied next, if there are, unless a row is alone. */
static __attribute__((noinline)) void multiply_block(int64_t rows, int64_t columns, const Packed *x, const bf16 *w, int64_t depth,
                                                     const bf16 *next, float *c) {
    int64_t fetched = 0, done = 0, part = depth > DEEP ? 8 : smaller(columns, 16);
    for (int64_t first = 0; first < columns; first += part)
        for (int64_t i = 0, some; i < rows; i += some) {
            const Packed *tile = x + i * depth;
            some = even_part((int)(rows - i), ROWS_AT_ONCE);
            for (int64_t j = first; j < first + part; j += COLUMNS_AT_ONCE) {
                int64_t end = depth * (done += some * COLUMNS_AT_ONCE) / rows;
                for (; next && rows > 1 && fetched < end; fetched += 32) __builtin_prefetch(next + fetched, 0, 2);
#define CASE(n) case n: multiply_tile(n, n == 1 ? 1 : COLUMNS_AT_ONCE, tile, w + j * depth, depth, c + i * BLOCK + j); break;
                switch (some) {
                    CASE(1) CASE(2) CASE(3)
#if LANES == 16
                    CASE(4) CASE(5) CASE(6)
#endif
                }
#undef CASE
            }
        }
}

/* 32 columns of a linear layer, of up to ROW_BLOCK rows: x w^T + hidden b^T + bias. next: see multiply_block. */
static void linear_block(const RowLinear *l, const Packed *x, const bf16 *hidden, int64_t row, int64_t rows, int64_t column,
                         const bf16 *next, float *c) {
    const bf16 *b = l->rank ? l->b + column * l->rank : NULL, *w = l->w + column * l->depth;
    bf16 *dequantised;
    if (l->quantised) {
        if (!SCRATCH(BUFFER(dequantised, BLOCK * l->depth))) return;
        dequantise_part(l->quantised, column, BLOCK, 0, l->depth, dequantised);
        w = dequantised, next = NULL;
    }
    for (int64_t j = 0; j < BLOCK * l->rank; j += 32) __builtin_prefetch(b + j); /* lies apart from what is read before */
    multiply_block(rows, BLOCK, x + row * l->depth, w, l->depth, next, c);
    for (int64_t i = 0; i < rows; i++, c += BLOCK) {
        if (l->rank) add_word_rows(hidden + (row + i) * l->ranks + l->first, l->rank, b, BLOCK, c);
        for (int j = 0; j < BLOCK && l->bias; j++) c[j] += bf16_to_f32(l->bias[column + j]);
    }
}
