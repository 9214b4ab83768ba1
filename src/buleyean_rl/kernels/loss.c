/* The output head's softmax, and the sums its gradient is made of, in one pass over the vocabulary, in bf16 and in tiles of
 * a processor's matrix registers (AMX).
 *
 * Of some nodes, of the model's logits z = W h and the reference's z_ref, if there is one:
 *
 *     sum e^z     sum e^z_ref     sum e^z_ref (z_ref - z)     sum (e^z - e^z_ref) w     sum e^z_ref w
 *
 * where w is a row of W. Exponents are less a node's `most`, one of its largest logits, and z_ref's less its `offset` too:
 * what z_ref is above z all in all, so that the powers of both are alike and their difference is small. The gradient of any
 * multiples of the two softmaxes is made of the last two sums, and nothing of single tokens is kept. Threads share the
 * vocabulary.
 */
#include "tiles.h"

#define NODES 128 /* that are worked on at a time, and rows of W: what belongs to them fits in a core's second cache */
#define PART 384
#define POWERS (PART + STEP) /* from a node's to the next's: no power of 2, which would drive lines from the cache */
#define UNLIKELY -1e30f
#define MARGIN 40 /* powers of 2 by which a logit may be above its node's `most` */

/* What a thread has summed of some nodes; `sums` is (models, NODES, width), of rows of W. All that is of logits is in powers
 * of 2. */
typedef struct { float most[NODES], offset[NODES], totals[2 * NODES], difference[NODES], *sums; } Share;

/* What was summed of a node, and what of this part is to be, times a factor. `powers`: (models, NODES, POWERS), of which
 * there are `done`. */
static void rescale(Share *share, int64_t node, int models, float factor, int64_t width, number *powers, int64_t done) {
    share->difference[node] *= factor;
    for (int model = 0; model < models; model++) {
        int64_t row = model * NODES + node;
        share->totals[row] *= factor;
        for (int64_t j = 0; j < width; j++) share->sums[row * width + j] *= factor;
        for (int64_t j = 0; j < done; j++) powers[row * POWERS + j] = narrow(factor * widen(powers[row * POWERS + j]));
    }
}

/* The first `most` of 16 nodes: the largest of STEP logits. */
static void set_most(Share *share, const float *logits, int64_t node, int models, float scale) {
    Lanes most = {0};
    most += UNLIKELY;
    for (int model = 0; model < models; model++)
        for (int row = 0; row < STEP; row++) {
            Lanes logit = scale * lanes(logits + model * BLOCK + row * STEP);
            most = larger(most, logit - (float)model * lanes(share->offset + node));
        }
    put(most, share->most + node);
}

/* The powers of STEP logits at 16 nodes, and what they add to the share, unless one is well above `most`: then that is
 * raised first. Of a model and a reference they are the difference and the reference's. logits: (models, STEP, STEP);
 * powers: (models, NODES, POWERS), of which there are `done`. Meanwhile numbers from `ahead` on come to the second cache. */
INLINE void take_powers(Share *share, const float *logits, int64_t node, int models, float scale, int64_t width,
                        number *powers, int64_t done, const number *ahead, int64_t fetched) {
    Lanes total, base_total, difference;
    uint32_t words[2][TILE];
    for (int raised = 0;; raised = 1) {
        Lanes most = lanes(share->most + node), base_most = most + lanes(share->offset + node), above = {0};
        total = base_total = difference = above;
        for (int pair = 0; pair < SIDE; pair++, ahead += fetched) {
            Lanes power[2], base_power[2];
            for (int odd = 0; odd < 2; odd++) {
                const float *of_row = logits + (2 * pair + odd) * STEP;
                Lanes logit = scale * lanes(of_row);
                above = larger(above, logit - most);
                power[odd] = power_of_2(logit - most);
                total += power[odd];
                if (models == 1) continue;
                Lanes base_logit = scale * lanes(of_row + BLOCK);
                above = larger(above, base_logit - base_most);
                base_power[odd] = power_of_2(base_logit - base_most);
                base_total += base_power[odd];
                difference += base_power[odd] * (base_logit - logit);
                power[odd] -= base_power[odd];
            }
            narrow_pairs(power[0], power[1], words[0] + pair * SIDE);
            if (models == 2) narrow_pairs(base_power[0], base_power[1], words[1] + pair * SIDE);
            for (int64_t i = 0; i < fetched; i += STEP) __builtin_prefetch(ahead + i, 0, 2);
        }
        int too_large = 0;
        for (int j = 0; j < SIDE; j++) too_large |= above[j] > MARGIN;
        if (raised || !too_large) break;
        for (int j = 0; j < SIDE; j++) {
            if (above[j] <= MARGIN) continue;
            rescale(share, node + j, models, exp2f(-above[j]), width, powers, done);
            share->most[node + j] += above[j];
        }
    }
    for (int model = 0; model < models; model++)
        turn(words[model], SIDE, (uint32_t *)(powers + (model * NODES + node) * POWERS + done), POWERS / 2);
    put(lanes(share->totals + node) + total, share->totals + node);
    put(lanes(share->totals + NODES + node) + base_total, share->totals + NODES + node);
    put(lanes(share->difference + node) + difference, share->difference + node);
}

/* Pairs of W's rows that become tiles of a right operand while there are products of the same rows, some at a step. */
typedef struct { const number *strip; int64_t width; uint32_t *tiles; int64_t next, end, some; } Laying;

INLINE void lay_some(void *state) {
    Laying *l = state;
    for (int64_t i = 0; i < l->some && l->next < l->end; i++, l->next++) {
        const number *from = l->strip + l->next % SIDE * 2 * l->width + l->next / SIDE * STEP;
        uint32_t *to = l->tiles + l->next / SIDE * PART / STEP * 2 * TILE + l->next % SIDE * SIDE;
        pair(from, from + l->width, to, to + TILE);
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
                      const number *hidden, const number *reference, const float *offset, int64_t start, int64_t nodes,
                      float scale, const int64_t *tokens, const int64_t *node_of, int64_t entries) {
    int models = reference ? 2 : 1;
    int64_t columns = models * NODES, words = columns * width / 2, filled_nodes = filled(nodes, STEP);
    int64_t fetched = width * SIDE / filled_nodes, laid = (SIDE * STEP + filled_nodes - 1) / filled_nodes;
    uint32_t *next = own_memory(4 * words + 2 * BLOCK + PART / 2 * (width + columns) + STEP / 2 * columns + 2 * entries);
    number *states = take(&next, words);
    uint32_t *panel = take(&next, words), *tiles = take(&next, PART / 2 * width);
    float *logits = take(&next, 2 * BLOCK);
    number *powers = take(&next, POWERS / 2 * columns);
    share->sums = take(&next, 2 * words);
    *share = (Share){.sums = share->sums};
    for (int j = 0; j < NODES; j++) share->most[j] = UNLIKELY, share->offset[j] = j < nodes ? LOG2E * offset[start + j] : 0;
    memset(share->sums, 0, 8 * words);
    memset(states, 0, 4 * words);
    memcpy(states, hidden + start * width, 2 * nodes * width);
    if (reference) memcpy(states + NODES * width, reference + start * width, 2 * nodes * width);
    int64_t *of_part = take(&next, 2 * entries);
    Configuration before;
    take_tiles(&before);
    lay_panel(states, 1, width, width, columns, panel, width / STEP);
    for (int64_t part = first; part < end; part += PART) {
        int64_t rows = end - part < PART ? end - part : PART, here = 0;
        for (int64_t entry = 0; entry < entries; entry++)
            if (tokens[entry] >= part && tokens[entry] < part + rows) of_part[here++] = entry;
        for (int64_t done = 0; done < rows; done += STEP) {
            const number *strip = weight + (part + done) * width, *ahead = strip + STEP * width;
            Laying laying = {strip, width, tiles + done * SIDE, 0, width / STEP * SIDE, laid};
            for (int64_t node = 0; node < filled_nodes; node += STEP) {
                SETTLE;
                for (int model = 0; model < models; model++) {
                    clear_sums();
                    add_dots(strip, width, panel + (model * NODES + node) * width / 2, width / STEP, lay_some, &laying);
                    store_sums(logits + model * BLOCK, STEP);
                }
                SETTLE;
                for (int64_t i = 0; i < here; i++) {
                    int64_t row = tokens[of_part[i]] - part - done, column = node_of[of_part[i]] - start - node;
                    if (row < 0 || row >= STEP || column < 0 || column >= STEP) continue;
                    for (int model = 0; model < models; model++)
                        logits[model * BLOCK + row * STEP + column] = UNLIKELY / scale;
                }
                for (int half = 0; half < STEP; half += SIDE, ahead += SIDE * fetched) {
                    const float *of_half = logits + half;
                    if (part + done == first) set_most(share, of_half, node + half, models, scale);
                    if (models == 2)
                        take_powers(share, of_half, node + half, 2, scale, width, powers, done, ahead, fetched);
                    else take_powers(share, of_half, node + half, 1, scale, width, powers, done, ahead, fetched);
                }
            }
        }
        SETTLE;
        for (int64_t i = 0; i < models * filled_nodes; i += STEP)
            for (int64_t j = 0; j < width; j += STEP) {
                int64_t node = i < filled_nodes ? i : NODES + i - filled_nodes;
                float *sums = share->sums + node * width + j;
                Coming coming = {j + STEP < width ? sums + STEP : sums + STEP * width - j, width};
                load_sums(sums, width);
                add_dots(powers + node * POWERS, POWERS, tiles + j * PART / 2, rows / STEP, fetch_sums, &coming);
                store_sums(sums, width);
            }
        SETTLE;
    }
    leave_tiles(&before);
}

/* Adds the shares up at a node. `apart`: from the model's sums to the reference's, in nodes. */
static void add_shares(const Share *shares, int threads, int64_t node, int models, int64_t width, float *most,
                       float *totals, float *difference, float *sums, int64_t apart) {
    *most = UNLIKELY, *difference = 0;
    for (int t = 0; t < threads; t++) *most = shares[t].most[node] > *most ? shares[t].most[node] : *most;
    for (int model = 0; model < models; model++, totals += apart, sums += apart * width) {
        *totals = 0;
        memset(sums, 0, 4 * width);
        for (int t = 0; t < threads; t++) {
            const float *of = shares[t].sums + (model * NODES + node) * width;
            float factor = exp2f(shares[t].most[node] - *most);
            *totals += factor * shares[t].totals[model * NODES + node];
            if (model) *difference += factor * shares[t].difference[node];
            for (int64_t j = 0; j < width; j++) sums[j] += factor * of[j];
        }
    }
    *most *= LN2, *difference *= LN2;
}

/* The sums above at all nodes, of all tokens but `tokens` at the nodes `node_of`, which are sorted. hidden, reference:
 * (nodes, width); weight: (vocabulary, width), both multiples of STEP. offset, most, difference: (nodes,); totals:
 * (models, nodes); sums: (models, nodes, width). */
void head_sums(const number *weight, int64_t vocabulary, int64_t width, const number *hidden, const number *reference,
               const float *offset, int64_t nodes, float scale, const int64_t *tokens, const int64_t *node_of,
               int64_t entries, float *most, float *totals, float *difference, float *sums, int threads) {
    int64_t parts = (vocabulary + PART - 1) / PART, entry = 0;
    for (int64_t start = 0; start < nodes; start += NODES) {
        int64_t some = nodes - start < NODES ? nodes - start : NODES, of_tile = entry;
        while (entry < entries && node_of[entry] < start + some) entry++;
        Share shares[threads];
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            int64_t first = parts * t / threads * PART, end = parts * (t + 1) / threads * PART;
            if (end > vocabulary) end = vocabulary;
            sum_share(shares + t, weight, first, end, width, hidden, reference, offset, start, some, LOG2E * scale,
                      tokens + of_tile, node_of + of_tile, entry - of_tile);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t node = 0; node < some; node++)
            add_shares(shares, threads, node, reference ? 2 : 1, width, most + start + node, totals + start + node,
                       difference + start + node, sums + (start + node) * width, nodes);
    }
}
