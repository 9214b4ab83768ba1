/* Attention over a packed row and its gradient, in bf16, in tiles of a processor's matrix registers (AMX).
 *
 * A stretch of the row is some queries that are the last of the keys they see. A task is a key head, a stretch and one
 * of `parts` of its queries: every `parts`th block of ROWS, whose scores with all they see fit in a core's cache.
 */
#include "tiles.h"

#define UNSEEN -1e30f

/* c (+)= a b. a: (rows, depth), two neighbours of a row in a word; b: (depth, columns), two of a column in a word. All
 * sizes are multiples of STEP; strides are in words. */
static void multiply(const uint32_t *a, int64_t a_stride, const uint32_t *b, int64_t b_stride, int64_t rows,
                     int64_t columns, int64_t depth, int add, float *c, int64_t c_stride) {
    SETTLE;
    for (int64_t i = 0; i < rows; i += STEP)
        for (int64_t j = 0; j < columns; j += STEP) {
            float *upper = c + i * c_stride + j, *lower = upper + SIDE * c_stride;
            if (add) {
                LOAD(0, upper, c_stride);
                LOAD(1, upper + SIDE, c_stride);
                LOAD(2, lower, c_stride);
                LOAD(3, lower + SIDE, c_stride);
            } else {
                CLEAR(0);
                CLEAR(1);
                CLEAR(2);
                CLEAR(3);
            }
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
            STORE(0, upper, c_stride);
            STORE(1, upper + SIDE, c_stride);
            STORE(2, lower, c_stride);
            STORE(3, lower + SIDE, c_stride);
        }
    SETTLE;
}

/* A tensor of heads and tokens, with the strides of both. */
typedef struct { number *at; int64_t head, token; } Row;

/* Some tokens of a head next to each other, zeros after them. `places` says which; without it they follow `first`. */
static void gather(Row row, int64_t head, const int64_t *places, int64_t first, int64_t count, int64_t width,
                   int64_t filled_count, void *to) {
    number *next = to;
    for (int64_t i = 0; i < count; i++, next += width)
        memcpy(next, row.at + head * row.head + (places ? places[i] : first + i) * row.token, width * sizeof *next);
    memset(next, 0, (filled_count - count) * width * sizeof *next);
}

/* e^(scale (score - the largest)) of the scores a query sees, over them, and zeros after them; returns their sum. By
 * whole vectors: the last few take longer one by one. */
static float powers(float *restrict scores, int64_t visible, int64_t columns, float scale) {
    int64_t whole = filled(visible, SIDE);
    float *last = scores + whole - SIDE, most = UNSEEN, total = 0;
    memset(scores + whole, 0, 4 * (columns - whole));
    if (!visible) return 0;
    int seen = visible - whole + SIDE;
    for (int j = 0; j < SIDE; j++) last[j] = j < seen ? last[j] : UNSEEN;
    for (int64_t j = 0; j < whole; j++) most = scores[j] > most ? scores[j] : most;
    for (int64_t j = 0; j < whole; j++) total += scores[j] = exponential(scale * (scores[j] - most));
    for (int j = 0; j < SIDE; j++) last[j] = j < seen ? last[j] : 0;
    return total;
}

/* A key head, a stretch and a part of its queries. What the stretch sees are the row's `places`, or `first` and on where
 * there are none; `heads` from `head` on share the key head. */
typedef struct {
    int64_t part, key_head, head, heads, first_query, queries, first, seen, keys;
    const int64_t *places;
} Task;

static Task task_of(int64_t index, int parts, int64_t heads, int64_t key_heads, const int64_t *places,
                    const int32_t *until_query, const int32_t *until_key) {
    int64_t stretch = index / parts / key_heads;
    Task t = {.part = index % parts, .key_head = index / parts % key_heads, .heads = heads / key_heads};
    t.head = t.key_head * t.heads;
    t.first_query = until_query[stretch];
    t.queries = until_query[stretch + 1] - t.first_query;
    t.first = until_key[stretch];
    t.seen = until_key[stretch + 1] - t.first;
    t.keys = filled(t.seen, STEP);
    t.places = places ? places + t.first : NULL;
    return t;
}

/* A task's keys or values, filled up. */
static void gather_keys(Row row, const Task *t, int64_t width, void *to) {
    gather(row, t->key_head, t->places, t->first, t->seen, width, t->keys, to);
}

/* Some queries of a task's head, filled up to a block, or their gradients. */
static void gather_block(Row row, const Task *t, int64_t head, int64_t start, int64_t rows, int64_t width, void *to) {
    gather(row, head, NULL, t->first_query + start, rows, width, ROWS, to);
}

/* c += x^T y, sums over a block of queries. x: (ROWS, width), y: (ROWS, columns) of `y_stride` numbers; c: (width,
 * columns). Two queries of a column are put in a word, x's across. */
static void add_products(const void *x, int64_t width, const number *y, int64_t columns, int64_t y_stride,
                         uint32_t *paired, uint32_t *across, float *c) {
    pair_rows(x, width, ROWS / 2, width, paired, width);
    transpose(paired, width, ROWS / 2, width, across, ROWS / 2);
    pair_rows(y, y_stride, ROWS / 2, columns, paired, y_stride);
    multiply(across, ROWS / 2, paired, y_stride, width, columns, ROWS, 1, c, y_stride);
}

/* A task's gradients, (width, keys), to their place in (parts, key heads, places, width). */
static void put_gradients(const float *sum, const Task *t, int64_t place, int64_t width, uint32_t *turned, float *to) {
    transpose((const uint32_t *)sum, t->keys, width, t->keys, turned, width);
    memcpy(to + place * width, turned, 4 * t->seen * width);
}

/* What queries attend to. q, k, v: queries, keys, values; y: the result. until_query, until_key: (stretches + 1,), where
 * a stretch's queries begin in the row, and what it sees in `places`. */
void attention(number *q, int64_t q_head, int64_t q_token, number *k, int64_t k_head, int64_t k_token, number *v,
               int64_t v_head, int64_t v_token, number *y, int64_t y_head, int64_t y_token, int64_t heads,
               int64_t key_heads, int64_t width, const int64_t *places, const int32_t *until_query,
               const int32_t *until_key, int64_t stretches, float scale, int parts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < parts * key_heads * stretches; index++) {
        Task t = task_of(index, parts, heads, key_heads, places, until_query, until_key);
        int64_t half = width / 2, of_keys = t.keys * half;
        uint32_t *memory = own_memory(3 * of_keys + ROWS * (2 * t.keys + 2 * width));
        uint32_t *next = memory, *plain = take(&next, of_keys), *keys = take(&next, of_keys);
        uint32_t *values = take(&next, of_keys), *queries = take(&next, ROWS * half);
        float *scores = take(&next, ROWS * t.keys), *block = take(&next, ROWS * width);
        number *weights = take(&next, ROWS * t.keys / 2);
        Configuration before;
        take_tiles(&before);
        gather_keys((Row){k, k_head, k_token}, &t, width, plain);
        transpose(plain, half, t.keys, half, keys, t.keys);
        gather_keys((Row){v, v_head, v_token}, &t, width, plain);
        pair_rows((number *)plain, width, t.keys / 2, width, values, width);
        for (int64_t head = t.head; head < t.head + t.heads; head++)
            for (int64_t start = t.part * ROWS; start < t.queries; start += parts * ROWS) {
                int64_t rows = t.queries - start < ROWS ? t.queries - start : ROWS;
                int64_t visible = t.seen - t.queries + start + 1, columns = filled(visible + rows - 1, STEP);
                gather_block((Row){q, q_head, q_token}, &t, head, start, rows, width, queries);
                multiply(queries, half, keys, t.keys, ROWS, columns, width, 0, scores, t.keys);
                float totals[ROWS];
                for (int64_t i = 0; i < rows; i++) {
                    float *row = scores + i * t.keys;
                    totals[i] = powers(row, visible + i, columns, scale);
                    narrow_many(row, columns, weights + i * t.keys);
                }
                multiply((uint32_t *)weights, t.keys / 2, values, width, ROWS, width, columns, 0, block, width);
                for (int64_t i = 0; i < rows; i++) {
                    number *to = y + head * y_head + (t.first_query + start + i) * y_token;
                    for (int64_t j = 0; j < width; j++) block[i * width + j] /= totals[i];
                    narrow_many(block + i * width, width, to);
                }
            }
        leave_tiles(&before);
    }
}

/* The gradients in queries, keys and values from `g`, that in the result. Those in keys and values are of what a
 * stretch sees, one stretch after the other, and of each part of its queries: (parts, key heads, places, width). */
void attention_backward(number *q, int64_t q_head, int64_t q_token, number *k, int64_t k_head, int64_t k_token,
                        number *v, int64_t v_head, int64_t v_token, number *g, int64_t g_head, int64_t g_token,
                        int64_t heads, int64_t key_heads, int64_t width, const int64_t *places,
                        const int32_t *until_query, const int32_t *until_key, int64_t stretches, float scale, int parts,
                        number *grad_q, int64_t grad_q_head, int64_t grad_q_token, float *grad_k, float *grad_v,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t index = 0; index < parts * key_heads * stretches; index++) {
        Task t = task_of(index, parts, heads, key_heads, places, until_query, until_key);
        int64_t half = width / 2, of_keys = t.keys * half;
        uint32_t *memory = own_memory(8 * of_keys + ROWS * (4 * t.keys + 4 * width));
        uint32_t *next = memory, *plain = take(&next, of_keys), *keys = take(&next, of_keys);
        uint32_t *values = take(&next, of_keys), *keys_paired = take(&next, of_keys);
        uint32_t *queries = take(&next, ROWS * half), *gradients = take(&next, ROWS * half);
        uint32_t *paired = take(&next, ROWS / 2 * (t.keys > width ? t.keys : width));
        uint32_t *across = take(&next, ROWS * half);
        float *scores = take(&next, ROWS * t.keys), *grad_weights = take(&next, ROWS * t.keys);
        float *block = take(&next, ROWS * width), *sum_k = take(&next, 2 * of_keys), *sum_v = take(&next, 2 * of_keys);
        number *weights = take(&next, ROWS * t.keys / 2), *grad_scores = take(&next, ROWS * t.keys / 2);
        Configuration before;
        take_tiles(&before);
        gather_keys((Row){k, k_head, k_token}, &t, width, plain);
        transpose(plain, half, t.keys, half, keys, t.keys);
        pair_rows((number *)plain, width, t.keys / 2, width, keys_paired, width);
        gather_keys((Row){v, v_head, v_token}, &t, width, plain);
        transpose(plain, half, t.keys, half, values, t.keys);
        memset(sum_k, 0, 8 * of_keys);
        memset(sum_v, 0, 8 * of_keys);
        for (int64_t head = t.head; head < t.head + t.heads; head++)
            for (int64_t start = t.part * ROWS; start < t.queries; start += parts * ROWS) {
                int64_t rows = t.queries - start < ROWS ? t.queries - start : ROWS;
                int64_t visible = t.seen - t.queries + start + 1, columns = filled(visible + rows - 1, STEP);
                gather_block((Row){q, q_head, q_token}, &t, head, start, rows, width, queries);
                gather_block((Row){g, g_head, g_token}, &t, head, start, rows, width, gradients);
                multiply(queries, half, keys, t.keys, ROWS, columns, width, 0, scores, t.keys);
                multiply(gradients, half, values, t.keys, ROWS, columns, width, 0, grad_weights, t.keys);
                for (int64_t i = 0; i < ROWS; i++) {
                    float *restrict row = scores + i * t.keys, *restrict grad = grad_weights + i * t.keys;
                    float total = powers(row, i < rows ? visible + i : 0, columns, scale), mean = 0;
                    float share = i < rows ? 1 / total : 0;
                    for (int64_t j = 0; j < columns; j++) mean += row[j] * grad[j];
                    mean *= share;
                    for (int64_t j = 0; j < columns; j++) {
                        row[j] *= share;
                        grad[j] = scale * row[j] * (grad[j] - mean);
                    }
                    narrow_many(row, columns, weights + i * t.keys);
                    narrow_many(grad, columns, grad_scores + i * t.keys);
                }
                multiply((uint32_t *)grad_scores, t.keys / 2, keys_paired, width, ROWS, width, columns, 0, block,
                         width);
                for (int64_t i = 0; i < rows; i++) {
                    number *to = grad_q + head * grad_q_head + (t.first_query + start + i) * grad_q_token;
                    narrow_many(block + i * width, width, to);
                }
                add_products(queries, width, grad_scores, columns, t.keys, paired, across, sum_k);
                add_products(gradients, width, weights, columns, t.keys, paired, across, sum_v);
            }
        int64_t place = (t.part * key_heads + t.key_head) * until_key[stretches] + t.first;
        put_gradients(sum_k, &t, place, width, memory, grad_k); /* the memory's first is done with */
        put_gradients(sum_v, &t, place, width, memory, grad_v);
        leave_tiles(&before);
    }
}
