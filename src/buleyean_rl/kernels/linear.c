/* A linear layer with its adapter, y = x w^T + low b^T + added where low = dropout(x) a^T, and its gradient, in bf16.
 *
 * One call instead of one for each product. Tensors' rows lie one after the other.
 */
#include "passes.h"

#include <stddef.h>

/* A left operand with a right one's transpose, a b^T. */
static void by_rows(const number *a, const number *b, int64_t rows, int64_t columns, int64_t depth, number *y,
                    int threads) {
    product(a, depth, b, 1, depth, depth, NULL, 0, NULL, 0, 0, 0, NULL, y, rows, columns, threads);
}

/* x: (rows, depth); w: (columns, depth); a: (rank, depth); b: (columns, rank); y, added: (rows, columns); low: (rows,
 * rank). dropped: room for something like x, where p is not 0. */
void adapted(const number *x, const number *w, const number *a, const number *b, const number *added, int64_t rows,
             int64_t depth, int64_t columns, int64_t rank, float p, uint32_t seed, number *dropped, number *low,
             number *y, int threads) {
    if (p) dropout(x, rows * depth, p, seed, 0, dropped, threads);
    by_rows(p ? dropped : x, a, rows, rank, depth, low, threads);
    product(x, depth, w, 1, depth, depth, low, rank, b, 1, rank, rank, added, y, rows, columns, threads);
}

/* The gradients from `grad`, that in y: in x, unless grad_x is NULL, in a and in b^T. grad_low: room for something like
 * low. */
void adapted_backward(const number *grad, const number *x, const number *w, const number *a, const number *b,
                      const number *low, int64_t rows, int64_t depth, int64_t columns, int64_t rank, float p,
                      uint32_t seed, number *dropped, number *grad_low, number *grad_x, float *grad_a, float *grad_b,
                      int threads) {
    product(grad, columns, b, rank, 1, columns, NULL, 0, NULL, 0, 0, 0, NULL, grad_low, rows, rank, threads);
    if (p) dropout(x, rows * depth, p, seed, 0, dropped, threads);
    row_products(grad_low, rank, p ? dropped : x, depth, rows, rank, depth, grad_a, threads);
    row_products(low, rank, grad, columns, rows, rank, columns, grad_b, threads);
    if (!grad_x) return;
    if (!p) {
        product(grad, columns, w, depth, 1, columns, grad_low, rank, a, depth, 1, rank, NULL, grad_x, rows, depth,
                threads);
        return;
    }
    product(grad_low, rank, a, depth, 1, rank, NULL, 0, NULL, 0, 0, 0, NULL, dropped, rows, depth, threads);
    product(grad, columns, w, depth, 1, columns, NULL, 0, NULL, 0, 0, 0, NULL, grad_x, rows, depth, threads);
    dropout(dropped, rows * depth, p, seed, 1, grad_x, threads);
}
