/* The output head's softmax, and the mean of W's rows by it, in one pass over the vocabulary, in bf16 and block by block.
 *
 * Of some nodes, of the logits z = W h: sum e^z, and sum e^z w over the same powers as they are rounded for the product,
 * where w is a row of W. Exponents are less a node's `most`, one of its largest logits. The gradient of any multiples of a
 * model's and a reference's softmax is made of their means, and nothing of single tokens is kept. Threads share the
 * vocabulary.
 */
#include "tile.h"

#define NODES 256 /* that are worked on at a time, and rows of W: what belongs to them fits in a core's second cache */
#define PART 384
#define POWERS (PART + STEP) /* from a node's to the next's: no power of 2, which would drive lines from the cache */
#define UNLIKELY -1e30f
#define MARGIN 40 /* powers of 2 by which a logit may be above its node's `most` */

/* What a thread has summed of some nodes: powers, those that are rounded, and by them rows of W, (NODES, width). All that is
 * of logits is in powers of 2. */
typedef struct { float most[NODES], totals[NODES], rounded[NODES], *sums; } Share;

/* What was summed of a node, and what of this part is to be, times a factor. `powers`: (NODES, POWERS), of which there are
 * `done`. */
static void rescale(Share *share, int64_t node, float factor, int64_t width, operand *powers, int64_t done) {
    share->totals[node] *= factor, share->rounded[node] *= factor;
    for (int64_t j = 0; j < width; j++) share->sums[node * width + j] *= factor;
    for (int64_t j = 0; j < done; j++) powers[node * POWERS + j] = times(factor, powers[node * POWERS + j]);
}

/* The first `most` of a vector's nodes: the largest of STEP logits. */
static void set_most(Share *share, const float *logits, int64_t node, float scale) {
    Lanes most = {0};
    most += UNLIKELY;
    for (int row = 0; row < STEP; row++) most = larger(most, scale * lanes(logits + row * STEP));
    put(most, share->most + node);
}

/* The powers of STEP logits at a vector's nodes, and what they add to the share, unless one is well above `most`: then that
 * is raised first. logits: (STEP, STEP); words: (DEEP, SIDE); powers: (NODES, POWERS), of which there are `done`. Meanwhile
 * numbers from `ahead` on come to the second cache. */
INLINE void take_powers(Share *share, const float *logits, int64_t node, float scale, int64_t width, uint32_t *words,
                        operand *powers, int64_t done, const number *ahead, int64_t fetched) {
    Lanes total, rounded;
    for (int raised = 0;; raised = 1) {
        Lanes most = lanes(share->most + node), above = {0};
        total = rounded = above;
        for (int pair = 0; pair < SIDE; pair++, ahead += fetched) {
            Lanes power[2];
            for (int odd = 0; odd < 2; odd++) {
                Lanes logit = scale * lanes(logits + (2 * pair + odd) * STEP) - most;
                above = larger(above, logit);
                power[odd] = power_of_2(logit);
                total += power[odd];
            }
            uint32_t *to = words + 2 * pair / IN_WORD * SIDE;
            operand_rows(power[0], power[1], to, SIDE);
            rounded = add_rows(rounded, to, SIDE);
            for (int64_t i = 0; i < fetched; i += STEP) __builtin_prefetch(ahead + i, 0, 2);
        }
        int too_large = 0;
        for (int j = 0; j < LANES; j++) too_large |= above[j] > MARGIN;
        if (raised || !too_large) break;
        for (int j = 0; j < LANES; j++) {
            if (above[j] <= MARGIN) continue;
            float whole = floorf(above[j]); /* so that powers are not rounded anew */
            rescale(share, node + j, exp2f(-whole), width, powers, done);
            share->most[node + j] += whole;
        }
    }
    put(lanes(share->totals + node) + total, share->totals + node);
    put(lanes(share->rounded + node) + rounded, share->rounded + node);
}

/* Rows of W, as many as a word has numbers, that become rows of a right operand while there are products of the same rows,
 * some at a step. */
typedef struct { const number *strip; int64_t width; uint32_t *panel; int64_t step, next, end, some; } Laying;

INLINE void lay_some(void *state) {
    Laying *l = state;
    for (int64_t i = 0; i < l->some && l->next < l->end; i++, l->next++) {
        int64_t row = l->next % DEEP, group = l->next / DEEP;
        Right to = in_panel(l->panel, PART / STEP, group, l->step);
        to.at += row * SIDE;
        lay_rows(l->strip + row * IN_WORD * l->width + group * STEP, l->width, to.at, to.at + to.half);
    }
}

/* Rows of the sums that are loaded next: they come to the first cache, some at a step. */
typedef struct { const float *at; int64_t width; } Coming;

INLINE void fetch_sums(void *state) {
    Coming *c = state;
    for (int row = 0; row < (STEP * STEP + PART - 1) / PART; row++, c->at += c->width) {
        __builtin_prefetch(c->at);
        __builtin_prefetch(c->at + SIDE);
    }
}

/* A share of the vocabulary, the rows of W from `first` to `end`, at up to NODES nodes from `start` on. */
static void sum_share(Share *share, const number *weight, int64_t first, int64_t end, int64_t width,
                      const number *hidden, int64_t start, int64_t nodes, float scale, const int64_t *tokens,
                      const int64_t *node_of, int64_t entries) {
    int64_t size = NODES * width, filled_nodes = filled(nodes, STEP);
    int64_t fetched = width * STEP / filled_nodes, laid = (DEEP * STEP + filled_nodes - 1) / filled_nodes;
    uint32_t *next = own_memory(size / 2 + size / IN_WORD + size + BLOCK + PART / IN_WORD * width +
                                POWERS / IN_WORD * NODES + DEEP * width + 2 * entries);
    number *states = take(&next, size / 2);
    uint32_t *panel = take(&next, size / IN_WORD), *rows_of_w = take(&next, PART / IN_WORD * width);
    float *logits = take(&next, BLOCK);
    operand *powers = take(&next, POWERS / IN_WORD * NODES), *spare = take(&next, DEEP * width);
    share->sums = take(&next, size);
    *share = (Share){.sums = share->sums};
    for (int j = 0; j < NODES; j++) share->most[j] = UNLIKELY;
    memset(share->sums, 0, sizeof *share->sums * size);
    memset(states, 0, sizeof *states * size);
    memcpy(states, hidden + start * width, sizeof *states * nodes * width);
    int64_t *of_part = take(&next, 2 * entries);
    Configuration before;
    take_tiles(&before);
    lay_panel(states, 1, width, width, filled_nodes, panel, width / STEP, 0);
    for (int64_t part = first; part < end; part += PART) {
        int64_t rows = end - part < PART ? end - part : PART, here = 0;
        for (int64_t entry = 0; entry < entries; entry++)
            if (tokens[entry] >= part && tokens[entry] < part + rows) of_part[here++] = entry;
        for (int64_t done = 0; done < rows; done += STEP) {
            const number *strip = weight + (part + done) * width, *ahead = strip + STEP * width;
            int64_t stride = width;
            const operand *left = left_of(strip, &stride, STEP, STEP, width, spare);
            Laying laying = {strip, width, rows_of_w, done / STEP, 0, width / STEP * DEEP, laid};
            for (int64_t node = 0; node < filled_nodes; node += STEP) {
                SETTLE;
                Right right = in_panel(panel, width / STEP, node / STEP, 0);
                Sums block = begin_sums(NULL, 0, logits, STEP);
                add_dots(&block, left, stride, STEP, right, 1, width / STEP, lay_some, &laying);
                end_sums(&block);
                SETTLE;
                for (int64_t i = 0; i < here; i++) {
                    int64_t row = tokens[of_part[i]] - part - done, column = node_of[of_part[i]] - start - node;
                    if (row >= 0 && row < STEP && column >= 0 && column < STEP)
                        logits[row * STEP + column] = UNLIKELY / scale;
                }
                for (int half = 0; half < STEP; half += SIDE, ahead += SIDE * fetched) {
                    uint32_t words[HALF], *to = (uint32_t *)(powers + (node + half) * POWERS + done);
                    for (int lane = half; lane < half + SIDE; lane += LANES) {
                        if (part + done == first) set_most(share, logits + lane, node + lane, scale);
                        take_powers(share, logits + lane, node + lane, scale, width, words + lane - half, powers, done,
                                    ahead, lane == half ? fetched : 0);
                    }
                    for (int k = 0; k < DEEP; k += SIDE) turn(words + k * SIDE, SIDE, to + k, POWERS / IN_WORD);
                }
            }
        }
        SETTLE;
        for (int64_t node = 0; node < filled_nodes; node += STEP)
            for (int64_t j = 0; j < width; j += STEP) {
                float *sums = share->sums + node * width + j;
                Coming coming = {j + STEP < width ? sums + STEP : sums + STEP * width - j, width};
                Right right = in_panel(rows_of_w, PART / STEP, j / STEP, 0);
                Sums block = begin_sums(sums, width, sums, width);
                add_dots(&block, powers + node * POWERS, POWERS, STEP, right, 1, rows / STEP, fetch_sums, &coming);
                end_sums(&block);
            }
        SETTLE;
    }
    leave_tiles(&before);
}

/* Adds the shares up at a node. */
static void add_shares(const Share *shares, int threads, int64_t node, int64_t width, float *most, float *total,
                       float *mean) {
    float rounded = 0;
    *most = UNLIKELY, *total = 0;
    memset(mean, 0, 4 * width);
    for (int t = 0; t < threads; t++) *most = shares[t].most[node] > *most ? shares[t].most[node] : *most;
    for (int t = 0; t < threads; t++) {
        const float *of = shares[t].sums + node * width;
        float factor = exp2f(shares[t].most[node] - *most);
        *total += factor * shares[t].totals[node], rounded += factor * shares[t].rounded[node];
        for (int64_t j = 0; j < width; j++) mean[j] += factor * of[j];
    }
    for (int64_t j = 0; j < width; j++) mean[j] /= rounded;
    *most *= LN2;
}

/* sum e^(z - most), and the mean of W's rows by e^z, at all nodes, of all tokens but `tokens` at the nodes `node_of`, which
 * are sorted. hidden: (nodes, width); weight: (vocabulary, width), both multiples of STEP. most, total: (nodes,); mean:
 * (nodes, width). */
void head_sums(const number *weight, int64_t vocabulary, int64_t width, const number *hidden, int64_t nodes, float scale,
               const int64_t *tokens, const int64_t *node_of, int64_t entries, float *most, float *total, float *mean,
               int threads) {
    int64_t parts = (vocabulary + PART - 1) / PART, entry = 0;
    for (int64_t start = 0; start < nodes; start += NODES) {
        int64_t some = nodes - start < NODES ? nodes - start : NODES, of_tile = entry;
        while (entry < entries && node_of[entry] < start + some) entry++;
        Share shares[threads];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            int64_t first = parts * t / threads * PART, end = parts * (t + 1) / threads * PART;
            if (end > vocabulary) end = vocabulary;
            sum_share(shares + t, weight, first, end, width, hidden, start, some, LOG2E * scale, tokens + of_tile,
                      node_of + of_tile, entry - of_tile);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t node = 0; node < some; node++)
            add_shares(shares, threads, node, width, most + start + node, total + start + node,
                       mean + (start + node) * width);
    }
}
