/* What a decoder does row by row between its matrices: RMSNorm, SiLU * up, RoPE with the cache. */
#include "simd.h"

#define PARALLEL_WORK 16384 /* elements below which waking the other threads costs more */

INLINE f32x16 load_part(const void *p, long i, long n, int kind) {
    return n - i >= LANES ? load_kind(p, i, kind) : load_tail(p, i, n - i, kind);
}

INLINE void store_part(void *p, long i, long n, f32x16 v, int kind) {
    if (n - i >= LANES) store_kind(p, i, v, kind);
    else store_tail(p, i, v, n - i, kind);
}

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

/* Half-split rotation of one head: pairs (i, i + half). */
INLINE void rotate_head(const float *x, const float *cos, const float *sin, long half, void *out,
                        int kind) {
    char *second = (char *)out + half * kind_size(kind);
    for (long i = 0; i < half; i += LANES) {
        const f32x16 a = load_part(x, i, half, KIND_F32), c = load_part(cos, i, half, KIND_F32);
        const f32x16 b = load_part(x + half, i, half, KIND_F32);
        const f32x16 s = load_part(sin, i, half, KIND_F32);
        store_part(out, i, half, a * c - b * s, kind);
        store_part(second, i, half, b * c + a * s, kind);
    }
}

typedef struct {
    const float *q, *k, *v; /* (tokens, heads, dim): heads dense, tokens apart by the strides */
    const float *cos, *sin; /* (tokens, dim / 2) */
    float *rotated;         /* (tokens, q_heads, dim) */
    void *keys, *values;    /* (kv_heads, slots, dim) of cache_kind, heads apart by the strides */
    long q_stride, k_stride, v_stride, keys_stride, values_stride;
    long tokens, q_heads, kv_heads, dim, start;
    int cache_kind;
} Rope;

static void rope_token(const Rope *p, long t) {
    const float *cos = p->cos + t * (p->dim / 2), *sin = p->sin + t * (p->dim / 2);
    const long size = kind_size(p->cache_kind), slot = (p->start + t) * p->dim;
    for (long h = 0; h < p->q_heads; h++)
        rotate_head(p->q + t * p->q_stride + h * p->dim, cos, sin, p->dim / 2,
                    p->rotated + (t * p->q_heads + h) * p->dim, KIND_F32);
    for (long h = 0; h < p->kv_heads; h++) {
        char *key = (char *)p->keys + (h * p->keys_stride + slot) * size;
        char *value = (char *)p->values + (h * p->values_stride + slot) * size;
        const float *v = p->v + t * p->v_stride + h * p->dim;
        rotate_head(p->k + t * p->k_stride + h * p->dim, cos, sin, p->dim / 2, key,
                    p->cache_kind);
        for (long i = 0; i < p->dim; i += LANES)
            store_part(value, i, p->dim, load_part(v, i, p->dim, KIND_F32), p->cache_kind);
    }
}

void nybble_rope_store(const Rope *p, int threads) {
#pragma omp parallel for num_threads(threads) if (p->tokens * p->q_heads * p->dim > PARALLEL_WORK)
    for (long t = 0; t < p->tokens; t++) rope_token(p, t);
}
