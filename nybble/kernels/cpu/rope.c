/* RoPE, and the way of keys and values into the cache: rotated, rounded, put in their slots. */
#include "cache.h"
#include "rows.h"

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

/* Lanes n apart become their sum and their difference. */
#define BUTTERFLY(v, n, ...)                                                                \
    v = SHUFFLE1(v, __VA_ARGS__) + (f32x16)((i32x16)v ^ ((lanes & n) * (INT32_MIN / n)))

INLINE f32x16 hadamard16(f32x16 v) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    BUTTERFLY(v, 1, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    BUTTERFLY(v, 2, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    BUTTERFLY(v, 4, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    BUTTERFLY(v, 8, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    return v;
}

/* The normalised Walsh-Hadamard transform of blocks as large as a power of two can be. */
static void hadamard(float *x, long dim) {
    const long block = dim & -dim; /* dim is a multiple of 16 */
    for (long i = 0; i < dim; i += LANES) store_f32(x + i, hadamard16(load_f32(x + i)));
    for (long n = LANES; n < block; n *= 2)
        for (long i = 0; i < dim; i += LANES)
            if (!(i & n)) {
                const f32x16 a = load_f32(x + i), b = load_f32(x + i + n);
                store_f32(x + i, a + b);
                store_f32(x + i + n, a - b);
            }
    const f32x16 scale = splat(1.0f / __builtin_sqrtf((float)block));
    for (long i = 0; i < dim; i += LANES) store_f32(x + i, load_f32(x + i) * scale);
}

/* x as fp16 stores it. */
INLINE float round_half(float x, uint16_t *stored) {
    const u16x16 half = f32_to_half(splat(x));
    *stored = half[0];
    return half_to_f32(half)[0];
}

/* x / step to the nearest integer within [least, most]; 0 where the step vanished or is NaN. */
INLINE i32x16 round_to_codes(f32x16 x, float step, int32_t least, int32_t most) {
    const f32x16 magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    if (!(step > 0.0f)) return splat_i(0);
    const f32x16 q = max_f(-max_f(-(x / splat(step)), splat((float)-most)), splat((float)least));
    return (i32x16)(q + magic) - (i32x16)magic;
}

/* NaN where a value of x is not finite, else 0. */
INLINE float poison(const float *x, long n) {
    f32x16 sum = splat(0.0f);
    for (long i = 0; i < n; i += LANES) sum += load_f32(x + i) * splat(0.0f);
    return sum_lanes(sum);
}

/* Sixteen codes of four bits, two a byte. */
INLINE void store_nibbles(uint8_t *to, i8x16 codes) {
    const u64x2 bytes = (u64x2)codes; /* in each byte pair the low code, the high one */
    const i8x16 pairs = (i8x16)(bytes | bytes >> 4);
    const i8x16 even = SHUFFLE_BYTES(pairs, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    memcpy(to, &even, 8);
}

/* Sixteen codes of two bits, four a byte. */
INLINE void store_crumbs(uint8_t *to, i8x16 codes) {
    const u64x2 pairs = (u64x2)codes | (u64x2)codes >> 6; /* in bits 0-3 of every second byte */
    const i8x16 fours = (i8x16)(pairs | pairs >> 12);
    const i8x16 each = SHUFFLE_BYTES(fours, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    memcpy(to, &each, 4);
}

/* One scale for codes of -most to most. */
INLINE float symmetric_step(const float *x, long dim, float most, uint16_t *scale) {
    f32x16 top = splat(0.0f);
    for (long i = 0; i < dim; i += LANES)
        top = max_f(top, max_f(load_f32(x + i), -load_f32(x + i)));
    return round_half(max_lanes(top) / most + poison(x, dim), scale);
}

static void store_int6(const float *x, long dim, uint8_t *codes, uint16_t *scale) {
    const float step = symmetric_step(x, dim, 31.0f, scale);
    for (long i = 0; i < dim; i += LANES) {
        const i8x16 c = narrow_i32(round_to_codes(load_f32(x + i), step, -31, 31) + 32);
        store_nibbles(codes + i / 2, c & 15);
        store_crumbs(codes + dim / 2 + i / 4, c >> 4);
    }
}

static void store_int8(const float *x, long dim, int8_t *codes, uint16_t *scale) {
    const float step = symmetric_step(x, dim, 127.0f, scale);
    for (long i = 0; i < dim; i += LANES) {
        const i32x16 c = round_to_codes(load_f32(x + i), step, -127, 127);
        const i8x16 bytes = narrow_i32(c);
        memcpy(codes + i, &bytes, sizeof bytes);
    }
}

/* One group of four-bit codes; scales: step, low. */
static void store_int4(const float *x, long dim, uint8_t *codes, uint16_t *scales) {
    f32x16 top = load_f32(x), bottom = -top;
    for (long i = LANES; i < dim; i += LANES) {
        top = max_f(top, load_f32(x + i));
        bottom = max_f(bottom, -load_f32(x + i));
    }
    const float least = -max_lanes(bottom), range = max_lanes(top) - least;
    const float step = round_half(range / 15.0f + poison(x, dim), scales);
    const float low = round_half(least, scales + 1);
    for (long i = 0; i < dim; i += LANES) {
        const i32x16 c = round_to_codes(load_f32(x + i) - splat(low), step, 0, 15);
        store_nibbles(codes + i / 2, narrow_i32(c));
    }
}

/* One head's x into row `row` of keys or values. */
static void store_quantized(const Cache *c, const float *x, void *cache, uint16_t *scales,
                            long row) {
    if (c->kind == KIND_I8) {
        store_int8(x, c->dim, (int8_t *)cache + row * c->dim, scales + row);
        return;
    }
    if (c->kind == KIND_I6) {
        store_int6(x, c->dim, (uint8_t *)cache + element_bytes(row * c->dim, KIND_I6), scales + row);
        return;
    }
    scales += row * scales_per_slot(c, KIND_I4);
    for (long d = 0; d < c->dim; d += KV_GROUP, scales += 2) {
        const long span = c->dim - d < KV_GROUP ? c->dim - d : KV_GROUP;
        store_int4(x + d, span, (uint8_t *)cache + (row * c->dim + d) / 2, scales);
    }
}

typedef struct {
    const float *q, *k, *v; /* (tokens, heads, dim): heads dense, tokens apart by the strides */
    const float *cos, *sin; /* (tokens, dim / 2) */
    float *rotated;         /* (tokens, q_heads, dim) */
    const int32_t *slots;   /* (tokens,): page * page_size + offset */
    long q_stride, k_stride, v_stride, tokens, q_heads;
    Cache cache; /* of a quantised kind only where dim is a multiple of 16 */
} Rope;

static void rope_queries(const Rope *p, long t, const float *cos, const float *sin) {
    const long dim = p->cache.dim;
    for (long h = 0; h < p->q_heads; h++) {
        float *out = p->rotated + (t * p->q_heads + h) * dim;
        rotate_head(p->q + t * p->q_stride + h * dim, cos, sin, dim / 2, out, KIND_F32);
        if (is_quantized(p->cache.kind)) hadamard(out, dim);
    }
}

static void store_head(const Rope *p, const float *k, const float *v, const float *cos,
                       const float *sin, long row) {
    const Cache *c = &p->cache;
    const long dim = c->dim, first = row * dim;
    if (is_quantized(c->kind)) {
        float turned[dim];
        rotate_head(k, cos, sin, dim / 2, turned, KIND_F32);
        hadamard(turned, dim);
        store_quantized(c, turned, c->keys, c->key_scales, row);
        store_quantized(c, v, c->values, c->value_scales, row);
        return;
    }
    const long size = kind_size(c->kind);
    rotate_head(k, cos, sin, dim / 2, (char *)c->keys + first * size, c->kind);
    for (long i = 0; i < dim; i += LANES)
        store_part((char *)c->values + first * size, i, dim, load_part(v, i, dim, KIND_F32),
                   c->kind);
}

static void rope_token(const Rope *p, long t) {
    const Cache *c = &p->cache;
    const float *cos = p->cos + t * (c->dim / 2), *sin = p->sin + t * (c->dim / 2);
    const long page = p->slots[t] / c->page_size, offset = p->slots[t] % c->page_size;
    rope_queries(p, t, cos, sin);
    for (long h = 0; h < c->kv_heads; h++)
        store_head(p, p->k + t * p->k_stride + h * c->dim, p->v + t * p->v_stride + h * c->dim,
                   cos, sin, cache_row(c, page, h, offset));
}

/* 0, or NO_SUCH_SLOT before anything is written. */
int nybble_rope_store(const Rope *p, int threads) {
    const Cache *c = &p->cache;
    for (long t = 0; t < p->tokens; t++)
        if (p->slots[t] < 0 || p->slots[t] >= c->num_pages * c->page_size) return NO_SUCH_SLOT;
#pragma omp parallel for num_threads(threads) if (p->tokens * p->q_heads * c->dim > PARALLEL_WORK)
    for (long t = 0; t < p->tokens; t++) rope_token(p, t);
    return 0;
}
