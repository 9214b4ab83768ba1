/* What the parts of the library use of each other. */
#ifndef PASSES_H
#define PASSES_H
#include "numbers.h"

void dropout(const number *x, int64_t size, float p, uint32_t seed, int add, number *y, int threads);

void product(const number *a, int64_t a_row, const number *b, int64_t b_row, int64_t b_column, int64_t depth,
             const number *c, int64_t c_row, const number *d, int64_t d_row, int64_t d_column, int64_t inner,
             const number *added, number *y, int64_t rows, int64_t columns, int threads);

void row_products(const number *a, int64_t a_row, const number *b, int64_t b_row, int64_t rows, int64_t width,
                  int64_t columns, float *c, int threads);
#endif
