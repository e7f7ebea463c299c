/* What a decoder does row by row between its matrices: RMSNorm, SiLU * up, merging attention. */
#include "rows.h"

static void norm_row(const float *x, const void *weight, int weight_kind, float eps, long dim,
                     float *out) {
    f32x16 squares = splat(0.0f);
    for (long i = 0; i < dim; i += LANES) {
        const f32x16 v = load_part(x, i, dim, KIND_F32);
        squares += v * v;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)dim + eps);
    for (long i = 0; i < dim; i += LANES) {
        const f32x16 v = load_part(x, i, dim, KIND_F32) * splat(scale);
        store_part(out, i, dim, v * load_part(weight, i, dim, weight_kind), KIND_F32);
    }
}

void nybble_rms_norm(const float *x, const void *weight, int weight_kind, float eps, long rows,
                     long dim, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * dim > PARALLEL_WORK)
    for (long r = 0; r < rows; r++)
        norm_row(x + r * dim, weight, weight_kind, eps, dim, out + r * dim);
}

/* gate_up (rows, 2 * width), gate first -> silu(gate) * up. */
void nybble_silu_mul(const float *gate_up, long rows, long width, float *out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * width > PARALLEL_WORK)
    for (long r = 0; r < rows; r++) {
        const float *gate = gate_up + r * 2 * width, *up = gate + width;
        for (long i = 0; i < width; i += LANES) {
            const f32x16 g = load_part(gate, i, width, KIND_F32);
            const f32x16 silu = g / (splat(1.0f) + exp_f(-g));
            store_part(out + r * width, i, width, silu * load_part(up, i, width, KIND_F32),
                       KIND_F32);
        }
    }
}

/* Attention over two sets of keys into that over both: rows of `dim`, of one head each, and the
 * logarithms of the sums that they were divided by; the second is not -inf. */
void nybble_merge_attention(const float *first, const float *first_lse, const float *second,
                            const float *second_lse, long rows, long dim, float *out,
                            int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1 && rows * dim > PARALLEL_WORK)
    for (long r = 0; r < rows; r++) {
        const f32x16 ratio = exp_f(splat(first_lse[r] - second_lse[r]));
        const f32x16 b = splat(1.0f) / (splat(1.0f) + ratio), a = ratio * b;
        for (long i = 0; i < dim; i += LANES) {
            const f32x16 x = load_part(first + r * dim, i, dim, KIND_F32);
            const f32x16 y = load_part(second + r * dim, i, dim, KIND_F32);
            store_part(out + r * dim, i, dim, a * x + b * y, KIND_F32);
        }
    }
}
