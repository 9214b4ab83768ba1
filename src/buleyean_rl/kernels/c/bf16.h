/* What all kernels compute with: bf16 or with -DFP32 fp32 in memory, fp32 inside. */
#ifndef NUMBERS_H
#define NUMBERS_H

#include <math.h>
#include <stdint.h>

#ifdef FP32
typedef float number;
static inline float widen(number x) { return x; }
static inline number narrow(float x) { return x; }
#else
typedef uint16_t number;

static inline float widen(number x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

static inline number narrow(float x) { /* to the nearest, ties to even */
    union { float value; uint32_t bits; } u = {x};
    return (number)((u.bits + 0x7fff + ((u.bits >> 16) & 1)) >> 16);
}
#endif

static inline float exponential(float x) { /* within 2e-7 of exp(x), for x up to 88 */
    x = x < -87.0f ? -87.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 8.2902721e-3f; /* five terms with the smallest largest relative error between -ln 2 / 2 and ln 2 / 2 */
    p = p * r + 4.1898160e-2f;
    p = p * r + 1.6667638e-1f;
    p = p * r + 4.9999148e-1f;
    p = p * r + 9.9999971e-1f;
    union { float value; int32_t bits; } power = {p * r + 1.0f};
    power.bits += (int32_t)n * (1 << 23);
    return power.value;
}

#endif
