/* A linear layer with its adapter and its gradients, in bf16: one call instead of one for each product.
 *
 * Tensors' rows lie one after the other, but for those of y and of the gradient in it.
 */
#include "kernels.h"

#define NONE (Matrix){NULL, 0, 0}

/* A matrix whose rows lie one after the other, and its transpose. */
static Matrix of(const number *at, int64_t columns) { return (Matrix){at, columns, 1}; }
static Matrix transpose_of(const number *at, int64_t columns) { return (Matrix){at, 1, columns}; }

/* Each a and b become the A's and B's of the parts, the latter scaled. parameters: of all parts of all layers, A, (its rank,
 * depth), and B, (its outputs, its rank). */
void copy_adapters(const Linear *const *l, int64_t count, const float *const *parameters, int threads) {
    int64_t before[count], parts = 0;
    for (int64_t i = 0; i < count; i++) before[i] = parts, parts += l[i]->parts;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        number *restrict a = (number *)l[i]->a, *restrict b = (number *)l[i]->b;
        for (int64_t part = 0; part < l[i]->parts; part++) {
            const float *restrict of_a = parameters[2 * (before[i] + part)];
            const float *restrict of_b = parameters[2 * (before[i] + part) + 1];
            int64_t rank = l[i]->ranks[part], outputs = l[i]->outputs[part], apart = l[i]->rank, size = rank * l[i]->depth;
            float scaling = l[i]->scalings[part];
            for (int64_t j = 0; j < size; j++) a[j] = narrow(of_a[j]);
            for (int64_t row = 0; row < outputs; row++)
                for (int64_t j = 0; j < rank; j++) b[row * apart + j] = narrow(scaling * of_b[row * rank + j]);
            a += size, b += outputs * apart + rank;
        }
    }
}

/* y = l(x) + added, which may be NULL. x: (rows, depth); low: (rows, rank); y, added: (rows, columns). */
void adapted(const Linear *l, const number *x, const number *added, int64_t rows, number *low, number *y, int threads) {
    number *dropped = l->a && l->p ? room(rows * l->depth) : NULL;
    int64_t depth = l->depth, rank = l->a ? l->rank : 0;
    if (dropped) dropout(x, rows * depth, l->p, l->seed, 0, dropped, threads);
    if (rank)
        product(of(dropped ? dropped : x, depth), transpose_of(l->a, depth), depth, NONE, NONE, 0, NULL, low, rank, rows,
                rank, threads);
    product(of(x, depth), transpose_of(l->w, depth), depth, of(low, rank), transpose_of(l->b, rank), rank, added, y,
            l->apart, rows, l->columns, threads);
    free(dropped);
}

/* Adds the gradients in each part's A, (its rank, depth), and B, (its outputs, its rank), one after the other, from those in
 * a and b^T. */
static void add_gradients(const Linear *l, const float *restrict grad_a, const float *restrict grad_b, float *restrict to,
                          int threads) {
    int64_t columns = l->columns;
    for (int64_t part = 0; part < l->parts; part++) {
        int64_t rank = l->ranks[part], outputs = l->outputs[part], size = rank * l->depth;
        float *of_b = to + size, scaling = l->scalings[part];
#pragma omp parallel num_threads(threads)
        {
#pragma omp for simd schedule(static) nowait
            for (int64_t j = 0; j < size; j++) to[j] += grad_a[j];
#pragma omp for schedule(static)
            for (int64_t j = 0; j < outputs; j++)
                for (int64_t i = 0; i < rank; i++) of_b[j * rank + i] += scaling * grad_b[i * columns + j];
        }
        to = of_b + outputs * rank, grad_a += size, grad_b += rank * columns + outputs;
    }
}

/* The gradients in low and, unless grad_x is NULL, in x from `grad`, that in y. */
void adapted_gradient(const Linear *l, const number *grad, int64_t rows, number *grad_low, number *grad_x, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank, size = rows * depth;
    Matrix of_y = {grad, l->apart, 1}, of_low = of(grad_low, rank), w = of(l->w, depth), a = of(l->a, depth);
    product(of_y, of(l->b, rank), columns, NONE, NONE, 0, NULL, grad_low, rank, rows, rank, threads);
    if (!grad_x) return;
    if (!l->p) {
        product(of_y, w, columns, of_low, a, rank, NULL, grad_x, depth, rows, depth, threads);
        return;
    }
    number *of_dropped = room(size);
    product(of_low, a, rank, NONE, NONE, 0, NULL, of_dropped, depth, rows, depth, threads);
    product(of_y, w, columns, NONE, NONE, 0, NULL, grad_x, depth, rows, depth, threads);
    dropout(of_dropped, size, l->p, l->seed, 1, grad_x, threads);
    free(of_dropped);
}

/* Adds the gradients in the parts' A's and B's, from those in y and low. */
void adapter_gradients(const Linear *l, const number *grad, const number *x, const number *low, const number *grad_low,
                       int64_t rows, float *grads, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    number *dropped = l->p ? room(rows * depth) : NULL;
    float *grad_a = malloc(sizeof *grad_a * rank * (depth + columns)), *grad_b = grad_a + rank * depth;
    if (dropped) dropout(x, rows * depth, l->p, l->seed, 0, dropped, threads);
    row_products(grad_low, rank, dropped ? dropped : x, depth, rows, rank, depth, grad_a, threads);
    row_products(low, rank, grad, l->apart, rows, rank, columns, grad_b, threads);
    add_gradients(l, grad_a, grad_b, grads, threads);
    free(dropped);
    free(grad_a);
}

/* Both: in x, unless grad_x is NULL, and in the parts' A's and B's, which are added. */
void adapted_backward(const Linear *l, const number *grad, const number *x, const number *low, int64_t rows,
                      number *grad_x, float *grads, int threads) {
    number *grad_low = room(rows * l->rank);
    adapted_gradient(l, grad, rows, grad_low, grad_x, threads);
    adapter_gradients(l, grad, x, low, grad_low, rows, grads, threads);
    free(grad_low);
}
