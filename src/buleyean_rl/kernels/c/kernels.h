/* What the parts of the library use of each other. */
#ifndef PASSES_H
#define PASSES_H
#include "bf16.h"

#include <stddef.h>
#include <stdlib.h>

/* A matrix, with the strides of its rows and columns. */
typedef struct { const number *at; int64_t row, column; } Matrix;

/* A linear layer with its adapter, y = x w^T + low b^T where low = dropout(x) a^T. w: (columns, depth); a: (rank, depth),
 * or NULL where there is none; b: (columns, rank); y: (rows, columns), its rows `apart`. It may be several `parts` side by
 * side, each with its rank and outputs, their a's on top of each other and their b's along a diagonal, with the scalings. */
typedef struct {
    const number *w, *a, *b;
    int64_t depth, columns, apart, rank;
    float p;
    uint32_t seed;
    int64_t parts, ranks[3], outputs[3];
    float scalings[3];
} Linear;

/* A tensor of heads and tokens, with the strides of both; a head's elements lie next to each other. */
typedef struct { number *at; int64_t heads, tokens, head, token; } Heads;

/* Some queries of a row that are the last of the keys they see. cu_seqlens_q, cu_seqlens_k: (count + 1,), where a stretch's
 * queries begin in the row, and what it sees in `places`; without them that is the row as it is. */
typedef struct {
    const int64_t *places;
    const int32_t *cu_seqlens_q, *cu_seqlens_k;
    int64_t count, max_seqlen_q;
} CuSeqlens;

/* Memory for some numbers, to be freed; it begins with a cache line, so that vectors are in one each. */
static inline void *room(int64_t numbers) {
    int64_t lines = (numbers * (int64_t)sizeof(number) + 63) / 64;
    return aligned_alloc(64, 64 * lines);
}

void rms_norm(const number *x, const number *weight, int64_t rows, int64_t width, float epsilon, number *y, int threads);

void rms_norm_backward(const number *gradient, const number *x, const number *weight, const number *added, int64_t rows,
                       int64_t width, float epsilon, number *grad_x, number *y, int threads);

void swiglu(const number *gate_up, int64_t apart, int64_t rows, int64_t width, number *y, int threads);

void swiglu_backward(const number *gradient, const number *gate_up, int64_t apart, int64_t rows, int64_t width,
                     number *grad_gate_up, number *y, int threads);

void rotate(const number *x, int64_t x_head, int64_t x_token, const number *cosine, const number *sine, int64_t heads,
            int64_t tokens, int64_t width, int backward, number *y, int64_t y_head, int64_t y_token, int threads);

void dropout(const number *x, int64_t size, float p, uint32_t seed, int add, number *y, int threads);

void product(Matrix a, Matrix b, int64_t depth, Matrix c, Matrix d, int64_t inner, const number *added, number *y,
             int64_t apart, int64_t rows, int64_t columns, int threads);

void row_products(const number *a, int64_t a_row, const number *b, int64_t b_row, int64_t rows, int64_t width,
                  int64_t columns, float *c, int threads);

void adapted(const Linear *l, const number *x, const number *added, int64_t rows, number *low, number *y, int threads);

void adapted_gradient(const Linear *l, const number *grad, int64_t rows, number *grad_low, number *grad_x, int threads);

void adapter_gradients(const Linear *l, const number *grad, const number *x, const number *low, const number *grad_low,
                       int64_t rows, float *grads, int threads);

void attention(Heads q, Heads k, Heads v, Heads y, float *lse, int64_t width, CuSeqlens s, float scale, int threads);

void attention_backward(Heads q, Heads k, Heads v, Heads y, const float *lse, Heads g, int64_t width, CuSeqlens s,
                        float scale, Heads grad_q, Heads grad_k, Heads grad_v, int threads);
#endif
