/* Decoding: decoder layers over rows, which are tokens of many sequences, one call for all layers, and drawing tokens.
 *
 * What a row becomes does not depend on the rows beside it: its sums are always added in the same order. Weights are read as
 * they lie, as packing would take longer than the few products that are made with each.
 *
 * Keys and values lie in blocks of 16 tokens of a sequence, which have for every layer and key head
 *
 *          keys, words of two elements                 values
 *               token 0  1 .. 15                             element 0 1 .. width - 1
 *      k 0 1  |  k00k01 ...                         token 0 |  v00 v01 ...
 *      k 2 3  |                                     token 1 |
 */
#include "elementwise.h"
#include "gemm.h"

#define ROWS_AT_ONCE (LANES == TILE ? 6 : 3) /* with 4 columns: as many sums as fit in registers */
#define ROW_BLOCK 48                         /* rows that fit in L2 beside weights */
#define ROW_PART 12                          /* rows of a task where there are few columns */
#define CHAINS 4                             /* of sums that do not wait for each other */
#define MASKED -1e30f
#define NUCLEUS_DEPTH 32                     /* that the logits of a nucleus lie apart at most */

/* Elements along the depth in one vector: of a row, packed, of a weight, and the sums of their products. */
#if VNNI == 2
#define DEPTH 32
typedef __m512bh Operand;
INLINE Operand load_packed(const Packed *x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE Operand load_weight(const bf16 *x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE SimdF32 add_products(SimdF32 sums, Operand x, Operand y) { return _mm512_dpbf16_ps(sums, x, y); }
/* Two elements of a query times words of as many keys as there are lanes. */
INLINE SimdF32 add_words(SimdF32 sums, const bf16 *x, const bf16 *words) {
    int32_t word;
    memcpy(&word, x, 4);
    return add_products(sums, (__m512bh)_mm512_set1_epi32(word), load_weight(words));
}
#else
#define DEPTH LANES
typedef SimdF32 Operand;
INLINE Operand load_packed(const Packed *x) { return simd_load(x); }
INLINE Operand load_weight(const bf16 *x) { return simd_load_bf16(x); }
INLINE SimdF32 add_products(SimdF32 sums, Operand x, Operand y) { return MM(fmadd_ps)(x, y, sums); }
INLINE SimdF32 add_words(SimdF32 sums, const bf16 *x, const bf16 *words) {
    SimdU32 both = *(const SimdWords *)words;
    sums = add_products(sums, simd_set(bf16_to_f32(x[0])), (SimdF32)(both << 16));
    return add_products(sums, simd_set(bf16_to_f32(x[1])), (SimdF32)(both & 0xffff0000));
}
#endif

/* Rows, packed, and columns of weights, as many elements each. */
typedef struct { const Packed *x; const bf16 *w; int64_t depth; } Factors;

INLINE void add_factors(int rows, SimdF32 (*sums)[4], Factors f) {
    for (int64_t k = 0; k < f.depth; k += DEPTH) {
        Operand w[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) w[j] = load_weight(f.w + j * f.depth + k);
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            Operand x = load_packed(f.x + i * f.depth + k);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[i][j] = add_products(sums[i][j], x, w[j]);
        }
    }
}

/* The sums over four vectors' lanes. */
INLINE __m128 add_lanes(const SimdF32 *x) {
    __m256 half[4], sums;
    for (int j = 0; j < 4; j++)
#if LANES == 16
        half[j] = _mm256_add_ps(_mm512_castps512_ps256(x[j]), _mm512_extractf32x8_ps(x[j], 1));
#else
        half[j] = x[j];
#endif
    sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* c = x w^T + hidden b^T for some rows and 4 columns. */
INLINE void multiply_rows(int rows, Factors base, Factors adapter, float *c) {
    SimdF32 sums[6][4];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = (SimdF32){0};
    add_factors(rows, sums, base);
    add_factors(rows, sums, adapter);
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) _mm_storeu_ps(c + i * BLOCK, add_lanes(sums[i]));
}

/* The same for up to ROW_BLOCK rows and 32 columns. */
static __attribute__((noinline)) void multiply_block(int64_t rows, Factors base, Factors adapter, float *c) {
    for (int64_t j = 0; j < BLOCK; j += 4)
        for (int64_t i = 0, some; i < rows; i += some) {
            Factors f = {base.x + i * base.depth, base.w + j * base.depth, base.depth};
            Factors f2 = {adapter.x + i * adapter.depth, adapter.w + j * adapter.depth, adapter.depth};
            float *to = c + i * BLOCK + j;
#define CASE(n) case n: multiply_rows(n, f, f2, to); break;
            switch (some = smaller(rows - i, ROWS_AT_ONCE)) {
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
            }
#undef CASE
        }
}

static Factors factors(const Packed *x, const bf16 *w, int64_t depth, int64_t row, int64_t column) {
    return (Factors){x + row * depth, w + column * depth, depth};
}

/* 32 columns of a linear layer, of up to ROW_BLOCK rows: x w^T + hidden b^T + bias. */
static void linear_block(const RowLinear *l, const Packed *x, const Packed *hidden, int64_t row, int64_t rows, int64_t column,
                         float *c) {
    const bf16 *b = l->rank ? l->b : l->w;
    multiply_block(rows, factors(x, l->w, l->depth, row, column), factors(hidden, b, l->rank, row, column), c);
    for (int64_t i = 0; l->bias && i < rows; i++)
        for (int j = 0; j < BLOCK; j++) c[i * BLOCK + j] += bf16_to_f32(l->bias[column + j]);
}

/* What follows is called by all threads, which share the work; those after a `nowait` have to wait before it is used. */

/* hidden = x a^T of layers with one input, one after the other. */
static void adapter_hidden(const RowLinear *l, int count, const Packed *x, int64_t rows, Packed *hidden) {
    float c[ROW_BLOCK * BLOCK];
    if (!l->rank) return;
    int64_t parts = (rows + ROW_PART - 1) / ROW_PART, columns = l->rank / BLOCK;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < count * columns * parts; task++) {
        int64_t i = task % parts * ROW_PART, j = task / parts % columns * BLOCK, k = task / parts / columns;
        int64_t some = smaller(rows - i, ROW_PART);
        multiply_block(some, factors(x, l[k].a, l->depth, i, j), factors(x, l[k].a, 0, 0, 0), c);
        for (int64_t row = 0; row < some; row++)
            pack_floats(c + row * BLOCK, hidden + (k * rows + i + row) * l->rank + j);
    }
}

/* y = x w^T + hidden b^T + bias + added. Shape of y and `added`: (rows, stride). */
static void linear(const RowLinear *l, const Packed *x, const Packed *hidden, int64_t rows, const bf16 *added, bf16 *y,
                   int64_t stride) {
    float c[ROW_BLOCK * BLOCK];
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < l->columns; j += BLOCK)
        for (int64_t i = 0; i < rows; i += ROW_BLOCK) {
            int64_t some = smaller(rows - i, ROW_BLOCK), place = i * stride + j;
            linear_block(l, x, hidden, i, some, j, c);
            store_block(c, added ? added + place : NULL, y + place, stride, (int)some);
        }
}

/* y = silu(gate) up */
static void gated(const RowLinear *gate, const RowLinear *up, const Packed *x, const Packed *hidden, int64_t rows, Packed *y) {
    float c[ROW_BLOCK * BLOCK], c_up[ROW_BLOCK * BLOCK];
#pragma omp for schedule(static)
    for (int64_t j = 0; j < gate->columns; j += BLOCK)
        for (int64_t i = 0; i < rows; i += ROW_BLOCK) {
            int64_t some = smaller(rows - i, ROW_BLOCK);
            linear_block(gate, x, hidden, i, some, j, c);
            linear_block(up, x, hidden + rows * gate->rank, i, some, j, c_up);
            for (int64_t k = 0; k < some * BLOCK; k += LANES) {
                SimdF32 z = simd_load(c + k);
                simd_store(z * sigmoid(z) * simd_load(c_up + k), c + k);
            }
            for (int64_t row = 0; row < some; row++) pack_floats(c + row * BLOCK, y + (i + row) * gate->columns + j);
        }
}

static void norm(const bf16 *x, const bf16 *weight, float epsilon, int64_t width, Packed *to) {
    float scale = inverse_rms(x, width, epsilon);
    for (int64_t j = 0; j < width; j++) to[j] = to_packed(bf16_to_f32(weight[j]) * bf16_to_f32(f32_to_bf16(bf16_to_f32(x[j]) * scale)));
}

static void norm_rows(const DecodeArgs *g, const bf16 *weight, float epsilon) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g->rows; i++) norm(g->x + i * g->width, weight, epsilon, g->width, (Packed *)g->packed + i * g->width);
}

/* A head of a row's queries or keys, in place. */
static void place_head(const DecodeArgs *g, const CachedLayer *l, int64_t row, bf16 *head, int is_key) {
    const bf16 *weight = l->head_norms[is_key];
    float scale = weight ? inverse_rms(head, g->head_width, l->epsilons[0]) : 1;
    for (int64_t j = 0; weight && j < g->head_width; j++)
        head[j] = f32_to_bf16(bf16_to_f32(weight[j]) * bf16_to_f32(f32_to_bf16(bf16_to_f32(head[j]) * scale)));
    rotate(head, g->cosine + row * g->head_width, g->sine + row * g->head_width, 0, g->head_width / 2, head);
}

/* The keys of a block of the cache; its values follow them. */
static bf16 *cached(const DecodeArgs *g, int64_t layer, int64_t row, int64_t block, int64_t key_head) {
    bf16 *start = g->blocks[g->sequence[row] * g->blocks_per_sequence + block];
    return start + (layer * g->key_heads + key_head) * 2 * TILE * g->head_width;
}

/* Keys and values of a row, into the cache. */
static void cache_row(const DecodeArgs *g, int64_t layer, int64_t row) {
    int64_t width = g->head_width, token = g->position[row] % TILE, stride = (g->heads + 2 * g->key_heads) * width;
    for (int64_t h = 0; h < g->key_heads; h++) {
        bf16 *key = g->qkv + row * stride + (g->heads + h) * width, *keys = cached(g, layer, row, g->position[row] / TILE, h);
        place_head(g, g->layers + layer, row, key, 1);
        for (int64_t j = 0; j < width; j++) keys[(j / 2 * TILE + token) * 2 + j % 2] = key[j];
        memcpy(keys + (TILE + token) * width, key + g->key_heads * width, width * sizeof *key);
    }
}

/* The scores of a query with the 16 keys of a block. */
static void block_scores(const bf16 *query, const bf16 *keys, int64_t width, float *scores) {
    for (int64_t token = 0; token < TILE; token += LANES) {
        SimdF32 sums[CHAINS] = {0};
        for (int64_t j = 0; j < width / 2; j += CHAINS)
#pragma GCC unroll 4
            for (int64_t chain = 0; chain < CHAINS; chain++) {
                int64_t word = j + chain;
                sums[chain] = add_words(sums[chain], query + 2 * word, keys + (word * TILE + token) * 2);
            }
        simd_store(sums[0] + sums[1] + (sums[2] + sums[3]), scores + token);
    }
}

/* y += weights * values of a block. */
static void add_values(const float *weights, int64_t tokens, const bf16 *values, int64_t width, float *y) {
    for (int64_t j = 0; j < width; j += 2 * LANES) {
        SimdF32 sums[2][2] = {{simd_load(y + j), simd_load(y + j + LANES)}};
        for (int64_t token = 0; token < tokens; token++)
#pragma GCC unroll 2
            for (int k = 0; k < 2; k++)
                sums[token % 2][k] += weights[token] * simd_load_bf16(values + token * width + j + k * LANES);
        for (int k = 0; k < 2; k++) simd_store(sums[0][k] + sums[1][k], y + j + k * LANES);
    }
}

/* Attention of a row's queries that share a key head. */
static void attend(const DecodeArgs *g, int64_t layer, int64_t row, int64_t key_head, Packed *to) {
    int64_t width = g->head_width, heads = g->heads / g->key_heads, tokens = g->position[row] + 1;
    int64_t padded = round_up(tokens, TILE), stride = (g->heads + 2 * g->key_heads) * width;
    bf16 *queries = g->qkv + row * stride + key_head * heads * width;
    float scale = LOG2E * g->layers[layer].scale, *scores, *y;
    if (!SCRATCH(BUFFER(scores, padded * heads), BUFFER(y, width * heads))) return;
    memset(y, 0, width * heads * sizeof *y);
    for (int64_t h = 0; h < heads; h++) place_head(g, g->layers + layer, row, queries + h * width, 0);
    for (int64_t i = 0; i < padded; i += TILE)
        for (int64_t h = 0; h < heads; h++)
            block_scores(queries + h * width, cached(g, layer, row, i / TILE, key_head), width, scores + h * padded + i);
    for (int64_t h = 0; h < heads; h++) {
        float *own = scores + h * padded, sum = 0, largest = MASKED;
        for (int64_t i = tokens; i < padded; i++) own[i] = MASKED;
        SimdF32 most = simd_set(MASKED), sums = {0};
        for (int64_t i = 0; i < padded; i += LANES) most = simd_max(simd_load(own + i), most);
        for (int i = 0; i < LANES; i++) largest = fmaxf(largest, most[i]);
        for (int64_t i = 0; i < padded; i += LANES) {
            SimdF32 weights = simd_exp2(scale * (simd_load(own + i) - largest));
            simd_store(weights, own + i), sums += weights;
        }
        sum = 1 / simd_sum(sums);
        for (int64_t i = 0; i < padded; i += LANES) simd_store(sum * simd_load(own + i), own + i);
    }
    for (int64_t i = 0; i < tokens; i += TILE)
        for (int64_t h = 0; h < heads; h++) {
            const bf16 *values = cached(g, layer, row, i / TILE, key_head) + TILE * width;
            add_values(scores + h * padded + i, smaller(tokens - i, TILE), values, width, y + h * width);
        }
    for (int64_t j = 0; j < heads * width; j += BLOCK) pack_floats(y + j, to + j);
}

static void decode_layer(const DecodeArgs *g, int64_t layer) {
    const CachedLayer *l = g->layers + layer;
    int64_t rows = g->rows, width = g->head_width, heads = g->heads, key_heads = g->key_heads;
    int64_t stride = (heads + 2 * key_heads) * width;
    Packed *packed = g->packed, *hidden = g->lora_hidden, *gates = g->gates;
    norm_rows(g, l->norms[0], l->epsilons[0]);
    adapter_hidden(&l->q, 3, packed, rows, hidden);
    linear(&l->q, packed, hidden, rows, NULL, g->qkv, stride);
    linear(&l->k, packed, hidden + rows * l->q.rank, rows, NULL, g->qkv + heads * width, stride);
    linear(&l->v, packed, hidden + 2 * rows * l->q.rank, rows, NULL, g->qkv + (heads + key_heads) * width, stride);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++) cache_row(g, layer, i);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < rows * key_heads; i++)
        attend(g, layer, i / key_heads, i % key_heads, packed + i * heads / key_heads * width);
    adapter_hidden(&l->output, 1, packed, rows, hidden);
    linear(&l->output, packed, hidden, rows, g->x, g->x, g->width);
#pragma omp barrier
    norm_rows(g, l->norms[1], l->epsilons[1]);
    adapter_hidden(&l->gate, 2, packed, rows, hidden);
    gated(&l->gate, &l->up, packed, hidden, rows, gates);
    adapter_hidden(&l->down, 1, gates, rows, hidden);
    linear(&l->down, gates, hidden, rows, g->x, g->x, g->width);
#pragma omp barrier
}

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
static float nucleus_end(const float *z, int64_t size, float largest, float mass, const float *weights) {
    float low = largest - NUCLEUS_DEPTH, high = largest;
    for (int step = 0; step < 20; step++) {
        float middle = low + (high - low) / 2;
        SimdF32 sums = {0};
        for (int64_t j = 0; j < size; j += LANES)
            sums += (SimdF32)((SimdU32)simd_load(weights + j) & (SimdU32)(simd_load(z + j) >= middle));
        if (simd_sum(sums) >= mass) low = middle;
        else high = middle;
    }
    return low;
}

/* A token: the likeliest, or above a temperature of 0 one of the nucleus, by a number between 0 and 1. */
static void draw(const DecodeArgs *g, int64_t i) {
    const float *z = g->logits + i * g->head.columns;
    int64_t size = g->head.columns, token = 0;
    float largest = z[0], low = -INFINITY, *weights;
    if (!SCRATCH(BUFFER(weights, size))) return;
    for (int64_t j = 1; j < size; j++)
        if (z[j] > largest) largest = z[j], token = j;
    float total = powers(z, size, largest, LOG2E, low, weights);
    if (g->temperature[i] > 0) {
        if (g->top_p[i] < 1) low = nucleus_end(z, size, largest, g->top_p[i] * total, weights);
        float left = g->uniform[i] * powers(z, size, largest, LOG2E / g->temperature[i], low, weights);
        for (int64_t j = 0; j < size; j++)
            if ((left -= weights[j]) < 0) {
                token = j;
                break;
            }
    }
    g->token[i] = token, g->logprob[i] = z[token] - largest - logf(total);
}

/* Draws a token after some of the rows. */
static void draw_tokens(const DecodeArgs *g) {
    const RowLinear *head = &g->head;
    Packed *packed = g->packed;
    float c[ROW_BLOCK * BLOCK];
#pragma omp for schedule(static)
    for (int64_t i = 0; i < g->draws; i++)
        norm(g->x + g->drawn_row[i] * g->width, g->norm, g->epsilon, g->width, packed + i * g->width);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < head->columns; j += BLOCK)
        for (int64_t i = 0; i < g->draws; i += ROW_BLOCK) {
            int64_t some = smaller(g->draws - i, ROW_BLOCK);
            linear_block(head, packed, packed, i, some, j, c);
            for (int64_t row = 0; row < some; row++)
                memcpy(g->logits + (i + row) * head->columns + j, c + row * BLOCK, BLOCK * sizeof *c);
        }
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
