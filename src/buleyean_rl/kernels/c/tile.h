/* Products of blocks, and how their operands lie in memory.
 *
 * A block is 32 rows of a left operand and 32 columns of a right one. An operand is laid out in words. A left one's words
 * are neighbours of a row, a right one's of a column: where a processor multiplies bf16 (in matrix registers, AMX, or in
 * vectors, AVX512-BF16) two numbers; elsewhere one, as a float, and blocks are made of vectors' products.
 */
#ifndef TILES_H
#define TILES_H
#define _GNU_SOURCE
#include "simd.h"

#define SIDE 16 /* of a tile: 16 rows of 16 words */
#define STEP (2 * SIDE)
#define BLOCK (STEP * STEP)
#define INLINE static inline __attribute__((always_inline))

#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
#define IN_WORD 2
#elif !defined(IN_WORD) /* tests lay words out as other processors want them */
#define IN_WORD 1
#endif

#if IN_WORD == 2
typedef number operand;
#else
typedef float operand;
#endif

#define DEEP (STEP / IN_WORD) /* words of a column, 32 deep */
#define HALF (DEEP * SIDE)    /* of 16 columns */

/* Numbers as operands, two vectors of floats as a row of them, and one times a factor. */
#if IN_WORD == 2
static inline void operands(const number *x, int64_t size, operand *to) { memcpy(to, x, sizeof *to * size); }
static inline void operand_row(Lanes left, Lanes right, operand *to) { narrow_row(left, right, to); }
static inline operand times(float factor, operand x) { return narrow(factor * widen(x)); }
#else
static inline void operands(const number *x, int64_t size, operand *to) { widen_many(x, size, to); }
static inline void operand_row(Lanes left, Lanes right, operand *to) { put(left, to), put(right, to + LANES); }
static inline operand times(float factor, operand x) { return factor * x; }
#endif

/* y = x^T, a tile. */
#if defined(__AVX512F__)
static inline void turn(const uint32_t *x, int64_t x_stride, uint32_t *y, int64_t y_stride) {
    __m512i a[SIDE], b[SIDE];
    for (int i = 0; i < SIDE; i++) a[i] = _mm512_loadu_si512(x + i * x_stride);
    for (int i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < SIDE; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < SIDE; j += 8) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(y + i * y_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(y + (i + 8) * y_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}
#elif defined(__AVX2__)
static inline void turn_quarter(const uint32_t *x, int64_t x_stride, uint32_t *y, int64_t y_stride) {
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

static inline void turn(const uint32_t *x, int64_t x_stride, uint32_t *y, int64_t y_stride) {
    for (int i = 0; i < SIDE; i += 8)
        for (int j = 0; j < SIDE; j += 8) turn_quarter(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
}
#else
static inline void turn(const uint32_t *x, int64_t x_stride, uint32_t *y, int64_t y_stride) {
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) y[i * y_stride + j] = x[j * x_stride + i];
}
#endif

/* Of a right operand: `lay_rows`, as many rows as a word has numbers of, 32 columns of numbers in two halves;
 * `operand_rows`, two rows of a vector's columns, of floats; `add_rows`, what those are added to sums. `stride` is that of
 * numbers, or of words. */
#if defined(__AVX512BF16__)
static inline void lay_rows(const number *x, int64_t stride, uint32_t *left, uint32_t *right) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* a register is unpacked by quarters */
    __m512i low = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(x));
    __m512i high = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(x + stride));
    _mm512_storeu_si512(left, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(right, _mm512_unpackhi_epi16(low, high));
}

static inline void operand_rows(Lanes even, Lanes odd, uint32_t *to, int64_t stride) {
    (void)stride;
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

static inline Lanes add_rows(Lanes sums, const uint32_t *words, int64_t stride) {
    (void)stride;
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(words), (__m512bh)_mm512_set1_epi16(0x3f80)); /* 1 */
}
#elif IN_WORD == 2
static inline void lay_rows(const number *x, int64_t stride, uint32_t *left, uint32_t *right) {
    for (int i = 0; i < SIDE; i++) {
        left[i] = x[i] | (uint32_t)x[stride + i] << 16;
        right[i] = x[SIDE + i] | (uint32_t)x[stride + SIDE + i] << 16;
    }
}

static inline void operand_rows(Lanes even, Lanes odd, uint32_t *to, int64_t stride) {
    (void)stride;
    for (int i = 0; i < LANES; i++) to[i] = narrow(even[i]) | (uint32_t)narrow(odd[i]) << 16;
}

static inline Lanes add_rows(Lanes sums, const uint32_t *words, int64_t stride) {
    (void)stride;
    for (int i = 0; i < LANES; i++) sums[i] += widen((number)words[i]) + widen((number)(words[i] >> 16));
    return sums;
}
#else
static inline void lay_rows(const number *x, int64_t stride, uint32_t *left, uint32_t *right) {
    (void)stride;
    widen_many(x, SIDE, (float *)left);
    widen_many(x + SIDE, SIDE, (float *)right);
}

static inline void operand_rows(Lanes even, Lanes odd, uint32_t *to, int64_t stride) {
    put(even, (float *)to);
    put(odd, (float *)to + stride);
}

static inline Lanes add_rows(Lanes sums, const uint32_t *words, int64_t stride) {
    return sums + (lanes((const float *)words) + lanes((const float *)words + stride));
}
#endif

/* The product of a row of operands and one of numbers, a multiple of STEP. */
static inline float dot_rows(const operand *x, const number *y, int64_t size) {
    Lanes sums = {0};
#if defined(__AVX512BF16__)
    for (int64_t j = 0; j < size; j += STEP)
        sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(x + j), (__m512bh)_mm512_loadu_si512(y + j));
#elif IN_WORD == 2
    for (int64_t j = 0; j < size; j += LANES) sums += wide(x + j) * wide(y + j);
#else
    for (int64_t j = 0; j < size; j += LANES) sums += lanes(x + j) * wide(y + j);
#endif
    return sum_of(sums);
}

/* 32 columns of a right operand from some of its depth on: words, those of the next row, the other 16 columns and the next 32
 * of the depth so far away. */
typedef struct { uint32_t *at; int64_t row, half, step; } Right;

/* What of a right operand is laid out: `group` says which 32 columns, `step` from where on. It is `steps` deep. */
static inline Right in_panel(uint32_t *panel, int64_t steps, int64_t group, int64_t step) {
#ifdef __AMX_BF16__
    return (Right){panel + 2 * HALF * (group * steps + step), SIDE, HALF, 2 * HALF};
#else
    return (Right){panel + HALF * (2 * group * steps + step), SIDE, HALF * steps, HALF};
#endif
}

INLINE void nothing(void *unused) { (void)unused; }

/* Sums of a block: `begin_sums` with what lies at some place, or zeros if that is NULL, `add_dots` once or more, `end_sums`:
 * then they are at another place, which may be the same. */
typedef struct { const float *from; float *to; int64_t from_stride, to_stride; } Sums;

/* Added are products of 32 rows of a left operand, of which the first `rows` matter, with 32 columns of a right one. `once`:
 * whether the latter is not to drive others from the cache. At every step of the depth the core does something beside, of
 * which it has the time of some hundred instructions. */
#ifdef __AMX_BF16__
/* A compiler does not know what of memory these instructions read and write. */
#define SETTLE __asm__ volatile("" ::: "memory")

typedef struct { uint8_t palette, start, reserved[14]; uint16_t width[16]; uint8_t rows[16]; } Configuration;

static inline void take_tiles(Configuration *before) { /* another library's may be in use */
    Configuration mine = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) mine.width[tile] = 4 * SIDE, mine.rows[tile] = SIDE;
    SETTLE;
    _tile_storeconfig(before);
    _tile_loadconfig(&mine);
    SETTLE;
}

static inline void leave_tiles(const Configuration *before) {
    if (before->palette) _tile_loadconfig(before);
    else _tile_release();
}

INLINE Sums begin_sums(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    if (from) {
        _tile_loadd(0, from, 4 * from_stride);
        _tile_loadd(1, from + SIDE, 4 * from_stride);
        _tile_loadd(2, from + SIDE * from_stride, 4 * from_stride);
        _tile_loadd(3, from + SIDE * from_stride + SIDE, 4 * from_stride);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    return (Sums){NULL, to, 0, to_stride};
}

INLINE void end_sums(const Sums *sums) {
    _tile_stored(0, sums->to, 4 * sums->to_stride);
    _tile_stored(1, sums->to + SIDE, 4 * sums->to_stride);
    _tile_stored(2, sums->to + SIDE * sums->to_stride, 4 * sums->to_stride);
    _tile_stored(3, sums->to + SIDE * sums->to_stride + SIDE, 4 * sums->to_stride);
}

INLINE void add_dots(Sums *sums, const operand *a, int64_t stride, int rows, Right b, int once, int64_t steps,
                     void (*meanwhile)(void *), void *state) {
    (void)sums, (void)rows;
    for (int64_t step = 0; step < steps; step++, a += STEP, b.at += b.step) {
        if (once) _tile_stream_loadd(6, b.at, 4 * b.row);
        else _tile_loadd(6, b.at, 4 * b.row);
        _tile_loadd(4, a, 2 * stride);
        if (once) _tile_stream_loadd(7, b.at + b.half, 4 * b.row);
        else _tile_loadd(7, b.at + b.half, 4 * b.row);
        _tile_loadd(5, a + SIDE * stride, 2 * stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        meanwhile(state);
    }
}
#else
#define SETTLE

typedef struct { char none; } Configuration;

static inline void take_tiles(Configuration *before) { (void)before; }
static inline void leave_tiles(const Configuration *before) { (void)before; }

INLINE Sums begin_sums(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
    return (Sums){from, to, from_stride, to_stride};
}

INLINE void end_sums(const Sums *sums) { (void)sums; }

/* A word's product with a vector of words, added. */
static inline Lanes add_dot(Lanes sums, const operand *a, const uint32_t *b) {
#if defined(__AVX512BF16__)
    int32_t word;
    memcpy(&word, a, 4);
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_set1_epi32(word), (__m512bh)_mm512_loadu_si512(b));
#elif IN_WORD == 2
    for (int i = 0; i < LANES; i++) sums[i] += widen(a[0]) * widen((number)b[i]) + widen(a[1]) * widen((number)(b[i] >> 16));
    return sums;
#else
    return sums + *a * lanes((const float *)b);
#endif
}

/* `rows` of a block, and two vectors' columns, `far` apart in the sums and `apart` in the right operand. */
INLINE void add_row_dots(int rows, Sums sums, int64_t far, const operand *a, int64_t stride, const uint32_t *b, int64_t row,
                         int64_t apart, int64_t depth) {
    Lanes left[8], right[8];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        const float *from = sums.from + i * sums.from_stride;
        left[i] = right[i] = (Lanes){0};
        if (sums.from) left[i] = lanes(from), right[i] = lanes(from + far);
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++, a += IN_WORD, b += row)
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            left[i] = add_dot(left[i], a + i * stride, b);
            right[i] = add_dot(right[i], a + i * stride, b + apart);
        }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
        float *to = sums.to + i * sums.to_stride;
        put(left[i], to), put(right[i], to + far);
    }
}

/* The first of the rows that are left, which are taken in even parts: the sums of so many fit in registers. */
static int rows_at_once(int left) {
    int most = LANES == SIDE ? 8 : 6, parts = (left + most - 1) / most;
    return (left + parts - 1) / parts;
}

/* Apart: inlined into a large function, compilers keep its sums in memory. */
static __attribute__((noinline)) void add_block(Sums sums, const operand *a, int64_t stride, int rows, Right b, int64_t depth) {
    int64_t far = LANES == SIDE ? SIDE : LANES, apart = LANES == SIDE ? b.half : LANES;
    for (int half = 0; half < 2; half += 2 * LANES / SIDE)
        for (int row = 0, some; row < rows; row += some) {
            const operand *from = a + row * stride;
            const uint32_t *words = b.at + half * b.half;
            Sums of_rows = sums;
            if (sums.from) of_rows.from += row * sums.from_stride + half * SIDE;
            of_rows.to += row * sums.to_stride + half * SIDE;
#define CASE(n) case n: add_row_dots(n, of_rows, far, from, stride, words, b.row, apart, depth); break;
            switch (some = rows_at_once(rows - row)) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
            }
#undef CASE
        }
}

INLINE void add_dots(Sums *sums, const operand *a, int64_t stride, int rows, Right b, int once, int64_t steps,
                     void (*meanwhile)(void *), void *state) {
    (void)once;
    if (!steps) return;
    add_block(*sums, a, stride, rows, b, steps * DEEP);
    *sums = begin_sums(sums->to, sums->to_stride, sums->to, sums->to_stride);
    for (int64_t step = 0; step < steps; step++) meanwhile(state);
}
#endif

/* Whether this process multiplies blocks quickly: 1 in vectors, 2 in matrix registers. */
int has_tiles(void);

/* A thread's own memory for some words, kept from call to call: new pages would take longer than a task. */
uint32_t *own_memory(int64_t words);

static inline int64_t filled(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

/* The next of the buffers in a memory. */
static inline void *take(uint32_t **memory, int64_t words) {
    uint32_t *taken = *memory;
    *memory += filled(words, SIDE);
    return taken;
}

/* y = x^T, of words. x: (rows, columns), both multiples of SIDE. */
static inline void transpose(const uint32_t *x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t *y,
                             int64_t y_stride) {
    for (int64_t i = 0; i < rows; i += SIDE)
        for (int64_t j = 0; j < columns; j += SIDE) turn(x + i * x_stride + j, x_stride, y + j * y_stride + i, y_stride);
}

/* Up to `most` rows of numbers: as they lie, or fewer of them with zeros after them, in `spare`. */
static inline const number *strip_of(const number *x, int64_t *stride, int64_t rows, int64_t most, int64_t width,
                                     number *spare) {
    if (rows >= most) return x;
    for (int64_t i = 0; i < most; i++)
        if (i < rows) memcpy(spare + i * width, x + i * *stride, sizeof *x * width);
        else memset(spare + i * width, 0, sizeof *x * width);
    *stride = width;
    return spare;
}

/* Up to `most` rows as a left operand in the same way, in words of one number always in `spare`, (most, depth). */
static inline const operand *left_of(const number *x, int64_t *stride, int64_t rows, int64_t most, int64_t depth,
                                     operand *spare) {
#if IN_WORD == 2
    return strip_of(x, stride, rows, most, depth, spare);
#else
    for (int64_t i = 0; i < most; i++)
        if (i < rows) widen_many(x + i * *stride, depth, spare + i * depth);
        else memset(spare + i * depth, 0, sizeof *spare * depth);
    *stride = depth;
    return spare;
#endif
}

/* A right operand, whose 16 columns at a time are next to each other. x: (rows, columns), multiples of STEP. */
static inline void as_right(const operand *x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t *y,
                            int64_t y_stride) {
#if IN_WORD == 2
    for (int64_t i = 0; i < rows; i += 2, x += 2 * x_stride, y += y_stride)
        for (int64_t j = 0; j < columns; j += STEP) lay_rows(x + j, x_stride, y + j, y + j + SIDE);
#else
    for (int64_t i = 0; i < rows; i++) memcpy(y + i * y_stride, x + i * x_stride, 4 * columns);
#endif
}

/* A left operand, x^T. x: (rows, columns), multiples of STEP; paired: (rows, columns), of operands. */
static inline void as_left_across(const operand *x, int64_t x_stride, int64_t rows, int64_t columns, uint32_t *paired,
                                  uint32_t *y, int64_t y_stride) {
#if IN_WORD == 2
    as_right(x, x_stride, rows, columns, paired, columns);
    transpose(paired, columns, rows / 2, columns, y, y_stride);
#else
    (void)paired;
    transpose((const uint32_t *)x, x_stride, rows, columns, y, y_stride);
#endif
}

/* 16 columns of a right operand, 32 deep, from numbers of a column next to each other. */
static inline void lay_across(const number *b, int64_t column, uint32_t *to) {
#if IN_WORD == 2
    turn((const uint32_t *)b, column / 2, to, SIDE);
#else
    float wide[SIDE * STEP];
    for (int j = 0; j < SIDE; j++) widen_many(b + j * column, STEP, wide + j * STEP);
    for (int k = 0; k < STEP; k += SIDE) turn((uint32_t *)wide + k, STEP, to + k * SIDE, SIDE);
#endif
}

/* 32 columns of a right operand, 32 deep. b: with the strides of both; one of them is 1. */
static inline void lay_block(const number *b, int64_t b_row, int64_t b_column, uint32_t *to, int64_t half) {
    if (b_column == 1)
        for (int i = 0; i < DEEP; i++, b += IN_WORD * b_row, to += SIDE) lay_rows(b, b_row, to, to + half);
    else
        for (int side = 0; side < 2; side++, b += SIDE * b_column, to += half) lay_across(b, b_column, to);
}

/* Some of a right operand in a panel, from one of its `steps` on. */
static inline void lay_panel(const number *b, int64_t b_row, int64_t b_column, int64_t depth, int64_t columns,
                             uint32_t *panel, int64_t steps, int64_t step) {
    int64_t inner = b_column == 1 ? columns : depth, outer = depth + columns - inner; /* read as they lie */
    for (int64_t x = 0; x < outer; x += STEP)
        for (int64_t z = 0; z < inner; z += STEP) {
            int64_t k = b_column == 1 ? x : z, j = b_column == 1 ? z : x;
            Right to = in_panel(panel, steps, j / STEP, step + k / STEP);
            lay_block(b + k * b_row + j * b_column, b_row, b_column, to.at, to.half);
        }
}
#endif
