/* Draws a token from logits: one sweep for each of the sums, none sorted. */
#pragma once
#include "kernels.h"

#define NUCLEUS_DEPTH 32 /* that the logits of a nucleus lie apart at most */

/* weights = 2^(factor (z - largest)) where z is not below `low`, else 0; their sum. */
static float powers(const float *z, int64_t size, float largest, float factor, float low, float *weights) {
    SimdF32 sums = {0};
    for (int64_t j = 0; j < size; j += LANES) {
        SimdF32 x = simd_load(z + j), power = simd_exp2(factor * (x - largest));
        power = (SimdF32)((SimdU32)power & ~(SimdU32)(x < low)); /* NaN stays */
        simd_store(power, weights + j), sums += power;
    }
    return simd_sum(sums);
}

/* The smallest logit of the nucleus, within 2^-20 of NUCLEUS_DEPTH. */
static float nucleus_end(int64_t size, float largest, float mass, const float *weights) {
    float low = largest - NUCLEUS_DEPTH, high = largest;
    for (int step = 0; step < 20; step++) {
        float middle = low + (high - low) / 2, least = exp2f(LOG2E * (middle - largest));
        SimdF32 sums[2] = {0}; /* that do not wait for each other */
        for (int64_t j = 0; j < size; j += 2 * LANES)
            for (int k = 0; k < 2; k++) {
                SimdF32 x = simd_load(weights + j + k * LANES);
                sums[k] += (SimdF32)((SimdU32)x & (SimdU32)(x >= least));
            }
        if (simd_sum(sums[0] + sums[1]) >= mass) low = middle;
        else high = middle;
    }
    return low;
}

/* A token: the likeliest, or above a temperature of 0 one of the nucleus, by a number between 0 and 1. */
static void draw(const DecodeArgs *g, int64_t i) {
    const float *z = g->logits + i * g->head.columns;
    int64_t size = g->head.columns, token = 0;
    float largest = simd_largest(z, size), low = -INFINITY, *weights;
    if (!SCRATCH(BUFFER(weights, size))) return;
    while (token < size - 1 && z[token] != largest) token++;
    float total = powers(z, size, largest, LOG2E, low, weights);
    if (g->temperature[i] > 0) {
        if (g->top_p[i] < 1) low = nucleus_end(size, largest, g->top_p[i] * total, weights);
        float left = g->uniform[i] * powers(z, size, largest, LOG2E / g->temperature[i], low, weights);
        for (int64_t j = 0; j < size; j += LANES) {
            float sum = simd_sum(simd_load(weights + j));
            if (left >= sum) {
                left -= sum;
                continue;
            }
            for (token = j; token < size - 1 && (left -= weights[token]) >= 0;) token++;
            break;
        }
    }
    g->token[i] = token, g->logprob[i] = z[token] - largest - logf(total);
}
