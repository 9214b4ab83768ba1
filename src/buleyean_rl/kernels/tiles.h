/* Tiles of a processor's matrix registers (AMX), and how bf16 lies in memory for them.
 *
 * A tile is 16 rows of 16 words; a word is a float, or two numbers. A left operand's words hold neighbours of a row, a
 * right operand's neighbours of a column. Where there are no such registers plain loops stand for them, for tests.
 */
#ifndef TILES_H
#define TILES_H
#define _GNU_SOURCE
#include <string.h>

#include "numbers.h"

#define SIDE 16 /* of a tile: 16 rows of 16 floats or of 32 bf16 */
#define STEP (2 * SIDE)
#define TILE (SIDE * SIDE)
#define BLOCK (STEP * STEP)
#define LOG2E 1.44269504f
#define LN2 0.693147181f

/* A vector register's floats; they are read from any place and put there. */
typedef float Lanes __attribute__((vector_size(4 * SIDE), aligned(4), may_alias));
static inline Lanes lanes(const float *from) { return *(const Lanes *)from; }
static inline void put(Lanes x, float *to) { *(Lanes *)to = x; }

#ifdef __AMX_BF16__
#include <immintrin.h>

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

#define CLEAR(tile) _tile_zero(tile)
#define LOAD(tile, from, stride) _tile_loadd(tile, from, 4 * (stride))
#define STREAM(tile, from, stride) _tile_stream_loadd(tile, from, 4 * (stride)) /* does not drive others from the cache */
#define STORE(tile, to, stride) _tile_stored(tile, to, 4 * (stride))
#define DOT(sum, a, b) _tile_dpbf16ps(sum, a, b)

static inline Lanes larger(Lanes x, Lanes y) { return _mm512_max_ps(x, y); }
static inline Lanes nearest(Lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Lanes times_power_of_2(Lanes x, Lanes power) { return _mm512_scalef_ps(x, power); }

/* Two vectors as one row of numbers. */
static inline void narrow_row(Lanes left, Lanes right, number *to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(right, left));
}

/* Two vectors as words, one number of either in each. */
static inline void narrow_pairs(Lanes even, Lanes odd, uint32_t *to) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

/* Numbers added to sums, both of a word to one. */
static inline Lanes add_pairs(Lanes sums, const uint32_t *words) {
    return _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(words), (__m512bh)_mm512_set1_epi16(0x3f80)); /* 1 */
}

/* The product of two rows of numbers, a multiple of STEP. */
static inline float dot_rows(const number *x, const number *y, int64_t size) {
    __m512 sums = _mm512_setzero_ps();
    for (int64_t j = 0; j < size; j += STEP)
        sums = _mm512_dpbf16_ps(sums, (__m512bh)_mm512_loadu_si512(x + j), (__m512bh)_mm512_loadu_si512(y + j));
    return _mm512_reduce_add_ps(sums);
}

/* STEP words of two rows of numbers, in two parts. */
static inline void pair(const number *even, const number *odd, uint32_t *left, uint32_t *right) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* a register is unpacked by quarters */
    __m512i low = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(even));
    __m512i high = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(odd));
    _mm512_storeu_si512(left, _mm512_unpacklo_epi16(low, high));
    _mm512_storeu_si512(right, _mm512_unpackhi_epi16(low, high));
}

/* y = x^T, a tile. */
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

#else
typedef int Configuration;

static _Thread_local uint32_t registers[8][SIDE][SIDE];

static inline void take_tiles(Configuration *before) { *before = 0; }
static inline void leave_tiles(const Configuration *before) { (void)before; }

static inline void load(int tile, const void *from, int64_t stride) {
    for (int i = 0; i < SIDE; i++) memcpy(registers[tile][i], (const uint32_t *)from + i * stride, 4 * SIDE);
}

static inline void store(int tile, void *to, int64_t stride) {
    for (int i = 0; i < SIDE; i++) memcpy((uint32_t *)to + i * stride, registers[tile][i], 4 * SIDE);
}

static inline void dot(int sum, int a, int b) {
    for (int i = 0; i < SIDE; i++)
        for (int k = 0; k < SIDE; k++)
            for (int j = 0; j < SIDE; j++) {
                uint32_t x = registers[a][i][k], y = registers[b][k][j];
                float value;
                memcpy(&value, &registers[sum][i][j], 4);
                value += widen((number)x) * widen((number)y) + widen((number)(x >> 16)) * widen((number)(y >> 16));
                memcpy(&registers[sum][i][j], &value, 4);
            }
}

#define SETTLE
#define CLEAR(tile) memset(registers[tile], 0, sizeof registers[tile])
#define LOAD(tile, from, stride) load(tile, from, stride)
#define STREAM LOAD
#define STORE(tile, to, stride) store(tile, to, stride)
#define DOT(sum, a, b) dot(sum, a, b)

static inline Lanes larger(Lanes x, Lanes y) {
    for (int i = 0; i < SIDE; i++) x[i] = x[i] > y[i] ? x[i] : y[i];
    return x;
}

static inline Lanes nearest(Lanes x) {
    for (int i = 0; i < SIDE; i++) x[i] = rintf(x[i]);
    return x;
}

static inline Lanes times_power_of_2(Lanes x, Lanes power) {
    for (int i = 0; i < SIDE; i++) x[i] = power[i] < -200 ? 0 : ldexpf(x[i], (int)power[i]);
    return x;
}

static inline void narrow_row(Lanes left, Lanes right, number *to) {
    for (int i = 0; i < SIDE; i++) to[i] = narrow(left[i]), to[SIDE + i] = narrow(right[i]);
}

static inline void narrow_pairs(Lanes even, Lanes odd, uint32_t *to) {
    for (int i = 0; i < SIDE; i++) to[i] = narrow(even[i]) | (uint32_t)narrow(odd[i]) << 16;
}

static inline Lanes add_pairs(Lanes sums, const uint32_t *words) {
    for (int i = 0; i < SIDE; i++) sums[i] += widen((number)words[i]) + widen((number)(words[i] >> 16));
    return sums;
}

static inline float dot_rows(const number *x, const number *y, int64_t size) {
    float sum = 0;
    for (int64_t j = 0; j < size; j++) sum += widen(x[j]) * widen(y[j]);
    return sum;
}

static inline void pair(const number *even, const number *odd, uint32_t *left, uint32_t *right) {
    for (int i = 0; i < SIDE; i++) {
        left[i] = even[i] | (uint32_t)odd[i] << 16;
        right[i] = even[SIDE + i] | (uint32_t)odd[SIDE + i] << 16;
    }
}

static inline void turn(const uint32_t *x, int64_t x_stride, uint32_t *y, int64_t y_stride) {
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++) y[i * y_stride + j] = x[j * x_stride + i];
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

/* A multiple of STEP floats as numbers. */
static inline void narrow_many(const float *x, int64_t size, number *to) {
    for (int64_t i = 0; i < size; i += STEP) narrow_row(lanes(x + i), lanes(x + i + SIDE), to + i);
}

int has_tiles(void); /* whether the system lets this process use them */

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

/* Two rows of numbers in each row of words. x: (2 * pairs, columns), a multiple of STEP */
static inline void pair_rows(const number *x, int64_t x_stride, int64_t pairs, int64_t columns, uint32_t *y,
                             int64_t y_stride) {
    for (int64_t i = 0; i < pairs; i++, x += 2 * x_stride, y += y_stride)
        for (int64_t j = 0; j < columns; j += STEP) pair(x + j, x + x_stride + j, y + j, y + j + SIDE);
}

/* The same across: two neighbours of a column in a word, a left operand. y: (columns, pairs); paired: (pairs, columns) */
static inline void pair_across(const number *x, int64_t x_stride, int64_t pairs, int64_t columns, uint32_t *paired,
                               uint32_t *y, int64_t y_stride) {
    pair_rows(x, x_stride, pairs, columns, paired, columns);
    transpose(paired, columns, pairs, columns, y, y_stride);
}

static inline void clear_sums(void) {
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
}

static inline void load_sums(const float *from, int64_t stride) {
    LOAD(0, from, stride);
    LOAD(1, from + SIDE, stride);
    LOAD(2, from + SIDE * stride, stride);
    LOAD(3, from + SIDE * stride + SIDE, stride);
}

static inline void store_sums(float *to, int64_t stride) {
    STORE(0, to, stride);
    STORE(1, to + SIDE, stride);
    STORE(2, to + SIDE * stride, stride);
    STORE(3, to + SIDE * stride + SIDE, stride);
}

#define INLINE static inline __attribute__((always_inline))

INLINE void nothing(void *unused) { (void)unused; }

/* Products of 32 rows of `a` with 32 columns of a panel, added to the sums. At every step the core does something beside
 * its matrix registers: `meanwhile`, of which it has the time of some hundred instructions. */
INLINE void add_dots(const number *a, int64_t stride, const uint32_t *b, int64_t steps, void (*meanwhile)(void *),
                     void *state) {
    for (int64_t step = 0; step < steps; step++, a += STEP, b += 2 * TILE) {
        STREAM(6, b, SIDE);
        LOAD(4, a, stride / 2);
        STREAM(7, b + TILE, SIDE);
        LOAD(5, a + SIDE * stride, stride / 2);
        DOT(0, 4, 6);
        DOT(1, 4, 7);
        DOT(2, 5, 6);
        DOT(3, 5, 7);
        meanwhile(state);
    }
}

/* Two tiles of a right operand. b: (STEP, STEP), with the strides of both; one of them is 1. */
static inline void lay_tiles(const number *b, int64_t b_row, int64_t b_column, uint32_t *to) {
    if (b_column == 1)
        for (int64_t i = 0; i < SIDE; i++, b += 2 * b_row, to += SIDE) pair(b, b + b_row, to, to + TILE);
    else
        for (int side = 0; side < 2; side++, b += SIDE * b_column, to += TILE)
            turn((const uint32_t *)b, b_column / 2, to, SIDE);
}

/* Some of a right operand as tiles, the depth first, `steps` of it from one 32 columns to the next. */
static inline void lay_panel(const number *b, int64_t b_row, int64_t b_column, int64_t depth, int64_t columns,
                             uint32_t *to, int64_t steps) {
    int64_t inner = b_column == 1 ? columns : depth, outer = depth + columns - inner; /* read as they lie */
    for (int64_t x = 0; x < outer; x += STEP)
        for (int64_t z = 0; z < inner; z += STEP) {
            int64_t k = b_column == 1 ? x : z, j = b_column == 1 ? z : x;
            lay_tiles(b + k * b_row + j * b_column, b_row, b_column, to + 2 * TILE * (j / STEP * steps + k / STEP));
        }
}
#endif
