/* The output head's softmax, and the mean of W's rows by it, in one pass over the vocabulary: no logits are stored.
 *
 * Of some nodes, of the logits z = W h: sum e^z, and sum e^z w, w being a row of W. It is attention of the nodes to W's rows,
 * keys and values at once, but for the rejected tokens. The gradient of any multiples of a model's and a reference's softmax
 * is made of these means. Threads share the vocabulary.
 */
#include "online_softmax.h"

#define NODES 512 /* at a time */
#define PART 384  /* rows of W at a time: packed both ways, they fit in L2 */
#define STRIDE (PART + BLOCK) /* of weights: no power of 2, which would drive lines from the cache */

/* What a thread summed of up to NODES nodes: also rows of W by their weights, (NODES, width). */
typedef struct { OnlineSoftmax softmaxes[NODES / BLOCK]; float *sums; } Share;

/* Rows [first, end) of W, at the nodes from `start` on, whose rejections are [rejection, rejections). */
static void sum_share(const HeadSoftmaxArgs *g, Share *share, int64_t first, int64_t end, int64_t start, int64_t rejection,
                      int64_t rejections) {
    int64_t width = g->width, nodes = smaller(g->nodes - start, NODES), *here;
    float scores[BLOCK * BLOCK], scale = LOG2E * g->scale;
    uint32_t *keys, *values;
    Packed *states, *weights;
    bf16 *dequantised;
    if (!SCRATCH(BUFFER(states, NODES * width), BUFFER(keys, PART / VNNI * width), BUFFER(values, PART / VNNI * width),
                 BUFFER(weights, BLOCK * STRIDE), BUFFER(here, rejections - rejection),
                 BUFFER(dequantised, g->quantised ? PART * width : 0)))
        return;
    memset(share->softmaxes, 0, sizeof share->softmaxes);
    for (int row = 0; row < NODES; row++) share->softmaxes[row / BLOCK].row_max[row % BLOCK] = MASKED;
    memset(share->sums, 0, sizeof *share->sums * NODES * width);
    memset(states, 0, sizeof *states * NODES * width);
    pack(g->hidden + start * width, nodes * width, states);
    TileConfig before;
    amx_begin(&before);
    for (int64_t part = first; part < end; part += PART) {
        int64_t rows = smaller(end - part, PART), count = 0;
        for (int64_t i = rejection; i < rejections; i++)
            if (g->rejected_token[i] >= part && g->rejected_token[i] < part + rows) here[count++] = i;
        const bf16 *w = g->quantised ? dequantised : g->weight + part * width;
        if (g->quantised) dequantise_part(g->quantised, part, rows, 0, width, dequantised);
        pack_b_panel(transposed(w, rows, width), keys, width / BLOCK, 0);
        pack_b_panel(row_major(w, rows, width), values, PART / BLOCK, 0);
        for (int64_t node = 0; node < nodes; node += BLOCK) {
            OnlineSoftmax *softmax = share->softmaxes + node / BLOCK;
            float *sums = share->sums + node * width;
            for (int64_t done = 0; done < rows; done += BLOCK) {
                PackedB b = panel_block(keys, width / BLOCK, done / BLOCK, 0);
                multiply(states + node * width, width, b, 0, BLOCK, BLOCK, width, 0, scores, BLOCK);
                for (int64_t i = 0; i < count; i++) {
                    int64_t row = g->rejected_node[here[i]] - start - node, j = g->rejected_token[here[i]] - part - done;
                    if (row >= 0 && row < BLOCK && j >= 0 && j < BLOCK) scores[row * BLOCK + j] = MASKED;
                }
                for (int row = 0; row < BLOCK && part + done == first; row++) {
                    float max = simd_largest(scores + row * BLOCK, BLOCK);
                    softmax->row_max[row] = max > MASKED / 2 ? scale * max : 0;
                }
                softmax_weights(softmax, scores, scale, weights, STRIDE, done, sums, width);
            }
            PackedB b = panel_block(values, PART / BLOCK, 0, 0);
            multiply(weights, STRIDE, b, 2 * TILE_WORDS * PART / BLOCK, BLOCK, width, rows, 1, sums, width);
        }
    }
    amx_end(&before);
}

/* Adds the threads' shares up at a node. */
static void add_shares(const HeadSoftmaxArgs *g, const Share *shares, int threads, int64_t start, int64_t node) {
    float sum_exp = 0, sum_rounded = 0, row_max = MASKED, *mean = g->mean + (start + node) * g->width;
    int64_t block = node / BLOCK, row = node % BLOCK;
    memset(mean, 0, sizeof *mean * g->width);
    for (int t = 0; t < threads; t++) row_max = fmaxf(shares[t].softmaxes[block].row_max[row], row_max);
    for (int t = 0; t < threads; t++) {
        const OnlineSoftmax *softmax = shares[t].softmaxes + block;
        float factor = exp2f(softmax->row_max[row] - row_max);
        sum_exp += factor * simd_sum(softmax->sum_exp[row]), sum_rounded += factor * simd_sum(softmax->sum_rounded[row]);
        for (int64_t j = 0; j < g->width; j++) mean[j] += factor * shares[t].sums[node * g->width + j];
    }
    float inverse = 1 / sum_rounded;
    for (int64_t j = 0; j < g->width; j++) mean[j] *= inverse;
    g->row_max[start + node] = LN2 * row_max, g->sum_exp[start + node] = sum_exp;
}

void head_softmax(const HeadSoftmaxArgs *g, int threads) {
    int64_t parts = (g->vocabulary + PART - 1) / PART, size = NODES * g->width, rejection = 0, next = 0;
    Share *shares = allocate(threads * (int64_t)sizeof *shares);
    float *sums = allocate(threads * size * (int64_t)sizeof *sums);
    for (int64_t start = 0; start < g->nodes && shares && sums; start += NODES, rejection = next) {
        while (next < g->rejections && g->rejected_node[next] < start + NODES) next++;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int t = 0; t < threads; t++) {
            int64_t first = parts * t / threads * PART, end = parts * (t + 1) / threads * PART;
            shares[t].sums = sums + t * size;
            sum_share(g, shares + t, first, smaller(end, g->vocabulary), start, rejection, next);
        }
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t node = 0; node < smaller(g->nodes - start, NODES); node++) add_shares(g, shares, threads, start, node);
    }
    free(shares);
    free(sums);
}
