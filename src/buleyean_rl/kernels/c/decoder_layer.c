/* Decoder layers of Llama's form and their gradients, in bf16: one call instead of one for each of their passes.
 *
 *     middle = x + output(attention(rotation(qkv(norm(x)))))
 *     y = middle + down(swiglu(gate_up(norm(middle))))
 *
 * A core that waits for an interpreter between two passes would find neither's data in its cache.
 */
#include "kernels.h"

typedef struct {
    Linear qkv, output, gate_up, down;
    const number *norms[2];
    float epsilons[2], scale; /* on the scores of attention */
    int64_t heads, key_heads, head_width;
} Layer;

/* A row of tokens and what its queries see. cosine, sine: (tokens, head width) */
typedef struct { const number *cosine, *sine; int64_t tokens; CuSeqlens stretches; } Row;

/* What of a layer's forward pass its backward pass needs, all of it of (tokens, some width) but `lse`, (heads, tokens): its
 * input; queries, keys and values, turned; what attention gave; the sum in the middle; gates and what they let through;
 * what the A's of the four linear layers did; the log-sum-exps of scores. */
typedef struct {
    number *x, *projected, *attended, *middle, *gate_up, *lows[4];
    float *lse;
} Kept;

/* Some of the heads of queries, keys and values, which lie next to each other. */
static Heads heads_of(const Layer *l, number *projected, int64_t tokens, int64_t first, int64_t heads) {
    return (Heads){projected + first * l->head_width, heads, tokens, l->head_width, l->qkv.apart};
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

/* What a layer's passes make for each other, of (tokens, some width); all but the first two in the backward pass. */
enum { NORMED, HIDDEN, GRAD_NORMED, GRAD_MIDDLE, GRAD_HIDDEN, GRAD_GATES, GRAD_ATTENDED, GRAD_PROJECTED, GRAD_LOWS };
enum { FORWARD = HIDDEN + 1, BACKWARD = GRAD_LOWS + 4 };

/* Rooms for it, in the same places for every layer: the system gives new pages in the time of a pass. */
static void take_rooms(const Layer *l, int64_t tokens, int count, number **rooms) {
    const int64_t widths[] = {
        [NORMED] = l->qkv.depth, [GRAD_NORMED] = l->qkv.depth, [GRAD_MIDDLE] = l->qkv.depth,
        [HIDDEN] = l->down.depth, [GRAD_HIDDEN] = l->down.depth, [GRAD_GATES] = l->gate_up.apart,
        [GRAD_ATTENDED] = l->output.depth, [GRAD_PROJECTED] = l->qkv.apart,
        [GRAD_LOWS] = l->qkv.rank, l->output.rank, l->gate_up.rank, l->down.rank,
    };
    for (int i = 0; i < count; i++) rooms[i] = room(tokens * widths[i]);
}

static void leave_rooms(int count, number **rooms) {
    for (int i = 0; i < count; i++) free(rooms[i]);
}

/* y: (tokens, width). */
static void layer(const Layer *l, const Row *row, const Kept *kept, number *const *rooms, number *y, int threads) {
    const number *x = kept->x;
    int64_t tokens = row->tokens, width = l->qkv.depth;
    number *normed = rooms[NORMED], *hidden = rooms[HIDDEN];
    rms_norm(x, l->norms[0], tokens, width, l->epsilons[0], normed, threads);
    adapted(&l->qkv, normed, NULL, tokens, kept->lows[0], kept->projected, threads);
    turn(l, row, kept->projected, 0, threads);
    Inputs in = inputs_of(l, kept->projected, kept->attended, tokens);
    attention(in.q, in.k, in.v, in.y, kept->lse, l->head_width, row->stretches, l->scale, threads);
    adapted(&l->output, kept->attended, x, tokens, kept->lows[1], kept->middle, threads);
    rms_norm(kept->middle, l->norms[1], tokens, width, l->epsilons[1], normed, threads);
    adapted(&l->gate_up, normed, NULL, tokens, kept->lows[2], kept->gate_up, threads);
    swiglu(kept->gate_up, l->gate_up.apart, tokens, l->down.depth, hidden, threads);
    adapted(&l->down, hidden, kept->middle, tokens, kept->lows[3], y, threads);
}

/* The gradients from that in y: in x, unless grad_x is NULL, and added to those in the parameters of each linear layer. The
 * input of such a layer, which its parameters' need, is made again while the gradient in it is taken further back.
 * `gradient` is not needed any more when grad_x is written. */
static void layer_backward(const Layer *l, const Row *row, const Kept *kept, number *const *rooms, const number *gradient,
                           number *grad_x, float *const *grads, int threads) {
    const number *x = kept->x;
    int64_t tokens = row->tokens, width = l->qkv.depth, hidden_width = l->down.depth;
    const Linear *qkv = &l->qkv, *output = &l->output, *gate_up = &l->gate_up, *down = &l->down;
    number *normed = rooms[NORMED], *grad_normed = rooms[GRAD_NORMED], *grad_middle = rooms[GRAD_MIDDLE];
    number *hidden = rooms[HIDDEN], *grad_hidden = rooms[GRAD_HIDDEN], *grad_gates = rooms[GRAD_GATES];
    number *grad_attended = rooms[GRAD_ATTENDED], *grad_projected = rooms[GRAD_PROJECTED];
    number *const *grad_lows = rooms + GRAD_LOWS;

    adapted_gradient(down, gradient, tokens, grad_lows[3], grad_hidden, threads);
    swiglu_backward(grad_hidden, kept->gate_up, gate_up->apart, tokens, hidden_width, grad_gates, hidden, threads);
    adapter_gradients(down, gradient, hidden, kept->lows[3], grad_lows[3], tokens, grads[3], threads);
    adapted_gradient(gate_up, grad_gates, tokens, grad_lows[2], grad_normed, threads);
    rms_norm_backward(grad_normed, kept->middle, l->norms[1], gradient, tokens, width, l->epsilons[1], grad_middle,
                      normed, threads);
    adapter_gradients(gate_up, grad_gates, normed, kept->lows[2], grad_lows[2], tokens, grads[2], threads);

    adapted_gradient(output, grad_middle, tokens, grad_lows[1], grad_attended, threads);
    adapter_gradients(output, grad_middle, kept->attended, kept->lows[1], grad_lows[1], tokens, grads[1], threads);
    Inputs in = inputs_of(l, kept->projected, kept->attended, tokens);
    Inputs grad = inputs_of(l, grad_projected, grad_attended, tokens);
    attention_backward(in.q, in.k, in.v, in.y, kept->lse, grad.y, l->head_width, row->stretches, l->scale, grad.q,
                       grad.k, grad.v, threads);
    turn(l, row, grad_projected, 1, threads);
    adapted_gradient(qkv, grad_projected, tokens, grad_lows[0], grad_x ? grad_normed : NULL, threads);
    if (grad_x)
        rms_norm_backward(grad_normed, x, l->norms[0], grad_middle, tokens, width, l->epsilons[0], grad_x, normed,
                          threads);
    else rms_norm(x, l->norms[0], tokens, width, l->epsilons[0], normed, threads);
    adapter_gradients(qkv, grad_projected, normed, kept->lows[0], grad_lows[0], tokens, grads[0], threads);
}

/* Layers one after the other. y: (tokens, width), the last one's. They may share what they keep, but their inputs only with
 * the next but one. */
void layers(const Layer *l, int64_t count, const Row *row, const Kept *kept, number *y, int threads) {
    number *rooms[FORWARD];
    take_rooms(l, row->tokens, FORWARD, rooms);
    for (int64_t i = 0; i < count; i++) layer(l + i, row, kept + i, rooms, i + 1 < count ? kept[i + 1].x : y, threads);
    leave_rooms(FORWARD, rooms);
}

/* The gradients from that in the last one's result: in the first one's input, if it is wanted, and added to those in the
 * parameters of each linear layer of all layers. grad_x: (tokens, width), written in any case. */
void layers_backward(const Layer *l, int64_t count, const Row *row, const Kept *kept, const number *gradient,
                     number *grad_x, int of_x, float *const *grads, int threads) {
    number *rooms[BACKWARD];
    take_rooms(l, row->tokens, BACKWARD, rooms);
    for (int64_t i = count - 1; i >= 0; i--, gradient = grad_x)
        layer_backward(l + i, row, kept + i, rooms, gradient, i || of_x ? grad_x : NULL, grads + 4 * i, threads);
    leave_rooms(BACKWARD, rooms);
}
