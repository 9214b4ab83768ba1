/* Attention over a packed row and its gradient, in bf16, in tiles of a processor's matrix registers (AMX).
 *
 * A stretch of the row is some queries that are the last of the keys they see. A task is a key head, a stretch and one
 * of `parts` of its queries: every `parts`th block of ROWS. Scores of 32 queries with 32 keys become weights as they
 * come out of the registers; what the weights of a query sum to is known at the end, and kept for the gradient.
 */
#include "passes.h"
#include "tiles.h"

#define ROWS 64 /* queries that are taken at a time */
#define UNSEEN -1e30f
#define MARGIN 30 /* by which a score may be above its query's `most` */

/* c (+)= a b. a: (rows, depth), two neighbours of a row in a word; b: (depth, columns), two of a column in a word. All
 * sizes are multiples of STEP; strides are in words. */
static void multiply(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t rows,
                     int64_t columns, int64_t depth, int add, float *c, int64_t c_stride) {
    SETTLE;
    for (int64_t i = 0; i < rows; i += STEP)
        for (int64_t j = 0; j < columns; j += STEP) {
            float *sums = c + i * c_stride + j;
            if (add) load_sums(sums, c_stride);
            else clear_sums();
            for (int64_t k = 0; k < depth / 2; k += SIDE) {
                LOAD(4, a + i * a_stride + k, a_stride);
                LOAD(5, a + (i + SIDE) * a_stride + k, a_stride);
                LOAD(6, b + k * b_stride + j, b_stride);
                LOAD(7, b + k * b_stride + j + SIDE, b_stride);
                DOT(0, 4, 6);
                DOT(1, 4, 7);
                DOT(2, 5, 6);
                DOT(3, 5, 7);
            }
            store_sums(sums, c_stride);
        }
    SETTLE;
}

/* Some tokens of a head next to each other, zeros after them. `places` says which; without it they follow `first`. */
static void gather(Heads row, int64_t head, const int64_t *places, int64_t first, int64_t count, int64_t width,
                   int64_t filled_count, void *to) {
    number *next = to;
    for (int64_t i = 0; i < count; i++, next += width)
        memcpy(next, row.at + head * row.head + (places ? places[i] : first + i) * row.token, width * sizeof *next);
    memset(next, 0, (filled_count - count) * width * sizeof *next);
}

/* A key head, a stretch and a part of its queries. What the stretch sees are the row's `places`, or `first` and on where
 * there are none; `heads` from `head` on share the key head. */
typedef struct {
    int64_t part, key_head, head, heads, first_query, queries, first, seen, keys;
    const int64_t *places;
} Task;

static Task task_of(int64_t index, int64_t parts, int64_t heads, int64_t key_heads, Stretches s) {
    int64_t stretch = index / parts / key_heads;
    Task t = {.part = index % parts, .key_head = index / parts % key_heads, .heads = heads / key_heads};
    t.head = t.key_head * t.heads;
    t.first_query = s.until_query[stretch];
    t.queries = s.until_query[stretch + 1] - t.first_query;
    t.first = s.until_key[stretch];
    t.seen = s.until_key[stretch + 1] - t.first;
    t.keys = filled(t.seen, STEP);
    t.places = s.places ? s.places + t.first : NULL;
    return t;
}

/* Into how many tasks a stretch and key head is divided, so that there are some for every thread. */
static int64_t parts_of_each(Stretches s, int64_t key_heads, int threads) {
    int64_t tasks = s.count * key_heads, wanted = (2 * threads + tasks - 1) / tasks;
    int64_t blocks = (s.most_queries + ROWS - 1) / ROWS;
    return wanted < blocks ? wanted : blocks;
}

/* A task's keys or values, filled up. */
static void gather_keys(Heads row, const Task *t, int64_t width, void *to) {
    gather(row, t->key_head, t->places, t->first, t->seen, width, t->keys, to);
}

/* Some queries of a task's head, filled up to a block, or their gradients. */
static void gather_block(Heads row, const Task *t, int64_t head, int64_t start, int64_t rows, int64_t width, void *to) {
    gather(row, head, NULL, t->first_query + start, rows, width, ROWS, to);
}

/* Products of 32 queries with 32 keys, (STEP, STEP). keys: across, two neighbours of a key in a word. */
static void score_block(const uint32_t *queries, const uint32_t *keys, int64_t stride, int64_t half, float *to) {
    multiply(queries, half, keys, stride, STEP, STEP, 2 * half, 0, to, STEP);
}

/* Of 32 queries, what exponents are less, at first the score of the first key, and sums of their weights by the column
 * they are in. */
typedef struct { float most[STEP], totals[STEP][SIDE]; } Softmax;

/* Weights of 32 queries on 32 keys from their scores, unless one is well above `most`: then that is raised first, and
 * the `done` weights before them are made smaller. The first query sees `seen` of the keys, or each sees all. */
INLINE void weigh(Softmax *softmax, const float *scores, int all, int64_t seen, float scale, number *weights,
                  int64_t stride, int64_t done) {
    float totals[STEP][SIDE];
    for (int raised = 0;; raised = 1) {
        float above[SIDE] = {0}, most_above = 0;
        for (int row = 0; row < STEP; row++) {
            const float *left = scores + row * STEP, *right = left + SIDE;
            float most = softmax->most[row], x[SIDE], y[SIDE];
            int32_t limit = all || seen + row > STEP ? STEP : seen + row;
#pragma omp simd
            for (int32_t j = 0; j < SIDE; j++) {
                x[j] = all || j < limit ? scale * left[j] - most : UNSEEN;
                y[j] = all || j + SIDE < limit ? scale * right[j] - most : UNSEEN;
                above[j] = x[j] > above[j] ? x[j] : above[j];
                above[j] = y[j] > above[j] ? y[j] : above[j];
                x[j] = all || j < limit ? exponential(x[j]) : 0;
                y[j] = all || j + SIDE < limit ? exponential(y[j]) : 0;
                totals[row][j] = softmax->totals[row][j] + x[j] + y[j];
            }
            narrow_row(x, y, weights + row * stride + done);
        }
        for (int j = 0; j < SIDE; j++) most_above = above[j] > most_above ? above[j] : most_above;
        if (raised || most_above <= MARGIN) break;
        float factor = exponential(-most_above);
        for (int row = 0; row < STEP; row++) {
            softmax->most[row] += most_above;
            for (int j = 0; j < SIDE; j++) softmax->totals[row][j] *= factor;
            for (int64_t j = 0; j < done; j++)
                weights[row * stride + j] = narrow(factor * widen(weights[row * stride + j]));
        }
    }
    memcpy(softmax->totals, totals, sizeof totals);
}

/* What 32 queries' weights on 32 keys are, and the gradient in their scores from that in their weights. lse: of the
 * queries; mean: the gradients' mean by a query's weights; `rows` of the queries are there. `grad_scores` has them in
 * rows, and both are in pairs of queries too, the first of them at `paired`. */
INLINE void weigh_backward(const float *scores, const float *gradients, int all, int64_t seen, int64_t rows, float scale,
                           const float *lse, const float *mean, number *grad_scores, uint32_t *weights_paired,
                           uint32_t *grad_scores_paired, int64_t stride) {
    for (int row = 0; row < STEP; row += 2) {
        float weights[2][STEP], grads[2][STEP];
        for (int odd = 0; odd < 2; odd++) {
            int64_t sees = row + odd < rows ? seen + row + odd : 0;
            int32_t limit = sees < STEP ? sees : STEP;
            const float *score = scores + (row + odd) * STEP, *gradient = gradients + (row + odd) * STEP;
            float less = lse[row + odd], middle = mean[row + odd];
#pragma omp simd
            for (int32_t j = 0; j < STEP; j++) {
                float weight = all || j < limit ? exponential(scale * score[j] - less) : 0;
                weights[odd][j] = weight;
                grads[odd][j] = scale * weight * (gradient[j] - middle);
            }
            narrow_row(grads[odd], grads[odd] + SIDE, grad_scores + (row + odd) * stride);
        }
        for (int half = 0; half < STEP; half += SIDE) {
            narrow_pairs(weights[0] + half, weights[1] + half, weights_paired + row / 2 * stride + half);
            narrow_pairs(grads[0] + half, grads[1] + half, grad_scores_paired + row / 2 * stride + half);
        }
    }
}

/* c += x^T y, sums over a block of queries. x: (ROWS, width); y: (ROWS, columns), two queries of a column in a word; c:
 * (width, columns). */
static void add_products(const void *x, int64_t width, const uint32_t *y, int64_t columns, int64_t y_stride,
                         uint32_t *paired, uint32_t *across, float *c) {
    pair_across(x, width, ROWS / 2, width, paired, across, ROWS / 2);
    multiply(across, ROWS / 2, y, y_stride, width, columns, ROWS, 1, c, y_stride);
}

/* A task's gradients, (width, keys), to their place in (parts, key heads, places, width). */
static void put_gradients(const float *sum, const Task *t, int64_t place, int64_t width, uint32_t *turned, float *to) {
    transpose((const uint32_t *)sum, t->keys, width, t->keys, turned, width);
    memcpy(to + place * width, turned, 4 * t->seen * width);
}

/* What queries attend to. q, k, v: queries, keys, values; y: the result; lse: of each query's scores, (heads, tokens). */
void attention(Heads q, Heads k, Heads v, Heads y, float *lse, int64_t width, Stretches s, float scale, int threads) {
    int64_t parts = parts_of_each(s, k.heads, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < parts * k.heads * s.count; index++) {
        Task t = task_of(index, parts, q.heads, k.heads, s);
        int64_t half = width / 2, of_keys = t.keys * half;
        uint32_t *memory = own_memory(3 * of_keys + ROWS * (t.keys + 2 * width));
        uint32_t *next = memory, *plain = take(&next, of_keys), *keys = take(&next, of_keys);
        uint32_t *values = take(&next, of_keys), *queries = take(&next, ROWS * half);
        float *block = take(&next, ROWS * width), scores[2][BLOCK];
        number *weights = take(&next, ROWS * t.keys / 2);
        Configuration before;
        take_tiles(&before);
        gather_keys(k, &t, width, plain);
        transpose(plain, half, t.keys, half, keys, t.keys);
        gather_keys(v, &t, width, plain);
        pair_rows((number *)plain, width, t.keys / 2, width, values, width);
        for (int64_t head = t.head; head < t.head + t.heads; head++)
            for (int64_t start = t.part * ROWS; start < t.queries; start += parts * ROWS) {
                int64_t rows = t.queries - start < ROWS ? t.queries - start : ROWS;
                int64_t visible = t.seen - t.queries + start + 1, columns = filled(visible + rows - 1, STEP);
                Softmax softmaxes[ROWS / STEP] = {0};
                gather_block(q, &t, head, start, rows, width, queries);
                for (int64_t i = 0; i < ROWS; i += STEP) {
                    Softmax *softmax = softmaxes + i / STEP;
                    number *to = weights + i * t.keys;
                    score_block(queries + i * half, keys, t.keys, half, scores[0]);
                    for (int row = 0; row < STEP; row++) softmax->most[row] = scale * scores[0][row * STEP];
                    for (int64_t j = 0; j < columns; j += STEP) {
                        const float *of_keys = scores[j / STEP % 2];
                        int64_t seen = visible + i - j, next_keys = j + STEP;
                        if (next_keys < columns) /* while these are weighed */
                            score_block(queries + i * half, keys + next_keys, t.keys, half, scores[next_keys / STEP % 2]);
                        if (seen >= STEP) weigh(softmax, of_keys, 1, seen, scale, to, t.keys, j);
                        else weigh(softmax, of_keys, 0, seen, scale, to, t.keys, j);
                    }
                }
                multiply((uint32_t *)weights, t.keys / 2, values, width, ROWS, width, columns, 0, block, width);
                for (int64_t i = 0; i < rows; i++) {
                    const Softmax *softmax = softmaxes + i / STEP;
                    int64_t token = t.first_query + start + i;
                    float total = 0;
                    for (int j = 0; j < SIDE; j++) total += softmax->totals[i % STEP][j];
                    for (int64_t j = 0; j < width; j++) block[i * width + j] /= total;
                    narrow_many(block + i * width, width, y.at + head * y.head + token * y.token);
                    lse[head * q.tokens + token] = softmax->most[i % STEP] + logf(total);
                }
            }
        leave_tiles(&before);
    }
}

/* The gradients in keys or values from those of what each stretch sees, of each part of its queries: (parts, key heads,
 * places, width). */
static void sum_gradients(const float *of_parts, int64_t parts, int64_t width, Stretches s, Heads to, int threads) {
    int64_t tokens = to.tokens, seen = s.until_key[s.count];
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
void attention_backward(Heads q, Heads k, Heads v, Heads y, const float *lse, Heads g, int64_t width, Stretches s,
                        float scale, Heads grad_q, Heads grad_k, Heads grad_v, int threads) {
    int64_t parts = parts_of_each(s, k.heads, threads), size = parts * k.heads * s.until_key[s.count] * width;
    float *of_parts = malloc(2 * sizeof *of_parts * size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < parts * k.heads * s.count; index++) {
        Task t = task_of(index, parts, q.heads, k.heads, s);
        int64_t half = width / 2, of_keys = t.keys * half;
        uint32_t *memory = own_memory(8 * of_keys + ROWS * (2 * t.keys + 4 * width));
        uint32_t *next = memory, *plain = take(&next, of_keys), *keys = take(&next, of_keys);
        uint32_t *values = take(&next, of_keys), *keys_paired = take(&next, of_keys);
        uint32_t *queries = take(&next, ROWS * half), *gradients = take(&next, ROWS * half);
        uint32_t *paired = take(&next, ROWS * half), *across = take(&next, ROWS * half);
        uint32_t *weights_paired = take(&next, ROWS / 2 * t.keys), *grads_paired = take(&next, ROWS / 2 * t.keys);
        float scores[2][BLOCK], grad_weights[2][BLOCK];
        float *block = take(&next, ROWS * width), *sum_k = take(&next, 2 * of_keys), *sum_v = take(&next, 2 * of_keys);
        number *grad_scores = take(&next, ROWS * t.keys / 2);
        Configuration before;
        take_tiles(&before);
        gather_keys(k, &t, width, plain);
        transpose(plain, half, t.keys, half, keys, t.keys);
        pair_rows((number *)plain, width, t.keys / 2, width, keys_paired, width);
        gather_keys(v, &t, width, plain);
        transpose(plain, half, t.keys, half, values, t.keys);
        memset(sum_k, 0, 8 * of_keys);
        memset(sum_v, 0, 8 * of_keys);
        for (int64_t head = t.head; head < t.head + t.heads; head++)
            for (int64_t start = t.part * ROWS; start < t.queries; start += parts * ROWS) {
                int64_t rows = t.queries - start < ROWS ? t.queries - start : ROWS;
                int64_t visible = t.seen - t.queries + start + 1, columns = filled(visible + rows - 1, STEP);
                int64_t token = t.first_query + start;
                float mean[ROWS] = {0}, less[ROWS] = {0};
                gather_block(q, &t, head, start, rows, width, queries);
                gather_block(g, &t, head, start, rows, width, gradients);
                memcpy(less, lse + head * q.tokens + token, 4 * rows);
                for (int64_t i = 0; i < rows; i++) {
                    const number *gradient = (number *)gradients + i * width;
                    const number *result = y.at + head * y.head + (token + i) * y.token;
                    for (int64_t j = 0; j < width; j++) mean[i] += widen(gradient[j]) * widen(result[j]);
                }
                for (int64_t i = 0; i < ROWS; i += STEP) {
                    const uint32_t *some = queries + i * half, *some_gradients = gradients + i * half;
                    score_block(some, keys, t.keys, half, scores[0]);
                    score_block(some_gradients, values, t.keys, half, grad_weights[0]);
                    for (int64_t j = 0; j < columns; j += STEP) {
                        int at = j / STEP % 2;
                        if (j + STEP < columns) { /* while these are weighed */
                            score_block(some, keys + j + STEP, t.keys, half, scores[!at]);
                            score_block(some_gradients, values + j + STEP, t.keys, half, grad_weights[!at]);
                        }
                        int64_t seen = visible + i - j, there = rows - i, place = i / 2 * t.keys + j;
                        const float *score = scores[at], *grad = grad_weights[at], *l = less + i, *m = mean + i;
                        number *to = grad_scores + i * t.keys + j;
                        uint32_t *pairs = weights_paired + place, *grad_pairs = grads_paired + place;
                        if (seen >= STEP && there >= STEP)
                            weigh_backward(score, grad, 1, seen, there, scale, l, m, to, pairs, grad_pairs, t.keys);
                        else weigh_backward(score, grad, 0, seen, there, scale, l, m, to, pairs, grad_pairs, t.keys);
                    }
                }
                multiply((uint32_t *)grad_scores, t.keys / 2, keys_paired, width, ROWS, width, columns, 0, block,
                         width);
                for (int64_t i = 0; i < rows; i++)
                    narrow_many(block + i * width, width, grad_q.at + head * grad_q.head + (token + i) * grad_q.token);
                add_products(queries, width, grads_paired, columns, t.keys, paired, across, sum_k);
                add_products(gradients, width, weights_paired, columns, t.keys, paired, across, sum_v);
            }
        int64_t place = (t.part * k.heads + t.key_head) * s.until_key[s.count] + t.first;
        put_gradients(sum_k, &t, place, width, memory, of_parts); /* the memory's first is done with */
        put_gradients(sum_v, &t, place, width, memory, of_parts + size);
        leave_tiles(&before);
    }
    sum_gradients(of_parts, parts, width, s, grad_k, threads);
    sum_gradients(of_parts + size, parts, width, s, grad_v, threads);
    free(of_parts);
}
