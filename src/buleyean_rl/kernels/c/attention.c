/* Attention over a packed row and its gradient, in bf16, block by block.
 *
 * A stretch of the row is some queries that are the last of the keys they see. A task is a key head, a stretch and one
 * of `parts` of its queries: every `parts`th STEP of them, of all heads that share the key head. Scores of 32 queries
 * with 32 keys become weights as soon as they are there; what the weights of a query sum to is known at the end,
 * and kept for the gradient.
 */
#include "kernels.h"
#include "tile.h"

#define SHARING 4 /* heads that share a key head, of which so many are taken at a time */
#define UNSEEN -1e30f
#define MARGIN 40 /* powers of 2 by which a score may be above its query's `most` */

/* c (+)= a b. a: (rows, depth), a left operand; b: (depth, columns), a right one, its columns next to each other. All sizes
 * are multiples of STEP. */
static void multiply(const operand *a, int64_t a_stride, uint32_t *b, int64_t b_stride, int64_t rows, int64_t columns,
                     int64_t depth, int add, float *c, int64_t c_stride) {
    SETTLE;
    for (int64_t j = 0; j < columns; j += STEP)
        for (int64_t i = 0; i < rows; i += STEP) { /* these of b are in the first cache now */
            Right right = {b + j, b_stride, SIDE, DEEP * b_stride};
            float *sums = c + i * c_stride + j;
            Sums block = begin_sums(add ? sums : NULL, c_stride, sums, c_stride);
            add_dots(&block, a + i * a_stride, a_stride, STEP, right, 0, depth / STEP, nothing, NULL);
            end_sums(&block);
        }
    SETTLE;
}

/* Products of 32 queries with 32 keys, (STEP, STEP). keys: across, a right operand. */
static void score(const operand *queries, uint32_t *keys, int64_t stride, int64_t width, float *to) {
    multiply(queries, width, keys, stride, STEP, STEP, width, 0, to, STEP);
}

/* Some tokens of a head as operands next to each other, zeros after them. `places` says which; without it they follow
 * `first`. */
static void gather(Heads row, int64_t head, const int64_t *places, int64_t first, int64_t count, int64_t width,
                   int64_t filled_count, operand *next) {
    for (int64_t i = 0; i < count; i++, next += width)
        operands(row.at + head * row.head + (places ? places[i] : first + i) * row.token, width, next);
    memset(next, 0, (filled_count - count) * width * sizeof *next);
}

/* A key head, a stretch and a part of its queries. What the stretch sees are the row's `places`, or `first` and on where
 * there are none; `heads` from `head` on share the key head. What is of all keys lies `apart`: no power of 2, which would
 * drive lines from the cache. */
typedef struct {
    int64_t part, key_head, head, heads, first_query, queries, first, seen, keys, apart;
    const int64_t *places;
} Task;

static Task task_of(int64_t index, int64_t parts, int64_t heads, int64_t key_heads, CuSeqlens s) {
    int64_t stretch = index / parts / key_heads;
    Task t = {.part = index % parts, .key_head = index / parts % key_heads, .heads = heads / key_heads};
    t.head = t.key_head * t.heads;
    t.first_query = s.cu_seqlens_q[stretch];
    t.queries = s.cu_seqlens_q[stretch + 1] - t.first_query;
    t.first = s.cu_seqlens_k[stretch];
    t.seen = s.cu_seqlens_k[stretch + 1] - t.first;
    t.keys = filled(t.seen, STEP);
    t.apart = t.keys + STEP;
    t.places = s.places ? s.places + t.first : NULL;
    return t;
}

/* Into how many tasks a stretch and key head is divided, so that there are some for every thread. */
static int64_t parts_of_each(CuSeqlens s, int64_t key_heads, int threads) {
    int64_t tasks = s.count * key_heads, wanted = (2 * threads + tasks - 1) / tasks;
    int64_t blocks = (s.max_seqlen_q + STEP - 1) / STEP;
    return wanted < blocks ? wanted : blocks;
}

/* A task's keys or values, filled up. */
static void gather_keys(Heads row, const Task *t, int64_t width, operand *to) {
    gather(row, t->key_head, t->places, t->first, t->seen, width, t->keys, to);
}

/* `queries` of some heads of a task from `token` on, filled up to STEP of each, `rows` in all. They see `columns` of the
 * keys, the first `visible` of them. */
typedef struct { int64_t head, heads, token, queries, rows, visible, columns; } Block;

static int64_t most_rows(const Task *t) { return STEP * (t->heads < SHARING ? t->heads : SHARING); }

static Block block_of(const Task *t, int64_t heads_before, int64_t start) {
    int64_t heads = t->heads - heads_before, queries = t->queries - start;
    Block b = {.head = t->head + heads_before, .token = t->first_query + start};
    b.heads = heads < SHARING ? heads : SHARING;
    b.queries = queries < STEP ? queries : STEP;
    b.rows = b.heads * STEP;
    b.visible = t->seen - queries + 1;
    b.columns = filled(b.visible + b.queries - 1, STEP);
    return b;
}

/* A block's queries, or their gradients, head after head. */
static void gather_block(Heads row, const Block *b, int64_t width, operand *to) {
    for (int64_t h = 0; h < b->heads; h++)
        gather(row, b->head + h, NULL, b->token, b->queries, width, STEP, to + h * STEP * width);
}

static void put_block(const float *sums, const Block *b, int64_t width, Heads to) {
    for (int64_t h = 0; h < b->heads; h++)
        for (int64_t i = 0; i < b->queries; i++)
            narrow_many(sums + (h * STEP + i) * width, width, to.at + (b->head + h) * to.head + (b->token + i) * to.token);
}

/* The queries of a task's next block, or their gradients: `left` of them have yet to come to the first cache. */
typedef struct { const number *at; int64_t head, token, heads, h, left; } Ahead;

static Ahead ahead_of(Heads row, const Task *t, const Block *b, int64_t parts) {
    int64_t token = b->token + parts * STEP, queries = t->first_query + t->queries - token;
    return (Ahead){row.at + b->head * row.head + token * row.token, row.head, row.token, b->heads, 0,
                   b->heads * (queries < STEP ? queries : STEP)};
}

INLINE void fetch(Ahead *a, int64_t width) {
    for (int some = 8; some && a->left > 0; some--, a->left--) {
        for (int64_t j = 0; j < width; j += STEP) __builtin_prefetch(a->at + a->h * a->head + j);
        if (++a->h == a->heads) a->h = 0, a->at += a->token;
    }
}

/* Of a block's queries in 32 rows the first sees `seen` of 32 keys: what they do not see. */
static void hide(float *scores, int64_t seen) {
    for (int64_t row = 0; row < STEP; row++, seen++)
        for (int64_t j = seen < 0 ? 0 : seen; j < STEP; j++) scores[row * STEP + j] = UNSEEN;
}

/* Of 32 queries, what exponents of 2 are less, at first that of the first key, and sums of their weights by the column
 * they are in. */
typedef struct { float most[STEP]; Lanes totals[STEP]; } Softmax;

/* Raise what is well below a query's score, and make the `done` weights before it smaller. */
static void raise_most(Softmax *softmax, const float *scores, float scale, operand *weights, int64_t stride, int64_t done) {
    for (int row = 0; row < STEP; row++, scores += STEP, weights += stride) {
        float above = 0;
        for (int j = 0; j < STEP; j++) {
            float power = scale * scores[j] - softmax->most[row];
            above = power > above ? power : above;
        }
        if (above <= MARGIN) continue;
        float factor = exp2f(-above);
        softmax->most[row] += above;
        softmax->totals[row] *= factor;
        for (int64_t j = 0; j < done; j++) weights[j] = times(factor, weights[j]);
    }
}

/* Weights of 32 queries on 32 keys from their scores, after the `done` before them. */
static void weigh(Softmax *softmax, const float *scores, float scale, operand *weights, int64_t stride, int64_t done) {
    Lanes totals[STEP];
    for (int raised = 0;; raised = 1) {
        Lanes above = {0};
        for (int row = 0; row < STEP; row++) {
            totals[row] = softmax->totals[row];
            for (int j = 0; j < STEP; j += 2 * LANES) {
                Lanes x = scale * lanes(scores + row * STEP + j) - softmax->most[row];
                Lanes y = scale * lanes(scores + row * STEP + j + LANES) - softmax->most[row];
                above = larger(above, larger(x, y));
                x = power_of_2(x), y = power_of_2(y);
                totals[row] += x + y;
                operand_row(x, y, weights + row * stride + done + j);
            }
        }
        int too_large = 0;
        for (int j = 0; j < LANES; j++) too_large |= above[j] > MARGIN;
        if (raised || !too_large) break;
        raise_most(softmax, scores, scale, weights, stride, done);
    }
    memcpy(softmax->totals, totals, sizeof totals);
}

/* What 32 queries' weights on 32 keys are, and the gradient in their scores from that in their weights. lse: of the
 * queries, in powers of 2; mean: the gradients' mean by a query's weights. `grad_scores` are a left operand's, and both are a
 * right one's too, whose depth the queries are. */
static void weigh_backward(const float *scores, const float *gradients, float scale, const float *lse, const float *mean,
                           operand *grad_scores, uint32_t *weights_right, uint32_t *grads_right, int64_t stride) {
    enum { VECTORS = STEP / LANES };
    for (int row = 0; row < STEP; row += 2) {
        Lanes weights[VECTORS][2], grads[VECTORS][2];
        for (int odd = 0; odd < 2; odd++) {
            for (int i = 0; i < VECTORS; i++) {
                int64_t at = (row + odd) * STEP + i * LANES;
                Lanes weight = power_of_2(LOG2E * scale * lanes(scores + at) - lse[row + odd]);
                weights[i][odd] = weight;
                grads[i][odd] = scale * weight * (lanes(gradients + at) - mean[row + odd]);
            }
            for (int i = 0; i < VECTORS; i += 2)
                operand_row(grads[i][odd], grads[i + 1][odd], grad_scores + (row + odd) * stride + i * LANES);
        }
        for (int i = 0; i < VECTORS; i++) {
            int64_t to = row / IN_WORD * stride + i * LANES;
            operand_rows(weights[i][0], weights[i][1], weights_right + to, stride);
            operand_rows(grads[i][0], grads[i][1], grads_right + to, stride);
        }
    }
}

/* What queries attend to. q, k, v: queries, keys, values; y: the result; lse: of each query's scores, (heads, tokens). */
void attention(Heads q, Heads k, Heads v, Heads y, float *lse, int64_t width, CuSeqlens s, float scale, int threads) {
    int64_t parts = parts_of_each(s, k.heads, threads);
    float in_powers = LOG2E * scale;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < parts * k.heads * s.count; index++) {
        Task t = task_of(index, parts, q.heads, k.heads, s);
        int64_t words = width / IN_WORD, of_keys = t.apart * words, most = most_rows(&t);
        uint32_t *next = own_memory(3 * of_keys + most * (words + width + t.apart / IN_WORD));
        operand *plain = take(&next, of_keys), *queries = take(&next, most * words);
        uint32_t *keys = take(&next, of_keys), *values = take(&next, of_keys);
        float *sums = take(&next, most * width), scores[BLOCK];
        operand *weights = take(&next, most * t.apart / IN_WORD);
        Configuration before;
        take_tiles(&before);
        gather_keys(k, &t, width, plain);
        transpose((uint32_t *)plain, words, t.keys, words, keys, t.apart);
        gather_keys(v, &t, width, plain);
        as_right(plain, width, t.keys, width, values, width);
        for (int64_t heads_before = 0; heads_before < t.heads; heads_before += SHARING)
            for (int64_t start = t.part * STEP; start < t.queries; start += parts * STEP) {
                Block b = block_of(&t, heads_before, start);
                Ahead ahead = ahead_of(q, &t, &b, parts);
                Softmax softmaxes[SHARING] = {0};
                gather_block(q, &b, width, queries);
                for (int64_t j = 0; j < b.columns; j += STEP)
                    for (int64_t i = 0; i < b.rows; i += STEP) {
                        Softmax *softmax = softmaxes + i / STEP;
                        score(queries + i * width, keys + j, t.apart, width, scores);
                        if (j == 0)
                            for (int row = 0; row < STEP; row++) softmax->most[row] = in_powers * scores[row * STEP];
                        fetch(&ahead, width);
                        if (b.visible - j < STEP) hide(scores, b.visible - j);
                        weigh(softmax, scores, in_powers, weights + i * t.apart, t.apart, j);
                    }
                multiply(weights, t.apart, values, width, b.rows, width, b.columns, 0, sums, width);
                for (int64_t h = 0; h < b.heads; h++)
                    for (int64_t i = 0; i < b.queries; i++) {
                        float total = sum_of(softmaxes[h].totals[i]), *sum = sums + (h * STEP + i) * width;
                        for (int64_t j = 0; j < width; j++) sum[j] /= total;
                        lse[(b.head + h) * q.tokens + b.token + i] = LN2 * softmaxes[h].most[i] + logf(total);
                    }
                put_block(sums, &b, width, y);
            }
        leave_tiles(&before);
    }
}

/* c += x^T y, sums over some queries. x: (rows, width); y: (rows, columns), a right operand; c: (width, columns). */
static void add_products(const operand *x, int64_t rows, int64_t width, uint32_t *y, int64_t columns, int64_t y_stride,
                         uint32_t *paired, operand *across, float *c) {
    as_left_across(x, width, rows, width, paired, (uint32_t *)across, rows / IN_WORD);
    multiply(across, rows, y, y_stride, width, columns, rows, 1, c, y_stride);
}

/* A task's gradients, (width, keys), to their place in (parts, key heads, places, width). */
static void put_gradients(const float *sum, const Task *t, int64_t place, int64_t width, uint32_t *turned, float *to) {
    transpose((const uint32_t *)sum, t->apart, width, t->keys, turned, width);
    memcpy(to + place * width, turned, 4 * t->seen * width);
}

/* The gradients in keys or values from those of what each stretch sees, of each part of its queries: (parts, key heads,
 * places, width). */
static void sum_gradients(const float *of_parts, int64_t parts, int64_t width, CuSeqlens s, Heads to, int threads) {
    int64_t tokens = to.tokens, seen = s.cu_seqlens_k[s.count];
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t head = 0; head < to.heads; head++) {
        float *sums = (float *)own_memory(tokens * width);
        memset(sums, 0, sizeof *sums * tokens * width);
        for (int64_t part = 0; part < parts; part++) {
            const float *row = of_parts + (part * to.heads + head) * seen * width;
            for (int64_t i = 0; i < seen; i++, row += width) {
                float *sum = sums + (s.places ? s.places[i] : i) * width;
                for (int64_t j = 0; j < width; j++) sum[j] += row[j];
            }
        }
        for (int64_t i = 0; i < tokens; i++)
            narrow_many(sums + i * width, width, to.at + head * to.head + i * to.token);
    }
}

/* The gradients in queries, keys and values from `g`, that in the result `y`. */
void attention_backward(Heads q, Heads k, Heads v, Heads y, const float *lse, Heads g, int64_t width, CuSeqlens s,
                        float scale, Heads grad_q, Heads grad_k, Heads grad_v, int threads) {
    int64_t parts = parts_of_each(s, k.heads, threads), size = parts * k.heads * s.cu_seqlens_k[s.count] * width;
    float *of_parts = malloc(2 * sizeof *of_parts * size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < parts * k.heads * s.count; index++) {
        Task t = task_of(index, parts, q.heads, k.heads, s);
        int64_t words = width / IN_WORD, of_keys = t.apart * words, most = most_rows(&t), of_sums = t.apart * width;
        int64_t of_scores = most / IN_WORD * t.apart;
        uint32_t *memory = own_memory(4 * of_keys + 2 * of_sums + 3 * of_scores + most * (4 * words + width));
        uint32_t *next = memory;
        operand *plain = take(&next, of_keys), *queries = take(&next, most * words), *gradients = take(&next, most * words);
        uint32_t *keys = take(&next, of_keys), *values = take(&next, of_keys), *keys_right = take(&next, of_keys);
        uint32_t *paired = take(&next, most * words);
        operand *across = take(&next, most * words), *grad_scores = take(&next, of_scores);
        uint32_t *weights_right = take(&next, of_scores), *grads_right = take(&next, of_scores);
        float *sums = take(&next, most * width), *sum_k = take(&next, of_sums), *sum_v = take(&next, of_sums);
        float scores[BLOCK], grad_weights[BLOCK];
        Configuration before;
        take_tiles(&before);
        gather_keys(k, &t, width, plain);
        transpose((uint32_t *)plain, words, t.keys, words, keys, t.apart);
        as_right(plain, width, t.keys, width, keys_right, width);
        gather_keys(v, &t, width, plain);
        transpose((uint32_t *)plain, words, t.keys, words, values, t.apart);
        memset(sum_k, 0, sizeof *sum_k * of_sums);
        memset(sum_v, 0, sizeof *sum_v * of_sums);
        for (int64_t heads_before = 0; heads_before < t.heads; heads_before += SHARING)
            for (int64_t start = t.part * STEP; start < t.queries; start += parts * STEP) {
                Block b = block_of(&t, heads_before, start);
                Ahead ahead[] = {ahead_of(q, &t, &b, parts), ahead_of(g, &t, &b, parts), ahead_of(y, &t, &b, parts)};
                float mean[SHARING * STEP] = {0}, less[SHARING * STEP] = {0};
                gather_block(q, &b, width, queries);
                gather_block(g, &b, width, gradients);
                for (int64_t h = 0; h < b.heads; h++)
                    for (int64_t i = 0; i < b.queries; i++) {
                        int64_t row = h * STEP + i, head = b.head + h, token = b.token + i;
                        const number *result = y.at + head * y.head + token * y.token;
                        mean[row] = dot_rows(gradients + row * width, result, width);
                        less[row] = LOG2E * lse[head * q.tokens + token];
                    }
                for (int64_t j = 0; j < b.columns; j += STEP)
                    for (int64_t i = 0; i < b.rows; i += STEP) {
                        int64_t to = i / IN_WORD * t.apart + j;
                        score(queries + i * width, keys + j, t.apart, width, scores);
                        score(gradients + i * width, values + j, t.apart, width, grad_weights);
                        for (int which = 0; which < 3; which++) fetch(ahead + which, width);
                        if (b.visible - j < STEP) hide(scores, b.visible - j);
                        weigh_backward(scores, grad_weights, scale, less + i, mean + i, grad_scores + i * t.apart + j,
                                       weights_right + to, grads_right + to, t.apart);
                    }
                multiply(grad_scores, t.apart, keys_right, width, b.rows, width, b.columns, 0, sums, width);
                put_block(sums, &b, width, grad_q);
                add_products(queries, b.rows, width, grads_right, b.columns, t.apart, paired, across, sum_k);
                add_products(gradients, b.rows, width, weights_right, b.columns, t.apart, paired, across, sum_v);
            }
        int64_t place = (t.part * k.heads + t.key_head) * s.cu_seqlens_k[s.count] + t.first;
        put_gradients(sum_k, &t, place, width, memory, of_parts); /* the memory's first is done with */
        put_gradients(sum_v, &t, place, width, memory, of_parts + size);
        leave_tiles(&before);
    }
    sum_gradients(of_parts, parts, width, s, grad_k, threads);
    sum_gradients(of_parts + size, parts, width, s, grad_v, threads);
    free(of_parts);
}
