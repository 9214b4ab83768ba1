/* Attention over a packed sequence and its gradient, 32 queries by 32 keys at a time.
 *
 * A task is a key head, a segment and a part of its queries: every `parts`th block of 32, of all heads that share the key
 * head. Scores become weights as soon as they are there (online softmax); the sum of a query's weights is known at the end.
 * Tasks do not depend on the number of threads, nor do memory and results.
 */
#include "online_softmax.h"

#define SHARED_HEADS 4 /* heads of a key head that are taken at a time */
#define ENOUGH_TASKS 16 /* for threads to share: keys are packed anew for every part */

/* `rows`: of the queries of all heads that are taken at a time. What is of all keys has rows `stride` apart: no power of 2,
 * which would drive lines from the cache. partial: where its gradients in keys begin, in units of a head's width. */
typedef struct {
    int64_t part, parts, key_head, heads, first_query, queries, first_key, keys, padded_keys, stride, rows, partial;
    const int64_t *key_tokens;
} Task;

static int64_t parts_of(const AttentionArgs *g) {
    return (ENOUGH_TASKS - 1) / (g->k.heads * g->seqlens.segments) + 1;
}

static int64_t tasks_of(const AttentionArgs *g) { return parts_of(g) * g->k.heads * g->seqlens.segments; }

static Task task_at(const AttentionArgs *g, int64_t index) {
    const CuSeqlens *s = &g->seqlens;
    int64_t parts = parts_of(g), segment = index / parts / g->k.heads;
    const int32_t *q = s->cu_seqlens_q + segment, *k = s->cu_seqlens_k + segment;
    Task t = {.part = index % parts, .parts = parts, .key_head = index / parts % g->k.heads, .heads = g->q.heads / g->k.heads,
              .first_query = q[0], .queries = q[1] - q[0], .first_key = k[0], .keys = k[1] - k[0]};
    t.padded_keys = round_up(t.keys, BLOCK), t.stride = t.padded_keys + BLOCK;
    t.rows = BLOCK * smaller(t.heads, SHARED_HEADS);
    t.partial = parts * g->k.heads * (k[0] + segment * BLOCK) + index % (parts * g->k.heads) * t.padded_keys;
    t.key_tokens = s->key_tokens ? s->key_tokens + t.first_key : NULL;
    return t;
}

static inline bf16 *row_at(Heads x, int64_t head, int64_t token) {
    return x.data + head * x.head_stride + token * x.token_stride;
}

static inline int64_t key_token(const Task *t, int64_t i) { return t->key_tokens ? t->key_tokens[i] : t->first_key + i; }

/* A task's keys or values, packed one after the other, zeros after them. */
static void pack_keys(Heads x, const Task *t, int64_t width, Packed *to) {
    for (int64_t i = 0; i < t->keys; i++) pack(row_at(x, t->key_head, key_token(t, i)), width, to + i * width);
    memset(to + t->keys * width, 0, (t->padded_keys - t->keys) * width * sizeof *to);
}

/* Up to 32 queries of up to SHARED_HEADS heads, `rows` in all, each head's filled up to 32. The first query sees `visible`
 * keys, all of them the first `columns`. */
typedef struct { int64_t head, heads, token, queries, rows, visible, columns; } QueryBlock;

/* The first block of a task, or the one after b; whether there is one. */
static int next_block(const Task *t, QueryBlock *b, int64_t *head, int64_t *query) {
    if (*query >= t->queries) *query = t->part * BLOCK, *head += SHARED_HEADS;
    if (*head >= t->heads || *query >= t->queries) return 0;
    b->head = t->key_head * t->heads + *head, b->heads = smaller(t->heads - *head, SHARED_HEADS);
    b->token = t->first_query + *query, b->queries = smaller(t->queries - *query, BLOCK);
    b->rows = b->heads * BLOCK, b->visible = t->keys - t->queries + *query + 1;
    b->columns = round_up(b->visible + b->queries - 1, BLOCK);
    *query += t->parts * BLOCK;
    return 1;
}

static void pack_queries(Heads x, const QueryBlock *b, int64_t width, Packed *to) {
    for (int64_t h = 0; h < b->heads; h++)
        for (int64_t i = 0; i < BLOCK; i++, to += width)
            if (i < b->queries) pack(row_at(x, b->head + h, b->token + i), width, to);
            else memset(to, 0, width * sizeof *to);
}

static void store_queries(const float *sums, const QueryBlock *b, int64_t width, Heads to) {
    for (int64_t h = 0; h < b->heads; h++)
        for (int64_t i = 0; i < b->queries; i++)
            f32_to_bf16_many(sums + (h * BLOCK + i) * width, width, row_at(to, b->head + h, b->token + i));
}

/* A matrix that `pack_b` or `transpose` made: its columns lie next to each other. */
static inline PackedB packed(uint32_t *b, int64_t stride) { return (PackedB){b, stride, TILE, BLOCK_WORDS * stride}; }

/* Scores of 32 queries with 32 keys, of which the first query sees `visible`. keys: transposed, packed as b. */
static void masked_scores(const Packed *queries, uint32_t *keys, int64_t stride, int64_t width, int64_t visible, float *scores) {
    multiply(queries, width, packed(keys, stride), 0, BLOCK, BLOCK, width, 0, scores, BLOCK);
    for (int64_t row = 0; row < BLOCK && visible < BLOCK; row++, visible++)
        for (int64_t j = visible < 0 ? 0 : visible; j < BLOCK; j++) scores[row * BLOCK + j] = MASKED;
}

/* Weights of 32 queries on 32 keys, and the gradient in their scores from that in their weights. lse: in powers of 2; mean:
 * of the gradients by a query's weights. */
static void softmax_weights_backward(const float *scores, const float *grads, float scale, const float *lse, const float *mean,
                                     Packed *weights, Packed *grad_scores, int64_t stride) {
    for (int row = 0; row < BLOCK; row++)
        for (int j = 0; j < BLOCK; j += 2 * LANES) {
            SimdF32 weight[2], grad[2];
            for (int i = 0; i < 2; i++) {
                int64_t at = row * BLOCK + j + i * LANES;
                weight[i] = simd_exp2(LOG2E * scale * simd_load(scores + at) - lse[row]);
                grad[i] = scale * weight[i] * (simd_load(grads + at) - mean[row]);
            }
            simd_store_packed(weight[0], weight[1], weights + row * stride + j);
            simd_store_packed(grad[0], grad[1], grad_scores + row * stride + j);
        }
}

static void attention_task(const AttentionArgs *g, Task task) {
    const Task *t = &task;
    int64_t width = g->head_width, words = width / VNNI, head = 0, query = t->part * BLOCK;
    float scale = LOG2E * g->scale, scores[BLOCK * BLOCK], *sums;
    Packed *plain, *queries, *weights;
    uint32_t *keys, *values;
    if (query >= t->queries) return;
    if (!SCRATCH(BUFFER(plain, t->stride * width), BUFFER(queries, t->rows * width), BUFFER(keys, t->stride * words),
                 BUFFER(values, t->stride * words), BUFFER(sums, t->rows * width), BUFFER(weights, t->rows * t->stride)))
        return;
    TileConfig before;
    amx_begin(&before);
    pack_keys(g->k, t, width, plain);
    transpose((uint32_t *)plain, words, t->padded_keys, words, keys, t->stride);
    pack_keys(g->v, t, width, plain);
    pack_b(plain, width, t->padded_keys, width, values, width);
    for (QueryBlock b; next_block(t, &b, &head, &query);) {
        OnlineSoftmax softmaxes[SHARED_HEADS] = {0};
        pack_queries(g->q, &b, width, queries);
        for (int64_t j = 0; j < b.columns; j += BLOCK)
            for (int64_t h = 0; h < b.heads; h++) {
                masked_scores(queries + h * BLOCK * width, keys + j, t->stride, width, b.visible - j, scores);
                for (int row = 0; row < BLOCK && !j; row++) softmaxes[h].row_max[row] = scale * scores[row * BLOCK];
                softmax_weights(softmaxes + h, scores, scale, weights + h * BLOCK * t->stride, t->stride, j, NULL, 0);
            }
        multiply(weights, t->stride, packed(values, width), BLOCK, b.rows, width, b.columns, 0, sums, width);
        for (int64_t h = 0; h < b.heads; h++)
            for (int64_t i = 0; i < b.queries; i++) {
                float sum_exp = simd_sum(softmaxes[h].sum_exp[i]), inverse = 1 / sum_exp, *sum = sums + (h * BLOCK + i) * width;
                for (int64_t j = 0; j < width; j++) sum[j] *= inverse;
                g->lse[(b.head + h) * g->q.tokens + b.token + i] = LN2 * softmaxes[h].row_max[i] + logf(sum_exp);
            }
        store_queries(sums, &b, width, g->y);
    }
    amx_end(&before);
}

void attention(const AttentionArgs *g, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks_of(g); i++) attention_task(g, task_at(g, i));
}

/* c += x^T y. x: (rows, width), y: (rows, columns), c: (width, columns); y and c have rows `stride` apart. */
static void add_transposed_product(const Packed *x, int64_t width, int64_t rows, const Packed *y, int64_t columns,
                                   int64_t stride, uint32_t *buffer, Packed *transposed, uint32_t *packed_b, float *c) {
    pack_a_transposed(x, width, rows, width, buffer, (uint32_t *)transposed, rows / VNNI);
    pack_b(y, stride, rows, columns, packed_b, stride);
    multiply(transposed, rows, packed(packed_b, stride), BLOCK, width, columns, rows, 1, c, stride);
}

/* The gradients in a task's keys and values: (padded_keys, width), each. */
static void attention_backward_task(const AttentionArgs *g, Task task, float *grad_k, float *grad_v) {
    const Task *t = &task;
    int64_t width = g->head_width, words = width / VNNI, head = 0, query = t->part * BLOCK, of_keys = t->stride * width;
    float scores[BLOCK * BLOCK], grad_weights[BLOCK * BLOCK], *sums, *sum_k, *sum_v;
    Packed *plain, *queries, *grads, *transposed, *weights, *grad_scores;
    uint32_t *keys, *values, *keys_b, *buffer, *packed_b;
    if (query >= t->queries) return;
    if (!SCRATCH(BUFFER(plain, of_keys), BUFFER(keys, of_keys / VNNI), BUFFER(values, of_keys / VNNI),
                 BUFFER(keys_b, of_keys / VNNI), BUFFER(queries, t->rows * width), BUFFER(grads, t->rows * width),
                 BUFFER(buffer, t->rows * width), BUFFER(transposed, t->rows * width), BUFFER(sums, t->rows * width),
                 BUFFER(weights, t->rows * t->stride), BUFFER(grad_scores, t->rows * t->stride),
                 BUFFER(packed_b, t->rows / VNNI * t->stride), BUFFER(sum_k, of_keys), BUFFER(sum_v, of_keys)))
        return;
    TileConfig before;
    amx_begin(&before);
    pack_keys(g->k, t, width, plain);
    transpose((uint32_t *)plain, words, t->padded_keys, words, keys, t->stride);
    pack_b(plain, width, t->padded_keys, width, keys_b, width);
    pack_keys(g->v, t, width, plain);
    transpose((uint32_t *)plain, words, t->padded_keys, words, values, t->stride);
    memset(sum_k, 0, sizeof *sum_k * of_keys);
    memset(sum_v, 0, sizeof *sum_v * of_keys);
    for (QueryBlock b; next_block(t, &b, &head, &query);) {
        float mean[SHARED_HEADS * BLOCK] = {0}, lse[SHARED_HEADS * BLOCK] = {0};
        pack_queries(g->q, &b, width, queries);
        pack_queries(g->grad_y, &b, width, grads);
        for (int64_t h = 0; h < b.heads; h++)
            for (int64_t i = 0; i < b.queries; i++) {
                int64_t row = h * BLOCK + i, token = b.token + i;
                mean[row] = dot(row_at(g->grad_y, b.head + h, token), row_at(g->y, b.head + h, token), width);
                lse[row] = LOG2E * g->lse[(b.head + h) * g->q.tokens + token];
            }
        for (int64_t j = 0; j < b.columns; j += BLOCK)
            for (int64_t i = 0; i < b.rows; i += BLOCK) {
                int64_t at = i * t->stride + j;
                multiply(grads + i * width, width, packed(values + j, t->stride), 0, BLOCK, BLOCK, width, 0, grad_weights, BLOCK);
                masked_scores(queries + i * width, keys + j, t->stride, width, b.visible - j, scores);
                softmax_weights_backward(scores, grad_weights, g->scale, lse + i, mean + i, weights + at, grad_scores + at,
                                         t->stride);
            }
        multiply(grad_scores, t->stride, packed(keys_b, width), BLOCK, b.rows, width, b.columns, 0, sums, width);
        store_queries(sums, &b, width, g->grad_q);
        add_transposed_product(queries, width, b.rows, grad_scores, b.columns, t->stride, buffer, transposed, packed_b, sum_k);
        add_transposed_product(grads, width, b.rows, weights, b.columns, t->stride, buffer, transposed, packed_b, sum_v);
    }
    transpose((uint32_t *)sum_k, t->stride, width, t->padded_keys, (uint32_t *)grad_k, width);
    transpose((uint32_t *)sum_v, t->stride, width, t->padded_keys, (uint32_t *)grad_v, width);
    amx_end(&before);
}

/* The gradients in keys or values of a key head, from those of all tasks. */
static void sum_partials(const AttentionArgs *g, const float *partials, int64_t head, Heads to) {
    int64_t width = g->head_width;
    float *sums;
    if (!SCRATCH(BUFFER(sums, to.tokens * width))) return;
    memset(sums, 0, sizeof *sums * to.tokens * width);
    for (int64_t index = 0; index < tasks_of(g); index++) {
        Task t = task_at(g, index);
        for (int64_t i = 0; i < t.keys && t.key_head == head && t.part * BLOCK < t.queries; i++) {
            float *sum = sums + key_token(&t, i) * width;
            for (int64_t j = 0; j < width; j++) sum[j] += partials[(t.partial + i) * width + j];
        }
    }
    for (int64_t i = 0; i < to.tokens; i++) f32_to_bf16_many(sums + i * width, width, row_at(to, head, i));
}

void attention_backward(const AttentionArgs *g, int threads) {
    Task last = task_at(g, tasks_of(g) - 1);
    int64_t width = g->head_width, size = (last.partial + last.padded_keys) * width;
    float *grads = allocate(2 * (int64_t)sizeof *grads * size);
    if (!grads) return;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks_of(g); i++) {
        Task t = task_at(g, i);
        attention_backward_task(g, t, grads + t.partial * width, grads + size + t.partial * width);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < 2 * g->k.heads; i++) sum_partials(g, grads + i % 2 * size, i / 2, i % 2 ? g->grad_v : g->grad_k);
    free(grads);
}
