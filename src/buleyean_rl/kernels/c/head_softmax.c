/* The output head's softmax, and the mean of W's rows by it, in one pass over the vocabulary: no logits are stored.
 *
 * Of some nodes, of the logits z = W h: sum e^z, and sum e^z w over the same powers as they are rounded for the product, w
 * being a row of W (online softmax: exponents are less a node's row_max). The gradient of any multiples of a model's and a
 * reference's softmax is made of these means. Threads share the vocabulary.
 */
#include "gemm.h"

#define NODES 256 /* at a time, and PART rows of W: what belongs to them fits in L2 */
#define PART 384
#define POWERS_STRIDE (PART + BLOCK) /* no power of 2, which would drive lines from the cache */
#define MASKED -1e30f
#define MARGIN 40 /* powers of 2 by which a logit may exceed its node's row_max */

/* What a thread summed of some nodes, in powers of 2: powers, the same as they are rounded, and by those rows of W, (NODES,
 * width). */
typedef struct { float row_max[NODES], sum_exp[NODES], sum_rounded[NODES], *sums; } Share;

/* Makes what was summed of a node smaller, and the `done` powers of this part: (NODES, POWERS_STRIDE). */
static void rescale(Share *share, int64_t node, float factor, int64_t width, Packed *powers, int64_t done) {
    share->sum_exp[node] *= factor, share->sum_rounded[node] *= factor;
    for (int64_t j = 0; j < width; j++) share->sums[node * width + j] *= factor;
    for (int64_t j = 0; j < done; j++) powers[node * POWERS_STRIDE + j] = scale_packed(factor, powers[node * POWERS_STRIDE + j]);
}

/* The powers of 32 logits at a vector's nodes, and what they add to the share, unless one is well above row_max: then that is
 * raised first. logits: (32, 32); words: (BLOCK_WORDS, 16). */
INLINE void add_powers(Share *share, const float *logits, int64_t node, float scale, int64_t width, uint32_t *words,
                       Packed *powers, int64_t done, uintptr_t ahead, int64_t prefetched) {
    SimdF32 sum_exp, rounded;
    for (int raised = 0;; raised = 1) {
        SimdF32 row_max = simd_load(share->row_max + node), above = {0};
        sum_exp = rounded = above;
        for (int pair = 0; pair < TILE; pair++) {
            SimdF32 power[2];
            for (int odd = 0; odd < 2; odd++) {
                SimdF32 logit = scale * simd_load(logits + (2 * pair + odd) * BLOCK) - row_max;
                above = simd_max(logit, above); /* without NaN, which is in the sums */
                power[odd] = simd_exp2(logit);
                sum_exp += power[odd];
            }
            uint32_t *to = words + 2 * pair / VNNI * TILE;
            pack_b_f32(power[0], power[1], to, TILE);
            rounded = add_b(rounded, to, TILE);
            for (int64_t i = 0; i < prefetched; i += BLOCK) PREFETCH_L2(ahead + (pair * prefetched + i) * sizeof(bf16));
        }
        if (raised || !simd_any_above(above, MARGIN)) break;
        for (int j = 0; j < LANES; j++) {
            if (!(above[j] > MARGIN)) continue;
            float whole = floorf(above[j]); /* so that powers are not rounded anew */
            rescale(share, node + j, exp2f(-whole), width, powers, done);
            share->row_max[node + j] += whole;
        }
    }
    simd_store(simd_load(share->sum_exp + node) + sum_exp, share->sum_exp + node);
    simd_store(simd_load(share->sum_rounded + node) + rounded, share->sum_rounded + node);
}

/* Packs rows of W as b, VNNI at a time, between the micro-kernel's steps with the same rows. */
typedef struct { const bf16 *w; int64_t width; uint32_t *panel; int64_t block, next, end, count; } Packing;

INLINE void pack_some(void *state) {
    Packing *p = state;
    for (int64_t i = 0; i < p->count && p->next < p->end; i++, p->next++) {
        int64_t row = p->next % BLOCK_WORDS, columns = p->next / BLOCK_WORDS;
        PackedB to = panel_block(p->panel, PART / BLOCK, columns, p->block);
        uint32_t *words = to.words + row * TILE;
        pack_b_row(p->w + row * VNNI * p->width + columns * BLOCK, p->width, words, words + to.tile_stride);
    }
}

/* The rows of the sums that come next. */
typedef struct { uintptr_t address; int64_t row_bytes; } Ahead;

INLINE void prefetch_sums(void *state) {
    Ahead *a = state;
    for (int row = 0; row < (BLOCK * BLOCK + PART - 1) / PART; row++, a->address += a->row_bytes) {
        PREFETCH_L1(a->address);
        PREFETCH_L1(a->address + 64);
    }
}

/* Rows [first, end) of W, at up to NODES nodes from `start` on, whose rejections are [rejection, rejections). */
static int sum_share(const HeadSoftmaxArgs *g, Share *share, int64_t first, int64_t end, int64_t start, int64_t rejection,
                     int64_t rejections) {
    int64_t width = g->width, nodes = smaller(g->nodes - start, NODES), padded = round_up(nodes, BLOCK), *here;
    int64_t prefetched = width * BLOCK / padded, packed = (BLOCK_WORDS * BLOCK + padded - 1) / padded;
    float scale = LOG2E * g->scale, *logits;
    uint32_t *panel, *w_panel;
    Packed *powers, *strip;
    bf16 *states;
    if (!SCRATCH(BUFFER(states, NODES * width), BUFFER(panel, NODES * width / VNNI), BUFFER(w_panel, PART / VNNI * width),
                 BUFFER(logits, BLOCK * BLOCK), BUFFER(powers, NODES * POWERS_STRIDE), BUFFER(strip, BLOCK * width),
                 BUFFER(here, rejections - rejection)))
        return 1;
    for (int j = 0; j < NODES; j++) share->row_max[j] = MASKED, share->sum_exp[j] = share->sum_rounded[j] = 0;
    memset(share->sums, 0, sizeof *share->sums * NODES * width);
    memset(states, 0, sizeof *states * NODES * width);
    memcpy(states, g->hidden + start * width, sizeof *states * nodes * width);
    TileConfig before;
    amx_begin(&before);
    pack_b_panel((Matrix){states, 1, width}, width, padded, panel, width / BLOCK, 0);
    for (int64_t part = first; part < end; part += PART) {
        int64_t rows = smaller(end - part, PART), count = 0;
        for (int64_t i = rejection; i < rejections; i++)
            if (g->rejected_token[i] >= part && g->rejected_token[i] < part + rows) here[count++] = i;
        for (int64_t done = 0; done < rows; done += BLOCK) {
            const bf16 *w = g->weight + (part + done) * width;
            uintptr_t ahead = ADDRESS(w) + BLOCK * width * sizeof *w;
            int64_t stride = width;
            const Packed *a = pack_a(w, &stride, BLOCK, BLOCK, width, strip);
            Packing packing = {w, width, w_panel, done / BLOCK, 0, width / BLOCK * BLOCK_WORDS, packed};
            for (int64_t node = 0; node < padded; node += BLOCK) {
                AMX_FENCE;
                PackedB b = panel_block(panel, width / BLOCK, node / BLOCK, 0);
                Accumulator acc = acc_load(NULL, 0, logits, BLOCK);
                microkernel(&acc, a, stride, BLOCK, b, 1, width / BLOCK, pack_some, &packing);
                acc_store(&acc);
                AMX_FENCE;
                for (int64_t i = 0; i < count; i++) {
                    int64_t row = g->rejected_token[here[i]] - part - done;
                    int64_t column = g->rejected_node[here[i]] - start - node;
                    if (row >= 0 && row < BLOCK && column >= 0 && column < BLOCK) logits[row * BLOCK + column] = MASKED / scale;
                }
                for (int half = 0; half < BLOCK; half += TILE, ahead += TILE * prefetched * sizeof *w) {
                    uint32_t words[TILE_WORDS], *to = (uint32_t *)(powers + (node + half) * POWERS_STRIDE + done);
                    for (int lane = half; lane < half + TILE; lane += LANES) {
                        if (part + done == first) {
                            SimdF32 row_max = simd_set(MASKED);
                            for (int row = 0; row < BLOCK; row++)
                                row_max = simd_max(scale * simd_load(logits + row * BLOCK + lane), row_max);
                            simd_store(row_max, share->row_max + node + lane);
                        }
                        add_powers(share, logits + lane, node + lane, scale, width, words + lane - half, powers, done, ahead,
                                   lane == half ? prefetched : 0);
                    }
                    for (int k = 0; k < BLOCK_WORDS; k += TILE)
                        transpose16(words + k * TILE, TILE, to + k, POWERS_STRIDE / VNNI);
                }
            }
        }
        AMX_FENCE;
        for (int64_t node = 0; node < padded; node += BLOCK)
            for (int64_t j = 0; j < width; j += BLOCK) {
                float *sums = share->sums + node * width + j;
                int64_t next = j + BLOCK < width ? BLOCK : BLOCK * width - j;
                Ahead coming = {ADDRESS(sums) + next * sizeof *sums, width * (int64_t)sizeof *sums};
                PackedB b = panel_block(w_panel, PART / BLOCK, j / BLOCK, 0);
                Accumulator acc = acc_load(sums, width, sums, width);
                microkernel(&acc, powers + node * POWERS_STRIDE, POWERS_STRIDE, BLOCK, b, 1, rows / BLOCK, prefetch_sums,
                            &coming);
                acc_store(&acc);
            }
        AMX_FENCE;
    }
    amx_end(&before);
    return 0;
}

/* Adds the threads' shares up at a node. */
static void add_shares(const HeadSoftmaxArgs *g, const Share *shares, int threads, int64_t start, int64_t node) {
    float sum_exp = 0, rounded = 0, row_max = MASKED, *mean = g->mean + (start + node) * g->width;
    memset(mean, 0, sizeof *mean * g->width);
    for (int t = 0; t < threads; t++) row_max = fmaxf(shares[t].row_max[node], row_max);
    for (int t = 0; t < threads; t++) {
        float factor = exp2f(shares[t].row_max[node] - row_max);
        sum_exp += factor * shares[t].sum_exp[node], rounded += factor * shares[t].sum_rounded[node];
        for (int64_t j = 0; j < g->width; j++) mean[j] += factor * shares[t].sums[node * g->width + j];
    }
    for (int64_t j = 0; j < g->width; j++) mean[j] *= 1 / rounded;
    g->row_max[start + node] = LN2 * row_max, g->sum_exp[start + node] = sum_exp;
}

int head_softmax(const HeadSoftmaxArgs *g, int threads) {
    int64_t parts = (g->vocabulary + PART - 1) / PART, size = NODES * g->width, rejection = 0, next = 0;
    int failed = 0;
    Share *shares = allocate(threads * (int64_t)sizeof *shares);
    float *sums = allocate(threads * size * (int64_t)sizeof *sums);
    failed = !shares || !sums;
    for (int64_t start = 0; start < g->nodes && !failed; start += NODES, rejection = next) {
        while (next < g->rejections && g->rejected_node[next] < start + NODES) next++;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : failed)
        for (int t = 0; t < threads; t++) {
            shares[t].sums = sums + t * size;
            failed |= sum_share(g, shares + t, parts * t / threads * PART,
                                smaller(parts * (t + 1) / threads * PART, g->vocabulary), start, rejection, next);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t node = 0; node < smaller(g->nodes - start, NODES); node++)
            if (!failed) add_shares(g, shares, threads, start, node);
    }
    free(shares);
    free(sums);
    return failed ? OUT_OF_MEMORY : OK;
}
