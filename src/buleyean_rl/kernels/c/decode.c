/* Decoding: decoder layers over rows, which are tokens of many sequences, and drawing tokens, in one call.
 *
 * Keys and values lie in blocks of 16 tokens of a sequence, which have for every layer and key head
 *
 *          keys, words of two elements           values, words of two tokens
 *                 token 0 1 .. 15                         element 0 1 .. width - 1
 *      element 0 1 | k00k01 ...                  token 0 1 | v00v10 ...
 *              2 3 |                                   2 3 |
 */
#include "draw.h"
#include "elementwise.h"
#include "row_linear.h"
#include <omp.h>

#define CHAINS 4 /* of sums that do not wait for each other */
#define SMALL 64 /* columns for each thread that are too few to share them alone: rows are shared too */
#define ADAPTER_COLUMNS 8 /* of an A that a thread takes at a time */

/* What follows is called by all threads, which share the work, and wait for each other at its end. */

/* Where results go, (rows, stride): plus what is `added` rounded to y, packed for the next product, or as logits. */
typedef struct { const bf16 *added; bf16 *y; Packed *packed; float *logits; int64_t stride; } Output;

static void store(const Output *o, const float *c, int64_t row, int64_t rows, int64_t column) {
    int64_t place = row * o->stride + column;
    if (o->y) store_block(c, o->added ? o->added + place : NULL, o->stride, o->y + place, o->stride, (int)rows);
    for (int64_t i = 0; i < rows; i++, c += BLOCK, place += o->stride)
        if (o->logits) memcpy(o->logits + place, c, BLOCK * sizeof *c);
        else if (o->packed) pack_floats(c, o->packed + place);
}

/* A thread's share: an even part of some blocks. */
typedef struct { int64_t first, end; } Share;

static Share share_of(int64_t blocks) {
    int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return (Share){blocks * thread / threads, blocks * (thread + 1) / threads};
}

/* hidden = x a^T. */
static void adapter_hidden(const RowLinear *l, const Packed *x, int64_t rows, bf16 *hidden) {
    float c[ROW_BLOCK * BLOCK];
    int64_t threads = omp_get_num_threads(), groups = l->ranks / ADAPTER_COLUMNS, part = ROW_BLOCK;
    if (groups < threads) part = smaller(part, (rows + threads - 1) / threads);
    Share share = share_of((rows + part - 1) / part * groups);
    for (int64_t i = share.first; i < share.end; i++) {
        int64_t row = i / groups * part, column = i % groups * ADAPTER_COLUMNS, some = smaller(rows - row, part);
        multiply_block(some, ADAPTER_COLUMNS, x + row * l->depth, l->a + column * l->depth, l->depth, NULL, c);
        for (int64_t k = 0; k < some; k++)
            for (int64_t j = 0; j < ADAPTER_COLUMNS; j++)
                hidden[(row + k) * l->ranks + column + j] = f32_to_bf16(c[k * BLOCK + j]);
    }
#pragma omp barrier
}

/* Results of layers with one input side by side, or silu of the first times the second. hidden: memory for their adapters. */
static void linear(const RowLinear *l, int count, int gated, const Packed *x, bf16 *hidden, int64_t rows, Output output) {
    float c[ROW_BLOCK * BLOCK], c_up[ROW_BLOCK * BLOCK];
    int64_t columns = 0, threads = omp_get_num_threads(), part = ROW_BLOCK;
    for (int k = 0; k < count; k++) columns += l[k].columns;
    if (columns <= SMALL * threads) part = smaller(part, (rows + threads - 1) / threads);
    if (l->ranks) adapter_hidden(l, x, rows, hidden);
    int64_t parts = (rows + part - 1) / part;
    Share share = share_of(columns / BLOCK * parts);
    for (int64_t i = share.first; i < share.end; i++) {
        int64_t place = i / parts * BLOCK, column = place, row = i % parts * part, some = smaller(rows - row, part);
        const RowLinear *layer = l;
        while (column >= layer->columns) column -= layer++->columns;
        const bf16 *next = i + parts < share.end ? layer->w + (column + BLOCK) * layer->depth : NULL;
        if (next && column + BLOCK == layer->columns) next = layer[1].w;
        linear_block(layer, x, hidden, row, some, column, gated ? l[1].w + column * l->depth : next, c);
        if (gated) linear_block(l + 1, x, hidden, row, some, column, next, c_up);
        for (int64_t k = 0; k < some * BLOCK && gated; k += LANES) {
            SimdF32 z = simd_load(c + k);
            simd_store(z * sigmoid(z) * simd_load(c_up + k), c + k);
        }
        store(&output, c, row, some, place);
    }
#pragma omp barrier
}

/* Rows of x, normed and packed; all, or those of `row`. */
static void norm_rows(const DecodeArgs *g, const bf16 *weight, float epsilon, int64_t rows, const int64_t *row) {
    int64_t width = g->width;
    bf16 *normed;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        if (!SCRATCH(BUFFER(normed, width))) continue;
        norm(g->x + (row ? row[i] : i) * width, weight, epsilon, width, normed);
        pack(normed, width, (Packed *)g->packed + i * width);
    }
}

/* A head of a row's queries or keys, in place. */
static void place_head(const DecodeArgs *g, const CachedLayer *l, int64_t row, bf16 *head, int is_key) {
    if (l->head_norms[is_key]) norm(head, l->head_norms[is_key], l->epsilons[0], g->head_width, head);
    rotate(head, g->cosine + row * g->head_width, g->sine + row * g->head_width, 0, g->head_width / 2);
}

/* The keys of a block of the cache; its values follow them. */
static bf16 *cached(const DecodeArgs *g, int64_t layer, int64_t row, int64_t block, int64_t key_head) {
    bf16 *start = g->blocks[g->sequence[row] * g->blocks_per_sequence + block];
    return start + (layer * g->key_heads + key_head) * 2 * TILE * g->head_width;
}

/* Keys and values of a row, into the cache. */
static void cache_row(const DecodeArgs *g, int64_t layer, int64_t row) {
    int is_last = row + 1 == g->rows || g->sequence[row + 1] != g->sequence[row];
    int64_t width = g->head_width, token = g->position[row] % TILE, stride = (g->heads + 2 * g->key_heads) * width;
    for (int64_t h = 0; h < g->key_heads; h++) {
        bf16 *key = g->qkv + row * stride + (g->heads + h) * width, *keys = cached(g, layer, row, g->position[row] / TILE, h);
        place_head(g, g->layers + layer, row, key, 1);
        for (int64_t j = 0; j < width; j++) keys[(j / 2 * TILE + token) * 2 + j % 2] = key[j];
        bf16 *value = key + g->key_heads * width, *values = keys + (TILE + token / 2 * 2) * width;
        for (int64_t j = 0; j < width; j++) {
            values[2 * j + token % 2] = value[j];
            if (is_last && token % 2 == 0) values[2 * j + 1] = 0; /* what is not there has no weight, but may be NaN */
        }
    }
}

/* The scores of a query with the 16 keys of a block. */
static void block_scores(const bf16 *query, const bf16 *keys, int64_t width, float *scores) {
    for (int64_t token = 0; token < TILE; token += LANES) {
        SimdF32 sums[CHAINS] = {0};
        for (int64_t j = 0; j < width / 2; j += CHAINS)
#pragma GCC unroll 4
            for (int64_t chain = 0; chain < CHAINS; chain++)
                sums[chain] = add_words(sums[chain], query + 2 * (j + chain), keys + ((j + chain) * TILE + token) * 2);
        simd_store(sums[0] + sums[1] + (sums[2] + sums[3]), scores + token);
    }
}

/* Weights from the scores of `tokens`; zeros after them. */
static void softmax(float *scores, int64_t tokens, int64_t padded, float scale, bf16 *weights) {
    for (int64_t i = tokens; i < padded; i++) scores[i] = MASKED;
    float inverse = 1 / powers(scores, padded, simd_largest(scores, padded), scale, MASKED, scores);
    for (int64_t i = 0; i < padded; i++) weights[i] = f32_to_bf16(inverse * scores[i]);
}

/* Attention of a row's queries that share a key head. */
static void attend(const DecodeArgs *g, int64_t layer, int64_t row, int64_t key_head, Packed *to) {
    int64_t width = g->head_width, heads = g->heads / g->key_heads, tokens = g->position[row] + 1;
    int64_t padded = round_up(tokens, TILE), stride = (g->heads + 2 * g->key_heads) * width;
    bf16 *queries = g->qkv + row * stride + key_head * heads * width;
    float scale = LOG2E * g->layers[layer].scale, *scores, *y;
    bf16 *weights;
    if (!SCRATCH(BUFFER(scores, padded), BUFFER(weights, padded * heads), BUFFER(y, width * heads))) return;
    memset(y, 0, width * heads * sizeof *y);
    for (int64_t h = 0; h < heads; h++) {
        place_head(g, g->layers + layer, row, queries + h * width, 0);
        for (int64_t i = 0; i < padded; i += TILE) {
            const bf16 *next = cached(g, layer, row, smaller(i + TILE, padded - TILE) / TILE, key_head);
            for (int64_t j = 0; j < 2 * TILE * width && !h; j += 32) __builtin_prefetch(next + j);
            block_scores(queries + h * width, cached(g, layer, row, i / TILE, key_head), width, scores + i);
        }
        softmax(scores, tokens, padded, scale, weights + h * padded);
    }
    for (int64_t i = 0; i < tokens; i += TILE)
        for (int64_t h = 0; h < heads; h++) {
            const bf16 *values = cached(g, layer, row, i / TILE, key_head) + TILE * width;
            add_word_rows(weights + h * padded + i, smaller(tokens - i, TILE), values, width, y + h * width);
        }
    for (int64_t j = 0; j < heads * width; j += BLOCK) pack_floats(y + j, to + j);
}

static void decode_layer(const DecodeArgs *g, int64_t layer) {
    const CachedLayer *l = g->layers + layer;
    int64_t rows = g->rows, group = g->heads / g->key_heads;
    Packed *packed = g->packed, *gates = g->gates;
    bf16 *hidden = g->lora_hidden;
    Output qkv = {.y = g->qkv, .stride = (g->heads + 2 * g->key_heads) * g->head_width};
    Output residual = {.added = g->x, .y = g->x, .stride = g->width};
    norm_rows(g, l->norms[0], l->epsilons[0], rows, NULL);
    linear(&l->q, 3, 0, packed, hidden, rows, qkv);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) cache_row(g, layer, i);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < rows * g->key_heads; i++)
        attend(g, layer, i / g->key_heads, i % g->key_heads, packed + i * group * g->head_width);
    linear(&l->output, 1, 0, packed, hidden, rows, residual);
    norm_rows(g, l->norms[1], l->epsilons[1], rows, NULL);
    linear(&l->gate, 1, 1, packed, hidden, rows, (Output){.packed = gates, .stride = l->down.depth});
    linear(&l->down, 1, 0, gates, hidden, rows, residual);
}

/* Draws a token after some of the rows. */
static void draw_tokens(const DecodeArgs *g) {
    norm_rows(g, g->norm, g->epsilon, g->draws, g->drawn_row);
    linear(&g->head, 1, 0, g->packed, NULL, g->draws, (Output){.logits = g->logits, .stride = g->head.columns});
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < g->draws; i++) draw(g, i);
}

void decode(const DecodeArgs *g, int threads) {
#pragma omp parallel num_threads(threads)
    {
        for (int64_t layer = 0; layer < g->count; layer++) decode_layer(g, layer);
        draw_tokens(g);
    }
}
