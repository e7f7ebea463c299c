/* y = x W^T + bias for few rows of x and a 16-bit (or 32-bit) W in its own layout (outputs, inputs).
 * The weights are read once and widened on the way; products and sums are fp32. */
#include "simd.h"

#define OUTPUTS 4 /* outputs at once: independent sums hide the latency of the additions */

typedef struct {
    const void *weight;
    const float *bias; /* or NULL */
    long inputs, outputs;
    int kind;
} Dense;

/* `outputs` x `rows` dot products; both are constants wherever this is inlined. */
INLINE void dots(const Dense *d, const float *x, float *out, int outputs, int rows, int kind) {
    f32x16 sums[OUTPUTS * OUTPUTS];
    const long whole = d->inputs / LANES * LANES, rest = d->inputs - whole;
    for (int i = 0; i < outputs * rows; i++) sums[i] = splat(0.0f);
#define ACCUMULATE(load_w, load_x)                                                          \
    for (int o = 0; o < outputs; o++) {                                                     \
        const f32x16 w = load_w;                                                            \
        for (int r = 0; r < rows; r++) sums[o * rows + r] += w * load_x;                    \
    }
    for (long k = 0; k < whole; k += LANES)
        ACCUMULATE(load_kind(d->weight, o * d->inputs + k, kind), load_f32(x + r * d->inputs + k))
    if (rest)
        ACCUMULATE(load_tail(d->weight, o * d->inputs + whole, rest, kind),
                   load_tail(x, r * d->inputs + whole, rest, KIND_F32))
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < rows; r++)
            out[r * d->outputs + o] = sum_lanes(sums[o * rows + r]) + (d->bias ? d->bias[o] : 0.0f);
}

INLINE void dots_of_kind(const Dense *d, const float *x, float *out, int outputs, int rows) {
    if (d->kind == KIND_F16) dots(d, x, out, outputs, rows, KIND_F16);
    else if (d->kind == KIND_BF16) dots(d, x, out, outputs, rows, KIND_BF16);
    else dots(d, x, out, outputs, rows, KIND_F32);
}

/* One group of outputs, all rows: by fours, then one by one. */
static void output_group(const Dense *d, const float *x, long rows, float *out, int outputs) {
    long r = 0;
    for (; r + 4 <= rows; r += 4) {
        if (outputs == OUTPUTS)
            dots_of_kind(d, x + r * d->inputs, out + r * d->outputs, OUTPUTS, 4);
        else dots_of_kind(d, x + r * d->inputs, out + r * d->outputs, 1, 4);
    }
    for (; r < rows; r++) {
        if (outputs == OUTPUTS)
            dots_of_kind(d, x + r * d->inputs, out + r * d->outputs, OUTPUTS, 1);
        else dots_of_kind(d, x + r * d->inputs, out + r * d->outputs, 1, 1);
    }
}

void nybble_dense_linear(const Dense *d, const float *x, long rows, float *out, int threads) {
    const long groups = (d->outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long g = 0; g < groups; g++) {
        const long first = g * OUTPUTS, left = d->outputs - first;
        Dense part = *d;
        part.weight = (const char *)d->weight + first * d->inputs * kind_size(d->kind);
        if (d->bias) part.bias = d->bias + first;
        if (left >= OUTPUTS) {
            output_group(&part, x, rows, out + first, OUTPUTS);
            continue;
        }
        for (long o = 0; o < left; o++) {
            output_group(&part, x, rows, out + first + o, 1);
            part.weight = (const char *)part.weight + d->inputs * kind_size(d->kind);
            if (d->bias) part.bias++;
        }
    }
}
