/* The library's interface, which `abi.py` repeats, and what its files share. Matrices are row-major in bf16 unless said
 * otherwise. Where memory is lacking, `failed_allocations` grows and what was to be computed is not. */
#pragma once
#include "simd.h"

#include <stddef.h>
#include <stdlib.h>

/* Rows in GGUF's blocks, of up to three kinds one below the other, the last of each before row `ends`, a multiple of 32. */
enum { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q6_K = 14 }; /* as GGML numbers them */
typedef struct { const uint8_t *data[3]; int64_t kinds[3], bytes[3], ends[3]; } QuantisedRows;

/* Of weights that are `quantised`, or of their transpose, it begins at a row and a column of theirs; data is not read. */
typedef struct {
    const bf16 *data;
    int64_t rows, columns, row_stride, column_stride;
    const QuantisedRows *quantised;
    int64_t first_row, first_column;
} Matrix;

/* y = a b + a2 b2 + added, in bf16, or c = a b, in fp32. One of the strides of b and b2 is 1; y, `added`, c: (rows, columns), rows
 * of `added` 0 apart for a bias; a2 and b2 may be empty, `added` NULL. Sizes are multiples of 32, but rows of y, and the depth of c,
 * where a and b are a transposed and a row-major matrix. */
typedef struct { Matrix a, b, a2, b2; const bf16 *added; bf16 *y; float *c; int64_t y_stride, added_stride; } GemmArgs;

/* A linear layer with LoRA, y = x w^T + lora_hidden b^T + bias where lora_hidden = x a^T. w: (columns, depth); bias: (columns), or
 * NULL; a: (rank, depth), or NULL; b: (columns, rank), scaled; y: (rows, columns). w may be `quantised`, or that NULL. It may be
 * several `parts` side by side: their A's lie on top of each other in a, their B's along a diagonal in b. */
typedef struct {
    const bf16 *w, *bias, *a, *b;
    int64_t depth, columns, y_stride, rank;
    int64_t parts, ranks[3], outputs[3];
    float scalings[3];
    const QuantisedRows *quantised;
} Linear;

/* A tensor (heads, tokens, head width) with the strides of both; a head's elements lie next to each other. */
typedef struct { bf16 *data; int64_t heads, tokens, head_stride, token_stride; } Heads;

/* Which tokens of a packed sequence see which: a segment's queries, [cu_seqlens_q[i], cu_seqlens_q[i + 1]), are the last of
 * its keys, key_tokens[cu_seqlens_k[i]] and on; without key_tokens a key's place is its token. */
typedef struct { const int64_t *key_tokens; const int32_t *cu_seqlens_q, *cu_seqlens_k; int64_t segments; } CuSeqlens;

/* lse: (heads, tokens), the log-sum-exp of each query's scores. grad_*: only for the backward pass. */
typedef struct {
    Heads q, k, v, y, grad_y, grad_q, grad_k, grad_v;
    float *lse;
    int64_t head_width;
    CuSeqlens seqlens;
    float scale;
} AttentionArgs;

/* Softmaxes over all tokens but those rejected at a node: `rejected_node` is sorted. weight: (vocabulary, width), both
 * multiples of 32; hidden: (nodes, width). row_max, one of a node's largest logits, and sum_exp: (nodes,); mean of weight's
 * rows by the softmax: (nodes, width); in fp32. */
typedef struct {
    const bf16 *weight, *hidden;
    const int64_t *rejected_token, *rejected_node;
    float *row_max, *sum_exp, *mean;
    int64_t vocabulary, width, nodes, rejections;
    float scale;
    const QuantisedRows *quantised;
} HeadSoftmaxArgs;

/* A layer of Llama's form: middle = x + output(attention(rope(qkv(norm(x))))), y = middle + down(swiglu(gate_up(norm(middle)))).
 * `output` and `down` have no bias; `scale` is on the scores. */
typedef struct {
    Linear qkv, output, gate_up, down;
    const bf16 *norms[2];
    float epsilons[2], scale;
    int64_t heads, key_heads, head_width;
} DecoderLayer;

typedef struct { const bf16 *cosine, *sine; int64_t tokens; CuSeqlens seqlens; } PackedSequence;

/* What a layer's backward pass needs of its forward pass, of (tokens, some width) but lse: its input; queries, keys and
 * values, rotated; attention's result; the residual stream in the middle; gate and up; each linear layer's lora_hidden. */
typedef struct { bf16 *x, *qkv, *attended, *middle, *gate_up, *lora_hidden[4]; float *lse; } SavedActivations;

/* A linear layer for few rows: y = x w^T + hidden b^T + bias, hidden being `rank` columns, from `first` on, of x a^T, which
 * layers with one input share. w: (columns, depth); a: (ranks, depth), or ranks 0; b: scaled, words of two columns, (columns / 32,
 * rank / 2, 32, 2); bias: (columns), or NULL. Sizes are multiples of 32, ranks of 8. */
typedef struct {
    const bf16 *w, *bias, *a, *b;
    int64_t depth, columns, rank, first, ranks;
    const QuantisedRows *quantised;
} RowLinear;

/* A layer of Llama's form. head_norms: RMSNorm's weights for the heads of queries and of keys, or NULL. */
typedef struct {
    RowLinear q, k, v, output, gate, up, down;
    const bf16 *norms[2], *head_norms[2];
    float epsilons[2], scale;
} CachedLayer;

/* Rows are tokens: of a `sequence`, at a `position` in it, whose keys and values come into its `blocks`, (sequences,
 * blocks_per_sequence), see decode.c. x: (rows, width), changed; cosine, sine: (rows, head width). A token is drawn after each
 * `drawn_row`. The last ones are memory to work in: (rows, width of queries, keys and values), (rows, width or that of all
 * queries), (rows, depth of down), (rows, ranks), and (draws, vocabulary). */
typedef struct {
    const CachedLayer *layers;
    int64_t count, heads, key_heads, head_width, width;
    RowLinear head;
    const bf16 *norm;
    float epsilon;
    bf16 *x;
    const bf16 *cosine, *sine;
    const int64_t *sequence, *position;
    bf16 *const *blocks;
    int64_t rows, blocks_per_sequence, draws;
    const int64_t *drawn_row;
    const float *temperature, *top_p, *uniform;
    int64_t *token;
    float *logprob;
    bf16 *qkv, *lora_hidden;
    void *packed, *gates;
    float *logits;
} DecodeArgs;

/* Memory. `limit_memory` is for tests: what would take more fails. NULL where there is none; it begins with a cache line. */
void *allocate(int64_t bytes);

/* A thread's memory, kept from call to call, as new pages would take longer than a task: each buffer begins with a cache
 * line, until the next call. Whether there is enough. */
typedef struct { void **pointer; int64_t bytes; } Buffer;
#define BUFFER(pointer, count) {(void **)&(pointer), (int64_t)sizeof *(pointer) * (count)}
#define SCRATCH(...) scratch((Buffer[]){__VA_ARGS__}, sizeof((Buffer[]){__VA_ARGS__}) / sizeof(Buffer))
int scratch(const Buffer *buffers, int count);

static inline Matrix row_major(const bf16 *x, int64_t rows, int64_t columns) {
    return (Matrix){x, rows, columns, columns, 1, NULL, 0, 0};
}
static inline Matrix transposed(const bf16 *x, int64_t rows, int64_t columns) {
    return (Matrix){x, columns, rows, 1, columns, NULL, 0, 0};
}
static inline Matrix quantised(Matrix x, const QuantisedRows *rows) { x.quantised = rows; return x; }
static inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void gemm(const GemmArgs *g, int threads);
void lora_linear(const Linear *l, const bf16 *x, const bf16 *added, int64_t rows, bf16 *lora_hidden, bf16 *y, int threads);
void lora_linear_input_gradient(const Linear *l, const bf16 *grad_y, int64_t rows, bf16 *grad_hidden, bf16 *grad_x, int threads);
void lora_linear_weight_gradients(const Linear *l, const bf16 *grad_y, const bf16 *x, const bf16 *hidden,
                                  const bf16 *grad_hidden, int64_t rows, float *grads, int threads);
void attention(const AttentionArgs *g, int threads);
void attention_backward(const AttentionArgs *g, int threads);
/* y = weight * x / rms(x), (rows, width), or with grad_y its gradient, plus `added`; grad_y, added, y may be NULL. */
void rms_norm(const bf16 *x, const bf16 *weight, float epsilon, const bf16 *grad_y, const bf16 *added, int64_t rows,
              int64_t width, bf16 *y, bf16 *grad_x, int threads);
/* y = silu(gate) * up, (rows, width), a multiple of 32, or with grad_y its gradient; both may be NULL. gate_up and its gradient:
 * (rows, 2 width), rows `stride` apart. */
void swiglu(const bf16 *gate_up, int64_t stride, const bf16 *grad_y, int64_t rows, int64_t width, bf16 *y, bf16 *grad_gate_up,
            int threads);
/* x cos + (-x2, x1) sin, x1 and x2 being the halves of a head, or its gradient, in place. cosine, sine: (tokens, width). */
void rope(const Heads *x, const bf16 *cosine, const bf16 *sine, int64_t width, int backward, int threads);
void decode(const DecodeArgs *g, int threads);
/* to: (rows, width) */
void dequantise(const QuantisedRows *x, int64_t rows, int64_t width, bf16 *to, int threads);
