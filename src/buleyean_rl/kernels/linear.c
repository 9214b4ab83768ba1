/* A linear layer with its adapter and its gradients, in bf16: one call instead of one for each product.
 *
 * Tensors' rows lie one after the other.
 */
#include "passes.h"

#include <string.h>

/* A left operand with a right one's transpose, a b^T + c d^T + added. */
static void by_rows(const number *a, const number *b, int64_t depth, const number *c, const number *d, int64_t inner,
                    const number *added, int64_t rows, int64_t columns, number *y, int threads) {
    product(a, depth, b, 1, depth, depth, c, inner, d, 1, inner, inner, added, y, rows, columns, threads);
}

/* A left operand with a right one, a b + c d. */
static void by_columns(const number *a, const number *b, int64_t depth, const number *c, const number *d, int64_t inner,
                       int64_t rows, int64_t columns, number *y, int threads) {
    product(a, depth, b, columns, 1, depth, c, inner, d, columns, 1, inner, NULL, y, rows, columns, threads);
}

/* y = l(x) + added, which may be NULL. x: (rows, depth); low: (rows, rank); y, added: (rows, columns). */
void adapted(const Linear *l, const number *x, const number *added, int64_t rows, number *low, number *y, int threads) {
    number *dropped = l->a && l->p ? room(rows * l->depth) : NULL;
    int64_t rank = l->a ? l->rank : 0;
    if (dropped) dropout(x, rows * l->depth, l->p, l->seed, 0, dropped, threads);
    if (rank) by_rows(dropped ? dropped : x, l->a, l->depth, NULL, NULL, 0, NULL, rows, rank, low, threads);
    by_rows(x, l->w, l->depth, low, l->b, rank, added, rows, l->columns, y, threads);
    free(dropped);
}

/* The gradients in each part's A, (its rank, depth), and B, (its outputs, its rank), one after the other, from those in a
 * and b^T. */
static void put_gradients(const Linear *l, const float *grad_a, const float *grad_b, float *to) {
    for (int64_t part = 0; part < l->parts; part++) {
        int64_t rank = l->ranks[part], outputs = l->outputs[part];
        memcpy(to, grad_a, sizeof *to * rank * l->depth);
        to += rank * l->depth, grad_a += rank * l->depth;
        for (int64_t j = 0; j < outputs; j++)
            for (int64_t i = 0; i < rank; i++) *to++ = l->scalings[part] * grad_b[i * l->columns + j];
        grad_b += rank * l->columns + outputs;
    }
}

/* The gradients in low and, unless grad_x is NULL, in x from `grad`, that in y. */
void adapted_gradient(const Linear *l, const number *grad, int64_t rows, number *grad_low, number *grad_x, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank, size = rows * depth;
    by_columns(grad, l->b, columns, NULL, NULL, 0, rows, rank, grad_low, threads);
    if (!grad_x) return;
    if (!l->p) {
        by_columns(grad, l->w, columns, grad_low, l->a, rank, rows, depth, grad_x, threads);
        return;
    }
    number *of_dropped = room(size);
    by_columns(grad_low, l->a, rank, NULL, NULL, 0, rows, depth, of_dropped, threads);
    by_columns(grad, l->w, columns, NULL, NULL, 0, rows, depth, grad_x, threads);
    dropout(of_dropped, size, l->p, l->seed, 1, grad_x, threads);
    free(of_dropped);
}

/* The gradients in the parts' A's and B's, from those in y and low. */
void adapter_gradients(const Linear *l, const number *grad, const number *x, const number *low, const number *grad_low,
                       int64_t rows, float *grads, int threads) {
    int64_t depth = l->depth, columns = l->columns, rank = l->rank;
    number *dropped = l->p ? room(rows * depth) : NULL;
    float *grad_a = malloc(sizeof *grad_a * rank * (depth + columns)), *grad_b = grad_a + rank * depth;
    if (dropped) dropout(x, rows * depth, l->p, l->seed, 0, dropped, threads);
    row_products(grad_low, rank, dropped ? dropped : x, depth, rows, rank, depth, grad_a, threads);
    row_products(low, rank, grad, columns, rows, rank, columns, grad_b, threads);
    put_gradients(l, grad_a, grad_b, grads);
    free(dropped);
    free(grad_a);
}

/* Both: in x, unless grad_x is NULL, and in the parts' A's and B's. */
void adapted_backward(const Linear *l, const number *grad, const number *x, const number *low, int64_t rows,
                      number *grad_x, float *grads, int threads) {
    number *grad_low = room(rows * l->rank);
    adapted_gradient(l, grad, rows, grad_low, grad_x, threads);
    adapter_gradients(l, grad, x, low, grad_low, rows, grads, threads);
    free(grad_low);
}
