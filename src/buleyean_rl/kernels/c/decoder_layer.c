/* Decoder layers of Llama's form and their gradients in one call, instead of one for each of their passes: a core that waits
 * for an interpreter between two passes would find neither's data in its cache. */
#include "kernels.h"

static Heads heads_of(const DecoderLayer *l, bf16 *qkv, int64_t tokens, int64_t first, int64_t heads) {
    return (Heads){qkv + first * l->head_width, heads, tokens, l->head_width, l->qkv.y_stride};
}

static AttentionArgs attention_args(const DecoderLayer *l, const PackedSequence *s, const SavedActivations *saved) {
    int64_t tokens = s->tokens, heads = l->heads, key_heads = l->key_heads;
    return (AttentionArgs){.q = heads_of(l, saved->qkv, tokens, 0, heads),
                           .k = heads_of(l, saved->qkv, tokens, heads, key_heads),
                           .v = heads_of(l, saved->qkv, tokens, heads + key_heads, key_heads),
                           .y = {saved->attended, heads, tokens, l->head_width, l->output.depth},
                           .lse = saved->lse, .head_width = l->head_width, .seqlens = s->seqlens, .scale = l->scale};
}

/* Queries and keys where they lie, or gradients in them. */
static void rope_in_place(const DecoderLayer *l, const PackedSequence *s, bf16 *qkv, int backward, int threads) {
    Heads x = heads_of(l, qkv, s->tokens, 0, l->heads + l->key_heads);
    rope(&x, s->cosine, s->sine, l->head_width, backward, threads);
}

/* What a layer's passes make for each other, of (tokens, some width); all but the first two in the backward pass. The same
 * buffers serve every layer: the system gives new pages in the time of a pass. */
enum { NORMED, HIDDEN, GRAD_NORMED, GRAD_MIDDLE, GRAD_HIDDEN, GRAD_GATE_UP, GRAD_ATTENDED, GRAD_QKV, GRAD_LORA_HIDDEN };
enum { FORWARD = HIDDEN + 1, BACKWARD = GRAD_LORA_HIDDEN + 4 };

static int allocate_buffers(const DecoderLayer *l, int64_t tokens, int count, bf16 **buffers) {
    const int64_t widths[] = {
        [NORMED] = l->qkv.depth, [GRAD_NORMED] = l->qkv.depth, [GRAD_MIDDLE] = l->qkv.depth, [HIDDEN] = l->down.depth,
        [GRAD_HIDDEN] = l->down.depth, [GRAD_GATE_UP] = l->gate_up.y_stride, [GRAD_ATTENDED] = l->output.depth,
        [GRAD_QKV] = l->qkv.y_stride, [GRAD_LORA_HIDDEN] = l->qkv.rank, l->output.rank, l->gate_up.rank, l->down.rank,
    };
    int there = 1;
    for (int i = 0; i < count; i++) there &= (buffers[i] = allocate(tokens * widths[i] * (int64_t)sizeof(bf16))) != NULL;
    return there;
}

static void forward(const DecoderLayer *l, const PackedSequence *s, const SavedActivations *saved, bf16 *const *buffers,
                    bf16 *y, int threads) {
    int64_t tokens = s->tokens;
    bf16 *normed = buffers[NORMED], *hidden = buffers[HIDDEN], *const *lora_hidden = saved->lora_hidden;
    AttentionArgs attend = attention_args(l, s, saved);
    rms_norm(saved->x, l->norms[0], l->epsilons[0], NULL, NULL, tokens, l->qkv.depth, normed, NULL, threads);
    lora_linear(&l->qkv, normed, NULL, tokens, lora_hidden[0], saved->qkv, threads);
    rope_in_place(l, s, saved->qkv, 0, threads);
    attention(&attend, threads);
    lora_linear(&l->output, saved->attended, saved->x, tokens, lora_hidden[1], saved->middle, threads);
    rms_norm(saved->middle, l->norms[1], l->epsilons[1], NULL, NULL, tokens, l->qkv.depth, normed, NULL, threads);
    lora_linear(&l->gate_up, normed, NULL, tokens, lora_hidden[2], saved->gate_up, threads);
    swiglu(saved->gate_up, l->gate_up.y_stride, NULL, tokens, l->down.depth, hidden, NULL, threads);
    lora_linear(&l->down, hidden, saved->middle, tokens, lora_hidden[3], y, threads);
}

/* Linear layers' inputs are made again while gradients are taken further back. grad_y is not needed any more when grad_x,
 * which may be NULL, is written. */
static void backward(const DecoderLayer *l, const PackedSequence *s, const SavedActivations *saved, bf16 *const *buffers,
                     const bf16 *grad_y, bf16 *grad_x, float *const *grads, int threads) {
    int64_t tokens = s->tokens, width = l->qkv.depth;
    bf16 *normed = buffers[NORMED], *grad_normed = buffers[GRAD_NORMED], *grad_middle = buffers[GRAD_MIDDLE];
    bf16 *hidden = buffers[HIDDEN], *grad_hidden = buffers[GRAD_HIDDEN], *grad_gate_up = buffers[GRAD_GATE_UP];
    bf16 *grad_attended = buffers[GRAD_ATTENDED], *grad_qkv = buffers[GRAD_QKV];
    bf16 *const *lora_hidden = saved->lora_hidden, *const *grad_lora = buffers + GRAD_LORA_HIDDEN;
    SavedActivations gradients = {.qkv = grad_qkv, .attended = grad_attended};
    AttentionArgs attend = attention_args(l, s, saved), grad = attention_args(l, s, &gradients);
    attend.grad_y = grad.y, attend.grad_q = grad.q, attend.grad_k = grad.k, attend.grad_v = grad.v;

    lora_linear_input_gradient(&l->down, grad_y, tokens, grad_lora[3], grad_hidden, threads);
    swiglu(saved->gate_up, l->gate_up.y_stride, grad_hidden, tokens, l->down.depth, hidden, grad_gate_up, threads);
    lora_linear_weight_gradients(&l->down, grad_y, hidden, lora_hidden[3], grad_lora[3], tokens, grads[3], threads);
    lora_linear_input_gradient(&l->gate_up, grad_gate_up, tokens, grad_lora[2], grad_normed, threads);
    rms_norm(saved->middle, l->norms[1], l->epsilons[1], grad_normed, grad_y, tokens, width, normed, grad_middle, threads);
    lora_linear_weight_gradients(&l->gate_up, grad_gate_up, normed, lora_hidden[2], grad_lora[2], tokens, grads[2], threads);
    lora_linear_input_gradient(&l->output, grad_middle, tokens, grad_lora[1], grad_attended, threads);
    lora_linear_weight_gradients(&l->output, grad_middle, saved->attended, lora_hidden[1], grad_lora[1], tokens, grads[1], threads);
    attention_backward(&attend, threads);
    rope_in_place(l, s, grad_qkv, 1, threads);
    lora_linear_input_gradient(&l->qkv, grad_qkv, tokens, grad_lora[0], grad_x ? grad_normed : NULL, threads);
    rms_norm(saved->x, l->norms[0], l->epsilons[0], grad_x ? grad_normed : NULL, grad_middle, tokens, width, normed, grad_x,
             threads);
    lora_linear_weight_gradients(&l->qkv, grad_qkv, normed, lora_hidden[0], grad_lora[0], tokens, grads[0], threads);
}

/* Layers one after the other. y: (tokens, width), the last one's. They may share what they save, but their inputs only with
 * the next but one. */
void decoder_layers(const DecoderLayer *l, int64_t count, const PackedSequence *s, const SavedActivations *saved, bf16 *y,
                    int threads) {
    bf16 *buffers[FORWARD];
    int there = allocate_buffers(l, s->tokens, FORWARD, buffers);
    for (int64_t i = 0; i < count && there; i++)
        forward(l + i, s, saved + i, buffers, i + 1 < count ? saved[i + 1].x : y, threads);
    for (int i = 0; i < FORWARD; i++) free(buffers[i]);
}

/* The gradients from that in the last one's result: in the first one's input, if it is wanted, and added to those in the
 * adapters of each linear layer of all layers. grad_x: (tokens, width), written in any case. */
void decoder_layers_backward(const DecoderLayer *l, int64_t count, const PackedSequence *s, const SavedActivations *saved,
                             const bf16 *grad_y, bf16 *grad_x, int wants_grad_x, float *const *grads, int threads) {
    bf16 *buffers[BACKWARD];
    int there = allocate_buffers(l, s->tokens, BACKWARD, buffers);
    for (int64_t i = count - 1; i >= 0 && there; i--, grad_y = grad_x)
        backward(l + i, s, saved + i, buffers, grad_y, i || wants_grad_x ? grad_x : NULL, grads + 4 * i, threads);
    for (int i = 0; i < BACKWARD; i++) free(buffers[i]);
}
