/* GGUF's blocks --> bf16, 32 numbers of a row at a time: what an old kind's block has of them, and an eighth of a K-quant's. */
#pragma once
#include "kernels.h"

static inline float half_to_f32(const uint8_t *x) {
    uint16_t bits;
    memcpy(&bits, x, sizeof bits);
    return _cvtsh_ss(bits);
}

static inline __m256i nibbles(__m256i bytes, int shift) {
    return _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8(15));
}

/* A number is q times its half's factor, plus an offset. */
static inline void dequantise_32(int64_t kind, const uint8_t *row, int64_t column, bf16 *to) {
    __m256i q;
    float factors[2], offset = 0;
    int8_t numbers[48]; /* of which the last are read, not used */
    int64_t eighth = column % 256 / 32;
    if (kind == Q8_0) {
        const uint8_t *block = row + column / 32 * 34;
        factors[0] = factors[1] = half_to_f32(block);
        q = _mm256_loadu_si256((const __m256i *)(block + 2));
    } else if (kind == Q4_0 || kind == Q4_1) {
        int64_t header = kind == Q4_1 ? 4 : 2;
        const uint8_t *block = row + column / 32 * (header + 16);
        __m128i bytes = _mm_loadu_si128((const __m128i *)(block + header));
        factors[0] = factors[1] = half_to_f32(block);
        offset = kind == Q4_1 ? half_to_f32(block + 2) : -8 * factors[0];
        q = nibbles(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), 0);
    } else if (kind == Q4_K) { /* scales and minima have 6 bits; of the last four the upper two lie in the first four's bytes */
        const uint8_t *block = row + column / 256 * 144, *s = block + 4 + eighth % 4;
        int scale = eighth < 4 ? s[0] & 63 : (s[8] & 15) | s[0] >> 6 << 4;
        int minimum = eighth < 4 ? s[4] & 63 : s[8] >> 4 | s[4] >> 6 << 4;
        factors[0] = factors[1] = half_to_f32(block) * (float)scale;
        offset = -(half_to_f32(block + 2) * (float)minimum);
        q = nibbles(_mm256_loadu_si256((const __m256i *)(block + 16 + eighth / 2 * 32)), (int)(eighth % 2 * 4));
    } else { /* Q6_K: 4 bits of a number in one place, 2 in another, a scale for 16 of them */
        const uint8_t *block = row + column / 256 * 210, *low = block + eighth / 4 * 64 + eighth % 2 * 32;
        const int8_t *scales = (const int8_t *)block + 192 + 2 * eighth;
        __m256i high = nibbles(_mm256_loadu_si256((const __m256i *)(block + 128 + eighth / 4 * 32)), (int)(eighth % 4 * 2));
        high = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4);
        for (int i = 0; i < 2; i++) factors[i] = half_to_f32(block + 208) * (float)scales[i];
        q = _mm256_or_si256(nibbles(_mm256_loadu_si256((const __m256i *)low), (int)(eighth % 4 / 2 * 4)), high);
        q = _mm256_sub_epi8(q, _mm256_set1_epi8(32));
    }
    _mm256_storeu_si256((__m256i *)numbers, q);
    for (int j = 0; j < 32; j += 2 * LANES) {
        SimdF32 x[2];
        for (int half = 0, k = j; half < 2; half++, k += LANES) {
            SimdF32 number = MM(cvtepi32_ps)(MM(cvtepi8_epi32)(_mm_loadu_si128((const __m128i *)(numbers + k))));
            x[half] = MM(fmadd_ps)(number, simd_set(factors[k / 16]), simd_set(offset));
        }
        simd_store_bf16(x[0], x[1], to + j);
    }
}

/* `count` rows, a multiple of 32, and `width` columns, from a place on; rows of 32 are of one kind. to: (count, width). */
static inline void dequantise_part(const QuantisedRows *x, int64_t row, int64_t count, int64_t column, int64_t width, bf16 *to) {
    for (int64_t i = row, part = 0; i < row + count; i++) {
        while (i >= x->ends[part]) part++;
        const uint8_t *from = x->data[part] + (i - (part ? x->ends[part - 1] : 0)) * x->bytes[part];
        for (int64_t j = 0; j < width; j += 32, to += 32) dequantise_32(x->kinds[part], from, column + j, to);
    }
}
