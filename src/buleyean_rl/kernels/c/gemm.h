/* Packing, and the micro-kernel of each instruction set: AMX, AVX512-BF16, AVX512F, AVX2.
 *
 * The micro-kernel adds products of 32 rows of a and 32 columns of b, 32 deep at a time, to a block of 32 x 32 sums in fp32.
 * Operands are packed in words of 32 bits. Where a processor multiplies bf16 (AMX, AVX512-BF16) a word is two neighbours of
 * the depth (VNNI 2), elsewhere it is one of them, as a float (VNNI 1). A block of b, packed, is two tiles side by side:
 *
 *            columns 0..15                       columns 16..31
 *          +-----------------------+           +-----------------------+
 *    k 0 1 | b00b10  b01b11  ...   |           |                       |   a row: 16 words, a cache line
 *    k 2 3 | b20b30  b21b31  ...   |           |                       |
 *      ... |                       |           |                       |   BLOCK / VNNI rows
 *          +-----------------------+           +-----------------------+
 *           words, next row +row_stride         +tile_stride              next 32 of the depth: +block_stride
 *
 * a is read row by row: its words are neighbours of a row, as they lie in memory.
 */
#pragma once
#include "dequantise.h"

#define TILE 16
#define BLOCK 32

#ifdef __AVX512BF16__ /* as have all processors with AMX */
#define VNNI 2
typedef bf16 Packed; /* an element of a packed operand */
#else
#define VNNI 1
typedef float Packed;
#endif
#define BLOCK_WORDS (BLOCK / VNNI)       /* of a column of a block */
#define TILE_WORDS (BLOCK_WORDS * TILE) /* of 16 columns of it */

#if VNNI == 2
static inline void pack(const bf16 *x, int64_t size, Packed *to) { memcpy(to, x, sizeof *to * size); }
static inline void simd_store_packed(SimdF32 left, SimdF32 right, Packed *to) { simd_store_bf16(left, right, to); }
static inline Packed to_packed(float x) { return f32_to_bf16(x); }
static inline Packed scale_packed(float factor, Packed x) { return f32_to_bf16(factor * bf16_to_f32(x)); }
static inline SimdF32 add_packed(SimdF32 sums, const Packed *x) { /* two vectors */
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(x), (__m512bh)_mm512_set1_epi16(0x3f80)); /* 1 */
}
#else
static inline void pack(const bf16 *x, int64_t size, Packed *to) { bf16_to_f32_many(x, size, to); }
static inline void simd_store_packed(SimdF32 left, SimdF32 right, Packed *to) {
    simd_store(left, to), simd_store(right, to + LANES);
}
static inline Packed to_packed(float x) { return x; }
static inline Packed scale_packed(float factor, Packed x) { return factor * x; }
static inline SimdF32 add_packed(SimdF32 sums, const Packed *x) { return sums + (simd_load(x) + simd_load(x + LANES)); }
#endif

/* 32 floats. */
static inline void pack_floats(const float *x, Packed *to) {
    for (int j = 0; j < BLOCK; j += 2 * LANES) simd_store_packed(simd_load(x + j), simd_load(x + j + LANES), to + j);
}

/* y = x^T, 8 x 8 words. */
static inline void transpose8(const uint32_t *x, int64_t x_stride, uint32_t *y, int64_t y_stride) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps((const float *)x + i * x_stride);
    for (int i = 0; i < 8; i += 2) b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
            a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps((float *)y + i * y_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps((float *)y + (i + 4) * y_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

/* y = x^T, of words. x: (rows, columns), multiples of 16. */
static inline void transpose(const uint32_t *x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t *y,
                             int64_t y_stride) {
    for (int64_t i = 0; i < rows; i += TILE) /* tile by tile: both lie in L1 */
        for (int64_t j = 0; j < columns; j += TILE)
            for (int64_t k = 0; k < 4; k++) {
                int64_t row = i + k / 2 * 8, column = j + k % 2 * 8;
                transpose8(x + row * x_stride + column, x_stride, y + column * y_stride + row, y_stride);
            }
}

/* 32 columns of a row of words, from bf16 as it lies in VNNI rows. */
#if VNNI == 2
static inline void pack_b_row(const bf16 *x, int64_t x_stride, uint32_t *left, uint32_t *right) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* a register is unpacked by quarters */
    __m512i even = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(x));
    __m512i odd = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(x + x_stride));
    _mm512_storeu_si512(left, _mm512_unpacklo_epi16(even, odd));
    _mm512_storeu_si512(right, _mm512_unpackhi_epi16(even, odd));
}
#else
static inline void pack_b_row(const bf16 *x, int64_t x_stride, uint32_t *left, uint32_t *right) {
    (void)x_stride;
    bf16_to_f32_many(x, TILE, (float *)left);
    bf16_to_f32_many(x + TILE, TILE, (float *)right);
}
#endif

/* The first of the rows that are left, which are taken in even parts, none larger than `largest`. */
static inline int even_part(int left, int largest) {
    int parts = (left + largest - 1) / largest;
    return (left + parts - 1) / parts;
}

/* Blocks of b one below the other: see the drawing. */
typedef struct { uint32_t *words; int64_t row_stride, tile_stride, block_stride; } PackedB;

/* Of a panel of b, `blocks` deep: all left tiles of 32 columns, then all right ones. */
static inline PackedB panel_block(uint32_t *panel, int64_t blocks, int64_t column_block, int64_t block) {
    return (PackedB){panel + TILE_WORDS * (2 * column_block * blocks + block), TILE, TILE_WORDS * blocks, TILE_WORDS};
}

/* A block's rows of a, and its columns of b, `blocks` deep. */
typedef struct { const Packed *a; int64_t a_stride, blocks; PackedB b; } Operands;

/* `microkernel`: a block c = from + the products of some operands; from: zeros if NULL, or the same place as c. */

#ifdef __AMX_BF16__
/* A compiler does not know what of memory these instructions read and write. */
#define AMX_FENCE __asm__ volatile("" ::: "memory")

typedef struct { uint8_t palette, start, reserved[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } TileConfig;

static inline void amx_begin(TileConfig *before) { /* another library's may be in use */
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 4 * TILE, config.rows[tile] = TILE;
    AMX_FENCE;
    _tile_storeconfig(before);
    _tile_loadconfig(&config);
    AMX_FENCE;
}

static inline void amx_end(const TileConfig *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

INLINE void microkernel(const float *from, int64_t from_stride, float *c, int64_t c_stride, int rows, const Operands *x, int count) {
    (void)rows;
    AMX_FENCE;
    if (from) {
        _tile_loadd(0, from, 4 * from_stride);
        _tile_loadd(1, from + TILE, 4 * from_stride);
        _tile_loadd(2, from + TILE * from_stride, 4 * from_stride);
        _tile_loadd(3, from + TILE * from_stride + TILE, 4 * from_stride);
    } else {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    }
    for (const Operands *end = x + count; x < end; x++)
        for (int64_t k = 0; k < x->blocks; k++) {
            const Packed *a = x->a + k * BLOCK;
            const uint32_t *b = x->b.words + k * x->b.block_stride;
            _tile_stream_loadd(6, b, 4 * x->b.row_stride); /* b is not to drive a from L1 */
            _tile_loadd(4, a, 2 * x->a_stride);
            _tile_stream_loadd(7, b + x->b.tile_stride, 4 * x->b.row_stride);
            _tile_loadd(5, a + TILE * x->a_stride, 2 * x->a_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    _tile_stored(0, c, 4 * c_stride);
    _tile_stored(1, c + TILE, 4 * c_stride);
    _tile_stored(2, c + TILE * c_stride, 4 * c_stride);
    _tile_stored(3, c + TILE * c_stride + TILE, 4 * c_stride);
    AMX_FENCE;
}
#else

typedef struct { char unused; } TileConfig;
static inline void amx_begin(TileConfig *before) { (void)before; }
static inline void amx_end(const TileConfig *before) { (void)before; }

/* A word of a times a vector of words of b, added. */
static inline SimdF32 multiply_add(SimdF32 sums, const Packed *a, const uint32_t *b) {
#if VNNI == 2
    int32_t word;
    memcpy(&word, a, 4);
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(word), (__m512bh)_mm512_loadu_si512(b));
#else
    return sums + *a * simd_load((const float *)b);
#endif
}

/* `rows` of a block, and two vectors' columns, which are `far` apart in c and `apart` in b. */
INLINE void microkernel_rows(int rows, const float *from, int64_t from_stride, float *c, int64_t c_stride, int64_t far,
                             const Packed *a, int64_t a_stride, const uint32_t *b, int64_t row_stride, int64_t apart, int64_t words) {
    SimdF32 left[8], right[8];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        left[i] = right[i] = (SimdF32){0};
        if (from) left[i] = simd_load(from + i * from_stride), right[i] = simd_load(from + i * from_stride + far);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < words; k++)
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            left[i] = multiply_add(left[i], a + i * a_stride + k * VNNI, b + k * row_stride);
            right[i] = multiply_add(right[i], a + i * a_stride + k * VNNI, b + k * row_stride + apart);
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) simd_store(left[i], c + i * c_stride), simd_store(right[i], c + i * c_stride + far);
}

/* Apart: inlined into a large function, compilers keep its sums in memory. */
static __attribute__((noinline, unused)) void microkernel(const float *from, int64_t from_stride, float *c, int64_t c_stride,
                                                          int rows, const Operands *x, int count) {
    for (const Operands *end = x + count; x < end && x->blocks; x++, from = c, from_stride = c_stride) {
        PackedB b = x->b;
        int64_t far = LANES == TILE ? TILE : LANES, apart = LANES == TILE ? b.tile_stride : LANES, words = x->blocks * BLOCK_WORDS;
        for (int half = 0; half < 2; half += 2 * LANES / TILE)
            for (int row = 0, some; row < rows; row += some) {
                const Packed *a = x->a + row * x->a_stride;
                const float *from_rows = from ? from + row * from_stride + half * TILE : NULL;
                const uint32_t *b_half = b.words + half * b.tile_stride;
                float *c_rows = c + row * c_stride + half * TILE;
#define CASE(n) case n: microkernel_rows(n, from_rows, from_stride, c_rows, c_stride, far, a, x->a_stride, b_half, b.row_stride, \
                                         apart, words); break;
                switch (some = even_part(rows - row, LANES == TILE ? 8 : 6)) {
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
                }
#undef CASE
            }
    }
}
#endif

/* `count` rows, packed, of which the first `rows` are there; zeros after them, or as they lie where they need no change. */
static inline const Packed *pack_a(const bf16 *x, int64_t *stride, int64_t rows, int64_t count, int64_t depth, Packed *to) {
#if VNNI == 2
    if (rows >= count) return x;
#endif
    for (int64_t i = 0; i < count; i++)
        if (i < rows) pack(x + i * *stride, depth, to + i * depth);
        else memset(to + i * depth, 0, sizeof *to * depth);
    *stride = depth;
    return to;
}

/* A packed matrix as b, its columns next to each other. x: (rows, columns), multiples of 32. */
static inline void pack_b(const Packed *x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t *y, int64_t y_stride) {
    for (int64_t i = 0; i < rows / VNNI; i++)
#if VNNI == 2
        for (int64_t j = 0; j < columns; j += BLOCK)
            pack_b_row(x + 2 * i * x_stride + j, x_stride, y + i * y_stride + j, y + i * y_stride + j + TILE);
#else
        memcpy(y + i * y_stride, x + i * x_stride, 4 * columns);
#endif
}

/* x^T as a. x: (rows, columns), multiples of 32; buffer: as large. */
static inline void pack_a_transposed(const Packed *x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t *buffer,
                                     uint32_t *y, int64_t y_stride) {
#if VNNI == 2
    pack_b(x, x_stride, rows, columns, buffer, columns);
    transpose(buffer, columns, rows / 2, columns, y, y_stride);
#else
    (void)buffer;
    transpose((const uint32_t *)x, x_stride, rows, columns, y, y_stride);
#endif
}

/* As many rows and columns from some on, or those that there are. */
static inline Matrix part_of(Matrix x, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    int by_row = x.column_stride == 1;
    if (x.quantised) x.first_row += by_row ? row : column, x.first_column += by_row ? column : row;
    else x.data += row * x.row_stride + column * x.column_stride;
    x.rows = smaller(x.rows - row, rows), x.columns = smaller(x.columns - column, columns);
    return x;
}

/* A block of b from bf16 as it lies; one of its strides is 1. */
static inline void pack_b_block(Matrix b, uint32_t *to, int64_t tile_stride) {
    if (b.column_stride == 1) {
        for (int i = 0; i < BLOCK_WORDS; i++)
            pack_b_row(b.data + VNNI * i * b.row_stride, b.row_stride, to + i * TILE, to + i * TILE + tile_stride);
        return;
    }
    for (int half = 0; half < 2; half++) {
        const bf16 *columns = b.data + half * TILE * b.column_stride;
        uint32_t *tile = to + half * tile_stride;
#if VNNI == 2
        transpose((const uint32_t *)columns, b.column_stride / 2, TILE, TILE, tile, TILE);
#else
        float wide[TILE * BLOCK];
        for (int j = 0; j < TILE; j++) bf16_to_f32_many(columns + j * b.column_stride, BLOCK, wide + j * BLOCK);
        transpose((uint32_t *)wide, BLOCK, TILE, BLOCK, tile, TILE);
#endif
    }
}

/* b in a panel that is `blocks` deep, from one of its blocks on; read as it lies, or dequantised. Zeros follow where the depth of a row-major b is
 * no multiple of 32. */
static inline void pack_b_panel(Matrix b, uint32_t *panel, int64_t blocks, int64_t block) {
    int by_row = b.column_stride == 1;
    int64_t inner = by_row ? b.columns : b.rows, outer = by_row ? b.rows : b.columns;
    bf16 filled[BLOCK * BLOCK];
    for (int64_t x = 0; x < outer; x += BLOCK)
        for (int64_t z = 0; z < inner; z += BLOCK) {
            int64_t k = by_row ? x : z, j = by_row ? z : x;
            Matrix from = part_of(b, k, BLOCK, j, BLOCK);
            PackedB to = panel_block(panel, blocks, j / BLOCK, block + k / BLOCK);
            if (b.quantised) {
                dequantise_part(b.quantised, from.first_row, BLOCK, from.first_column, BLOCK, filled);
                from = by_row ? row_major(filled, BLOCK, BLOCK) : transposed(filled, BLOCK, BLOCK);
            } else if (from.rows < BLOCK) {
                memset(filled, 0, sizeof filled);
                for (int64_t i = 0; i < from.rows; i++)
                    memcpy(filled + i * BLOCK, from.data + i * b.row_stride, BLOCK * sizeof *filled);
                from = row_major(filled, BLOCK, BLOCK);
            }
            pack_b_block(from, to.words, to.tile_stride);
        }
}

/* A finished block's sums, plus what is `added` to them, as rows of y. */
static inline void store_block(const float *sums, const bf16 *added, int64_t added_stride, bf16 *y, int64_t y_stride, int rows) {
    for (int i = 0; i < rows; i++, sums += BLOCK, y += y_stride) {
        float row[BLOCK];
        for (int j = 0; j < BLOCK && added; j++) row[j] = sums[j] + bf16_to_f32(added[i * added_stride + j]);
        f32_to_bf16_many(added ? row : sums, BLOCK, y);
    }
}
