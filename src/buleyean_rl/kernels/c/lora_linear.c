/* A linear layer with LoRA and its gradients. Tensors are row-major, but for y's stride. */
#include "kernels.h"

static Matrix row_major(const bf16 *data, int64_t columns) { return (Matrix){data, columns, 1}; }
static Matrix transposed(const bf16 *data, int64_t columns) { return (Matrix){data, 1, columns}; }

/* x, or in `copy`, which is to be freed, what dropout leaves of it; NULL without memory. */
static const bf16 *dropped(const Linear *l, const bf16 *x, int64_t rows, bf16 **copy, int threads) {
    *copy = NULL;
    if (!l->a || !l->p) return x;
    *copy = allocate(rows * l->depth * (int64_t)sizeof **copy);
    if (*copy) dropout(x, rows * l->depth, l->p, l->seed, 0, *copy, threads);
    return *copy;
}

/* y = l(x) + added. x: (rows, depth); lora_hidden: (rows, rank); y, added: (rows, columns). */
int lora_linear(const Linear *l, const bf16 *x, const bf16 *added, int64_t rows, bf16 *lora_hidden, bf16 *y, int threads) {
    int64_t depth = l->depth, rank = l->a ? l->rank : 0;
    bf16 *copy;
    const bf16 *adapter_x = dropped(l, x, rows, &copy, threads);
    int failed = !adapter_x;
    if (rank && !failed)
        failed = gemm(&(GemmArgs){.a = row_major(adapter_x, depth), .b = transposed(l->a, depth), .y = lora_hidden,
                                  .y_stride = rank, .rows = rows, .columns = rank, .depth = depth}, threads);
    free(copy);
    return failed ? OUT_OF_MEMORY
                  : gemm(&(GemmArgs){.a = row_major(x, depth), .b = transposed(l->w, depth), .a2 = row_major(lora_hidden, rank),
                                     .b2 = transposed(l->b, rank), .added = added, .y = y, .y_stride = l->y_stride,
                                     .rows = rows, .columns = l->columns, .depth = depth, .depth2 = rank}, threads);
}

/* The gradients in lora_hidden and, unless grad_x is NULL, in x. */
int lora_linear_input_gradient(const Linear *l, const bf16 *grad_y, int64_t rows, bf16 *grad_lora_hidden, bf16 *grad_x,
                               int threads) {
    GemmArgs hidden = {.a = {grad_y, l->y_stride, 1}, .b = row_major(l->b, l->rank), .y = grad_lora_hidden,
                       .y_stride = l->rank, .rows = rows, .columns = l->rank, .depth = l->columns};
    GemmArgs adapter = {.a = row_major(grad_lora_hidden, l->rank), .b = row_major(l->a, l->depth), .y_stride = l->depth,
                        .rows = rows, .columns = l->depth, .depth = l->rank};
    GemmArgs base = {.a = hidden.a, .b = row_major(l->w, l->depth), .y = grad_x, .y_stride = l->depth, .rows = rows,
                     .columns = l->depth, .depth = l->columns};
    int failed = gemm(&hidden, threads);
    if (!grad_x || failed) return failed;
    if (!l->p) {
        base.a2 = adapter.a, base.b2 = adapter.b, base.depth2 = l->rank;
        return gemm(&base, threads);
    }
    adapter.y = allocate(rows * l->depth * (int64_t)sizeof *adapter.y);
    failed = !adapter.y || gemm(&adapter, threads) || gemm(&base, threads);
    if (!failed) dropout(adapter.y, rows * l->depth, l->p, l->seed, 1, grad_x, threads);
    free(adapter.y);
    return failed ? OUT_OF_MEMORY : OK;
}

/* Adds the gradients in each part's A, (rank, depth), and B, (outputs, rank), one after the other, to `grads`, in fp32. */
int lora_linear_weight_gradients(const Linear *l, const bf16 *grad_y, const bf16 *x, const bf16 *lora_hidden,
                                 const bf16 *grad_lora_hidden, int64_t rows, float *grads, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    if (!rows) return OK;
    bf16 *copy;
    const bf16 *adapter_x = dropped(l, x, rows, &copy, threads);
    float *grad_a = allocate(rank * (depth + columns) * (int64_t)sizeof *grad_a), *grad_b = grad_a ? grad_a + rank * depth : NULL;
    GemmArgs a = {.a = transposed(grad_lora_hidden, rank), .b = row_major(adapter_x, depth), .c = grad_a, .y_stride = depth,
                  .rows = rank, .columns = depth, .depth = rows};
    GemmArgs b = {.a = transposed(lora_hidden, rank), .b = {grad_y, l->y_stride, 1}, .c = grad_b, .y_stride = columns,
                  .rows = rank, .columns = columns, .depth = rows};
    int failed = !adapter_x || !grad_a || gemm(&a, threads) || gemm(&b, threads);
    for (int64_t part = 0, first = 0, output = 0; part < l->parts && !failed; part++) {
        int64_t size = l->ranks[part] * depth;
        float scaling = l->scalings[part], *of_b = grads + size;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for simd schedule(static) nowait
            for (int64_t j = 0; j < size; j++) grads[j] += grad_a[first * depth + j];
#pragma omp for schedule(static)
            for (int64_t j = 0; j < l->outputs[part]; j++)
                for (int64_t i = 0; i < l->ranks[part]; i++)
                    of_b[j * l->ranks[part] + i] += scaling * grad_b[(first + i) * columns + output + j];
        }
        grads = of_b + l->outputs[part] * l->ranks[part], first += l->ranks[part], output += l->outputs[part];
    }
    free(copy);
    free(grad_a);
    return failed ? OUT_OF_MEMORY : OK;
}

/* Both; grad_x may be NULL. */
int lora_linear_backward(const Linear *l, const bf16 *grad_y, const bf16 *x, const bf16 *lora_hidden, int64_t rows,
                         bf16 *grad_x, float *grads, int threads) {
    bf16 *grad_lora_hidden = allocate(rows * l->rank * (int64_t)sizeof *grad_lora_hidden);
    int failed = !grad_lora_hidden || lora_linear_input_gradient(l, grad_y, rows, grad_lora_hidden, grad_x, threads) ||
                 lora_linear_weight_gradients(l, grad_y, x, lora_hidden, grad_lora_hidden, rows, grads, threads);
    free(grad_lora_hidden);
    return failed ? OUT_OF_MEMORY : OK;
}
