/* Element-wise passes over tensors of one type, bf16 or with -DFP32 fp32, each in one sweep, in fp32 inside.
 *
 * Plain loops that a C compiler turns into the vector instructions of the machine it runs on; `__init__.py`
 * builds them on first use. Work is split among threads by rows, always the same way, so that results are
 * the same from run to run.
 */
#include "kernels.h"

#define SOME 256

/* Largest of each column. x: (rows, columns); most: (threads, columns), one row a thread. */
void column_most(const number *x, int64_t rows, int64_t columns, float *most, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *mine = most + t * columns;
        for (int64_t j = 0; j < columns; j++) mine[j] = -INFINITY;
        for (int64_t i = rows * t / threads; i < rows * (t + 1) / threads; i++)
            for (int64_t j = 0; j < columns; j++) {
                float z = widen(x[i * columns + j]);
                mine[j] = z > mine[j] ? z : mine[j];
            }
    }
}

/* Sums over `rows` rows that softmaxes need, added to. z: (rows, nodes) with a stride. */
static void add_sums(const number *z, const number *z_ref, int64_t rows, int64_t nodes, int64_t stride, float scale,
                     const float *most, const float *base_most, float *restrict total, float *restrict base,
                     float *restrict difference) {
    for (int64_t i = 0; i < rows; i++) {
        const number *restrict model = z + i * stride;
        if (!z_ref) {
            for (int64_t j = 0; j < nodes; j++) {
                float logit = scale * widen(model[j]);
                total[j] += exponential(logit - most[j]);
                base[j] += 1;
                difference[j] -= logit;
            }
            continue;
        }
        const number *restrict reference = z_ref + i * stride;
        for (int64_t j = 0; j < nodes; j++) {
            float logit = scale * widen(model[j]), base_logit = scale * widen(reference[j]);
            float mass = exponential(base_logit - base_most[j]);
            total[j] += exponential(logit - most[j]);
            base[j] += mass;
            difference[j] += mass * (base_logit - logit);
        }
    }
}

/* The sums of each thread's rows, those of some rows at a time: a long sum of small numbers would lose the last of
 * them. sums: (threads, 3, nodes). */
void softmax_sums(const number *z, const number *z_ref, int64_t rows, int64_t nodes, int64_t stride, float scale,
                  const float *most, const float *base_most, float *sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        float *mine = sums + t * 3 * nodes, part[3 * nodes];
        int64_t end = rows * (t + 1) / threads;
        for (int64_t j = 0; j < 3 * nodes; j++) mine[j] = 0;
        for (int64_t i = rows * t / threads; i < end; i += SOME) {
            int64_t some = end - i < SOME ? end - i : SOME;
            for (int64_t j = 0; j < 3 * nodes; j++) part[j] = 0;
            add_sums(z + i * stride, z_ref ? z_ref + i * stride : z_ref, some, nodes, stride, scale, most, base_most,
                     part, part + nodes, part + 2 * nodes);
            for (int64_t j = 0; j < 3 * nodes; j++) mine[j] += part[j];
        }
    }
}

/* A multiple of softmax(z) less a multiple of softmax(z_ref), written over z. */
void softmax_gradient(number *z, const number *z_ref, int64_t rows, int64_t nodes, int64_t stride, float scale,
                    const float *lse, const float *base_lse, const float *of_pi, const float *of_base, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        number *restrict model = z + i * stride;
        if (!z_ref) {
            for (int64_t j = 0; j < nodes; j++) {
                float pi = exponential(scale * widen(model[j]) - lse[j]);
                model[j] = narrow(scale * (of_pi[j] * pi - of_base[j] * exponential(-base_lse[j])));
            }
            continue;
        }
        const number *restrict reference = z_ref + i * stride;
        for (int64_t j = 0; j < nodes; j++) {
            float pi = exponential(scale * widen(model[j]) - lse[j]);
            float base = exponential(scale * widen(reference[j]) - base_lse[j]);
            /* nothing is left where the two agree */
            model[j] = narrow(scale * (of_pi[j] * (pi - base) + (of_pi[j] - of_base[j]) * base));
        }
    }
}

/* Attention weights of queries that are the last of the keys' positions, over their scores: (heads, queries,
 * group, keys). A query sees the keys up to its own position. */
void causal_softmax(number *scores, int64_t heads, int64_t queries, int64_t group, int64_t keys, int threads) {
    int64_t rows = heads * queries * group;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        number *restrict x = scores + row * keys;
        int64_t visible = keys - queries + row / group % queries + 1;
        float most = -INFINITY, total = 0;
        for (int64_t j = 0; j < visible; j++) {
            float score = widen(x[j]);
            most = score > most ? score : most;
        }
        float powers[visible];
        for (int64_t j = 0; j < visible; j++) total += powers[j] = exponential(widen(x[j]) - most);
        for (int64_t j = 0; j < visible; j++) x[j] = narrow(powers[j] / total);
        for (int64_t j = visible; j < keys; j++) x[j] = 0;
    }
}

/* The gradient in the scores from that in the weights, written over it. Both: (rows, keys). */
void softmax_backward(number *gradient, const number *weights, int64_t rows, int64_t keys, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        number *restrict g = gradient + row * keys;
        const number *restrict w = weights + row * keys;
        float mean = 0;
        for (int64_t j = 0; j < keys; j++) mean += widen(w[j]) * widen(g[j]);
        for (int64_t j = 0; j < keys; j++) g[j] = narrow(widen(w[j]) * (widen(g[j]) - mean));
    }
}

#define PIECE 64 /* of a long row: so many numbers are worked on while as many of the next row are fetched */
#define LATER 2  /* rows, of short ones: while one is worked on the next but one is fetched */

/* Numbers that are wanted soon: by itself a processor does not look beyond the end of a page. There may be none. */
static inline void fetch(const number *from, int64_t numbers) {
    for (int64_t j = 0; j < numbers; j += 64 / sizeof *from) __builtin_prefetch(from + j);
}

static inline float inverse_rms(const number *restrict x, int64_t width, float epsilon) {
    float square = 0;
    for (int64_t j = 0; j < width; j++) square += widen(x[j]) * widen(x[j]);
    return 1 / sqrtf(square / width + epsilon);
}

/* y = w * x scale; the product with the scale is rounded before it meets w. */
static inline void normalise(const number *restrict x, const number *restrict weight, int64_t width, float scale,
                             number *restrict y) {
    for (int64_t j = 0; j < width; j++) y[j] = narrow(widen(weight[j]) * widen(narrow(widen(x[j]) * scale)));
}

/* y = w * x / rms(x). x, y: (rows, width). */
void rms_norm(const number *x, const number *weight, int64_t rows, int64_t width, float epsilon, number *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const number *in = x + i * width;
        fetch(in + LATER * width, width);
        normalise(in, weight, width, inverse_rms(in, width, epsilon), y + i * width);
    }
}

/* The gradient in x from that in y, and what is `added` to it, if anything; and y again, unless it is NULL. */
void rms_norm_backward(const number *gradient, const number *x, const number *weight, const number *added, int64_t rows,
                       int64_t width, float epsilon, number *grad_x, number *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const number *restrict in = x + i * width;
        const number *restrict g = gradient + i * width;
        number *restrict out = grad_x + i * width;
        fetch(in + LATER * width, width);
        fetch(g + LATER * width, width);
        if (added) fetch(added + (i + LATER) * width, width);
        float scale = inverse_rms(in, width, epsilon), along = 0;
        for (int64_t j = 0; j < width; j++) along += widen(g[j]) * widen(weight[j]) * widen(in[j]);
        along *= scale * scale / width;
        for (int64_t j = 0; j < width; j++) {
            float grad = scale * (widen(g[j]) * widen(weight[j]) - widen(in[j]) * along);
            out[j] = narrow(grad + (added ? widen(added[i * width + j]) : 0));
        }
        if (y) normalise(in, weight, width, scale, y + i * width);
    }
}

static inline float logistic(float x) { return 1 / (1 + exponential(x < -80.0f ? 80.0f : -x)); }

/* silu(gate) * up from the gate and its logistic; silu is rounded before it meets up. */
static inline number let_through(float gate, float share, number up) {
    return narrow(widen(narrow(gate * share)) * widen(up));
}

/* y = silu(gate) * up. gate_up: (rows, 2 * width), its rows `apart`; y: (rows, width). */
void swiglu(const number *gate_up, int64_t apart, int64_t rows, int64_t width, number *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const number *restrict gate = gate_up + i * apart, *restrict up = gate + width;
        number *restrict out = y + i * width;
        for (int64_t piece = 0; piece < width; piece += PIECE) {
            int64_t end = piece + PIECE < width ? piece + PIECE : width;
            fetch(gate + apart + piece, PIECE);
            fetch(up + apart + piece, PIECE);
#pragma omp simd
            for (int64_t j = piece; j < end; j++) {
                float g = widen(gate[j]);
                out[j] = let_through(g, logistic(g), up[j]);
            }
        }
    }
}

/* Of a piece of a row: the gradients in gate and up, and y again, if there is to be. */
static inline __attribute__((always_inline)) void swiglu_gradients(const number *restrict gradient,
                                                                   const number *restrict gate, const number *restrict up,
                                                                   int64_t size, number *restrict grad_gate,
                                                                   number *restrict grad_up, int again, number *restrict y) {
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
        float g = widen(gate[j]), d = widen(gradient[j]), s = logistic(g);
        grad_gate[j] = narrow(d * widen(up[j]) * s * (1 + g * (1 - s)));
        grad_up[j] = narrow(d * g * s);
        if (again) y[j] = let_through(g, s, up[j]);
    }
}

/* The gradient in gate_up, like it, from that in y; and y again, unless it is NULL. */
void swiglu_backward(const number *gradient, const number *gate_up, int64_t apart, int64_t rows, int64_t width,
                     number *grad_gate_up, number *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        const number *gate = gate_up + i * apart, *up = gate + width, *grad = gradient + i * width;
        number *grad_gate = grad_gate_up + i * apart, *grad_up = grad_gate + width, *out = y ? y + i * width : NULL;
        for (int64_t j = 0; j < width; j += PIECE) {
            int64_t some = j + PIECE < width ? PIECE : width - j;
            fetch(gate + apart + j, PIECE);
            fetch(up + apart + j, PIECE);
            fetch(grad + width + j, PIECE);
            if (out) swiglu_gradients(grad + j, gate + j, up + j, some, grad_gate + j, grad_up + j, 1, out + j);
            else swiglu_gradients(grad + j, gate + j, up + j, some, grad_gate + j, grad_up + j, 0, NULL);
        }
    }
}

/* Rotary embedding y = x cos + (-x2, x1) sin, x1 and x2 being the halves of a head, or its gradient. x, y: (heads,
 * tokens, width), each with a stride for heads and one for tokens, or the same; cos, sin: (tokens, width). */
void rotate(const number *x, int64_t x_head, int64_t x_token, const number *cosine, const number *sine, int64_t heads,
            int64_t tokens, int64_t width, int backward, number *y, int64_t y_head, int64_t y_token, int threads) {
    int64_t half = width / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tokens; t++) {
        const number *restrict cos1 = cosine + t * width, *restrict cos2 = cos1 + half;
        /* what each half takes from the other */
        const number *restrict first = sine + t * width + (backward ? half : 0);
        const number *restrict second = sine + t * width + (backward ? 0 : half);
        float sign = backward ? -1.0f : 1.0f;
        fetch(cos1 + LATER * width, width);
        fetch(sine + (t + LATER) * width, width);
        for (int64_t h = 0; h < heads; h++) {
            fetch(x + h * x_head + (t + LATER) * x_token, width);
            const number *in1 = x + h * x_head + t * x_token, *in2 = in1 + half;
            number *out1 = y + h * y_head + t * y_token, *out2 = out1 + half;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                float x1 = widen(in1[j]), x2 = widen(in2[j]);
                out1[j] = narrow(x1 * widen(cos1[j]) - sign * x2 * widen(first[j]));
                out2[j] = narrow(x2 * widen(cos2[j]) + sign * x1 * widen(second[j]));
            }
        }
    }
}

static inline uint32_t scramble(uint32_t x, uint32_t seed) { /* MurmurHash3's last steps, the seed mixed in twice */
    x = (x ^ seed) * 0x9e3779b1u;
    x ^= x >> 16;
    x *= 0x85ebca6bu;
    x = (x ^ (x >> 13)) + seed;
    x *= 0xc2b2ae35u;
    return x ^ (x >> 16);
}

/* y (+)= x / (1 - p) where the element is kept, and 0 elsewhere; the seed says which are kept. */
void dropout(const number *x, int64_t size, float p, uint32_t seed, int add, number *y, int threads) {
    uint32_t threshold = (uint32_t)(p * 4294967296.0);
    float scale = 1 / (1 - p);
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (int64_t i = 0; i < size; i++) {
        float value = scramble((uint32_t)i, seed) < threshold ? 0 : widen(x[i]) * scale;
        y[i] = narrow(value + (add ? widen(y[i]) : 0));
    }
}
