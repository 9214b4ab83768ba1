/* A linear layer with LoRA and its gradients. Tensors are row-major, but for y's stride. */
#include "kernels.h"

static Matrix row_major(const bf16 *data, int64_t columns) { return (Matrix){data, columns, 1}; }
static Matrix transposed(const bf16 *data, int64_t columns) { return (Matrix){data, 1, columns}; }

/* y = l(x) + added. x: (rows, depth); hidden: (rows, rank); y, added: (rows, columns). */
void lora_linear(const Linear *l, const bf16 *x, const bf16 *added, int64_t rows, bf16 *hidden, bf16 *y, int threads) {
    int64_t depth = l->depth, rank = l->a ? l->rank : 0;
    if (rank)
        gemm(&(GemmArgs){.a = row_major(x, depth), .b = transposed(l->a, depth), .y = hidden, .y_stride = rank, .rows = rows,
                         .columns = rank, .depth = depth}, threads);
    gemm(&(GemmArgs){.a = row_major(x, depth), .b = transposed(l->w, depth), .a2 = row_major(hidden, rank),
                     .b2 = transposed(l->b, rank), .added = added, .y = y, .y_stride = l->y_stride, .rows = rows,
                     .columns = l->columns, .depth = depth, .depth2 = rank}, threads);
}

/* The gradients in hidden and, unless grad_x is NULL, in x. */
void lora_linear_input_gradient(const Linear *l, const bf16 *grad_y, int64_t rows, bf16 *grad_hidden, bf16 *grad_x, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    Matrix rows_of_y = {grad_y, l->y_stride, 1};
    gemm(&(GemmArgs){.a = rows_of_y, .b = row_major(l->b, rank), .y = grad_hidden, .y_stride = rank, .rows = rows,
                     .columns = rank, .depth = columns}, threads);
    if (grad_x)
        gemm(&(GemmArgs){.a = rows_of_y, .b = row_major(l->w, depth), .a2 = row_major(grad_hidden, rank),
                         .b2 = row_major(l->a, depth), .y = grad_x, .y_stride = depth, .rows = rows, .columns = depth,
                         .depth = columns, .depth2 = rank}, threads);
}

/* Adds the gradients in each part's A, (rank, depth), and B, (outputs, rank), one after the other, to `grads`, in fp32. */
void lora_linear_weight_gradients(const Linear *l, const bf16 *grad_y, const bf16 *x, const bf16 *hidden,
                                  const bf16 *grad_hidden, int64_t rows, float *grads, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    float *grad_a = rows ? allocate(rank * (depth + columns) * (int64_t)sizeof *grad_a) : NULL;
    if (!grad_a) return;
    float *grad_b = grad_a + rank * depth;
    gemm(&(GemmArgs){.a = transposed(grad_hidden, rank), .b = row_major(x, depth), .c = grad_a, .y_stride = depth,
                     .rows = rank, .columns = depth, .depth = rows}, threads);
    gemm(&(GemmArgs){.a = transposed(hidden, rank), .b = {grad_y, l->y_stride, 1}, .c = grad_b, .y_stride = columns,
                     .rows = rank, .columns = columns, .depth = rows}, threads);
    for (int64_t part = 0, first = 0, output = 0; part < l->parts; output += l->outputs[part], first += l->ranks[part++]) {
        int64_t part_rank = l->ranks[part], size = part_rank * depth;
        float scaling = l->scalings[part], *grads_b = grads + size;
#pragma omp parallel num_threads(threads)
        {
#pragma omp for simd schedule(static) nowait
            for (int64_t j = 0; j < size; j++) grads[j] += grad_a[first * depth + j];
#pragma omp for schedule(static)
            for (int64_t j = 0; j < l->outputs[part]; j++)
                for (int64_t i = 0; i < part_rank; i++)
                    grads_b[j * part_rank + i] += scaling * grad_b[(first + i) * columns + output + j];
        }
        grads = grads_b + l->outputs[part] * part_rank;
    }
    free(grad_a);
}
