/* A decoder layer of Llama's form and its gradients, in bf16: one call instead of one for each of its passes.
 *
 *     middle = x + output(attention(rotation(qkv(norm(x)))))
 *     y = middle + down(swiglu(gate_up(norm(middle))))
 *
 * A core that waits for an interpreter between two passes would find neither's data in its cache.
 */
#include "passes.h"

typedef struct {
    Linear qkv, output, gate_up, down;
    const number *norms[2];
    float epsilons[2], scale; /* on the scores of attention */
    int64_t heads, key_heads, head_width;
} Layer;

/* A row of tokens and what its queries see. cosine, sine: (tokens, head width) */
typedef struct { const number *cosine, *sine; int64_t tokens; Stretches stretches; } Row;

/* What of a forward pass a backward pass needs, all of it of (tokens, some width) but `lse`, (heads, tokens): queries, keys
 * and values, turned; what attention gave; the sum in the middle; gates and what they let through; what the A's of the
 * four linear layers did; the log-sum-exps of scores. */
typedef struct {
    number *projected, *attended, *middle, *gate_up, *lows[4];
    float *lse;
} Kept;

static void norm(const Layer *l, int which, const number *x, int64_t tokens, number *y, float *inverse, int threads) {
    rms_norm(x, l->norms[which], tokens, l->qkv.depth, l->epsilons[which], y, inverse, threads);
}

/* Some of the heads of queries, keys and values, which lie next to each other. */
static Heads heads_of(const Layer *l, number *projected, int64_t tokens, int64_t first, int64_t heads) {
    return (Heads){projected + first * l->head_width, heads, tokens, l->head_width, l->qkv.columns};
}

/* Queries, keys and values, or gradients in them, and what attention makes of them. */
typedef struct { Heads q, k, v, y; } Inputs;

static Inputs inputs_of(const Layer *l, number *projected, number *attended, int64_t tokens) {
    return (Inputs){heads_of(l, projected, tokens, 0, l->heads), heads_of(l, projected, tokens, l->heads, l->key_heads),
                    heads_of(l, projected, tokens, l->heads + l->key_heads, l->key_heads),
                    {attended, l->heads, tokens, l->head_width, l->output.depth}};
}

/* Turn queries and keys where they lie, or gradients in them back. */
static void turn(const Layer *l, const Row *row, number *projected, int backward, int threads) {
    Heads x = heads_of(l, projected, row->tokens, 0, l->heads + l->key_heads);
    rotate(x.at, x.head, x.token, row->cosine, row->sine, x.heads, x.tokens, l->head_width, backward, x.at, x.head,
           x.token, threads);
}

/* x, y: (tokens, width). */
void layer(const Layer *l, const Row *row, const number *x, const Kept *kept, number *y, int threads) {
    int64_t tokens = row->tokens, width = l->qkv.depth;
    number *normed = room(tokens * width), *hidden = room(tokens * l->down.depth);
    float *inverse = malloc(sizeof *inverse * tokens);
    norm(l, 0, x, tokens, normed, inverse, threads);
    adapted(&l->qkv, normed, NULL, tokens, kept->lows[0], kept->projected, threads);
    turn(l, row, kept->projected, 0, threads);
    Inputs in = inputs_of(l, kept->projected, kept->attended, tokens);
    attention(in.q, in.k, in.v, in.y, kept->lse, l->head_width, row->stretches, l->scale, threads);
    adapted(&l->output, kept->attended, x, tokens, kept->lows[1], kept->middle, threads);
    norm(l, 1, kept->middle, tokens, normed, inverse, threads);
    adapted(&l->gate_up, normed, NULL, tokens, kept->lows[2], kept->gate_up, threads);
    swiglu(kept->gate_up, tokens, l->down.depth, hidden, threads);
    adapted(&l->down, hidden, kept->middle, tokens, kept->lows[3], y, threads);
    free(normed);
    free(hidden);
    free(inverse);
}

/* The gradients from that in y: in x, unless grad_x is NULL, and in the parameters of each linear layer. */
void layer_backward(const Layer *l, const Row *row, const number *x, const Kept *kept, const number *gradient,
                    number *grad_x, float *const *grads, int threads) {
    int64_t tokens = row->tokens, width = l->qkv.depth;
    int64_t hidden_size = tokens * l->down.depth;
    float *inverse = malloc(sizeof *inverse * tokens);
    number *hidden = room(hidden_size), *grad_hidden = room(hidden_size), *grad_gates = room(2 * hidden_size);
    swiglu(kept->gate_up, tokens, l->down.depth, hidden, threads);
    adapted_backward(&l->down, gradient, hidden, kept->lows[3], tokens, grad_hidden, grads[3], threads);
    swiglu_backward(grad_hidden, kept->gate_up, tokens, l->down.depth, grad_gates, threads);
    free(hidden);
    free(grad_hidden);
    number *normed = room(tokens * width), *grad_normed = room(tokens * width), *grad_middle = room(tokens * width);
    norm(l, 1, kept->middle, tokens, normed, inverse, threads);
    adapted_backward(&l->gate_up, grad_gates, normed, kept->lows[2], tokens, grad_normed, grads[2], threads);
    rms_norm_backward(grad_normed, kept->middle, l->norms[1], inverse, gradient, tokens, width, grad_middle, threads);
    free(grad_gates);
    number *grad_attended = room(tokens * l->output.depth), *grad_projected = room(tokens * l->qkv.columns);
    adapted_backward(&l->output, grad_middle, kept->attended, kept->lows[1], tokens, grad_attended, grads[1], threads);
    Inputs in = inputs_of(l, kept->projected, kept->attended, tokens);
    Inputs grad = inputs_of(l, grad_projected, grad_attended, tokens);
    attention_backward(in.q, in.k, in.v, in.y, kept->lse, grad.y, l->head_width, row->stretches, l->scale, grad.q,
                       grad.k, grad.v, threads);
    turn(l, row, grad_projected, 1, threads);
    norm(l, 0, x, tokens, normed, inverse, threads);
    adapted_backward(&l->qkv, grad_projected, normed, kept->lows[0], tokens, grad_x ? grad_normed : NULL, grads[0],
                     threads);
    if (grad_x) rms_norm_backward(grad_normed, x, l->norms[0], inverse, grad_middle, tokens, width, grad_x, threads);
    free(grad_attended);
    free(grad_projected);
    free(normed);
    free(grad_normed);
    free(grad_middle);
    free(inverse);
}
