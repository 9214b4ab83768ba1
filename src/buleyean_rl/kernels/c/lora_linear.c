/* A linear layer with LoRA and its gradients. Tensors are row-major, but for y's stride. */
#include "kernels.h"

/* y = l(x), or without its bias, plus what is `added`. x: (rows, depth); hidden: (rows, rank); y, added: (rows, columns). */
void lora_linear(const Linear *l, const bf16 *x, const bf16 *added, int64_t rows, bf16 *hidden, bf16 *y, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->a ? l->rank : 0;
    Matrix a = row_major(x, rows, depth);
    if (rank) gemm(&(GemmArgs){a, transposed(l->a, rank, depth), .y = hidden, .y_stride = rank}, threads);
    Matrix w = quantised(transposed(l->w, columns, depth), l->quantised);
    gemm(&(GemmArgs){a, w, row_major(hidden, rows, rank), transposed(l->b, columns, rank), added ? added : l->bias, y,
                     .y_stride = l->y_stride, .added_stride = added ? l->y_stride : 0}, threads);
}

/* The gradients in hidden and, unless grad_x is NULL, in x. */
void lora_linear_input_gradient(const Linear *l, const bf16 *grad_y, int64_t rows, bf16 *grad_hidden, bf16 *grad_x, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    Matrix a = {grad_y, rows, columns, l->y_stride, 1, NULL, 0, 0};
    gemm(&(GemmArgs){a, row_major(l->b, columns, rank), .y = grad_hidden, .y_stride = rank}, threads);
    Matrix w = quantised(row_major(l->w, columns, depth), l->quantised);
    if (grad_x)
        gemm(&(GemmArgs){a, w, row_major(grad_hidden, rows, rank), row_major(l->a, rank, depth),
                         .y = grad_x, .y_stride = depth}, threads);
}

/* Adds the gradients in each part's A, (rank, depth), and B, (outputs, rank), one after the other, to `grads`, in fp32. */
void lora_linear_weight_gradients(const Linear *l, const bf16 *grad_y, const bf16 *x, const bf16 *hidden,
                                  const bf16 *grad_hidden, int64_t rows, float *grads, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    float *grad_a = rows ? allocate(rank * (depth + columns) * (int64_t)sizeof *grad_a) : NULL;
    if (!grad_a) return;
    float *grad_b = grad_a + rank * depth;
    gemm(&(GemmArgs){transposed(grad_hidden, rows, rank), row_major(x, rows, depth), .c = grad_a, .y_stride = depth}, threads);
    gemm(&(GemmArgs){transposed(hidden, rows, rank), {grad_y, rows, columns, l->y_stride, 1, NULL, 0, 0}, .c = grad_b, .y_stride = columns},
         threads);
    for (int64_t part = 0, first = 0, output = 0; part < l->parts; output += l->outputs[part], first += l->ranks[part++]) {
        int64_t part_rank = l->ranks[part], size = part_rank * depth;
        float scaling = l->scalings[part], *grads_b = grads + size;
#pragma omp parallel for simd num_threads(threads) schedule(static)
        for (int64_t j = 0; j < size; j++) grads[j] += grad_a[first * depth + j];
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t j = 0; j < l->outputs[part]; j++)
            for (int64_t i = 0; i < part_rank; i++)
                grads_b[j * part_rank + i] += scaling * grad_b[(first + i) * columns + output + j];
        grads = grads_b + l->outputs[part] * part_rank;
    }
    free(grad_a);
}
