/* The pages of keys and values, as KVLayer in kernels/backend.py describes them. */
#ifndef NYBBLE_CACHE_H
#define NYBBLE_CACHE_H

#include "simd.h"

#define KV_GROUP 64 /* dimensions of a head that share a step and a low in four bits */

typedef struct {
    void *keys, *values;                 /* (num_pages, kv_heads, page_size, dim) of kind */
    uint16_t *key_scales, *value_scales; /* fp16, NULL for the float kinds */
    long num_pages, kv_heads, page_size, dim;
    int kind;
} Cache;

enum { NO_MEMORY = -1, NO_SUCH_SLOT = -2, BAD_BATCH = -3 }; /* what a function may return */

INLINE long cache_row(const Cache *c, long page, long head, long offset) {
    return (page * c->kv_heads + head) * c->page_size + offset;
}

INLINE int is_quantized(int kind) { return kind >= KIND_I8; }

INLINE long element_bytes(long elements, int kind) {
    if (kind == KIND_I4) return elements / 2;
    if (kind == KIND_I6) return elements / 4 * 3;
    return kind == KIND_I8 ? elements : elements * kind_size(kind);
}

/* Dimensions that share a scale, and fp16 numbers a slot. */
INLINE long scale_span(const Cache *c, int kind) { return kind == KIND_I4 ? KV_GROUP : c->dim; }

INLINE long scales_per_slot(const Cache *c, int kind) {
    if (!is_quantized(kind)) return 0;
    return kind == KIND_I4 ? 2 * ((c->dim + KV_GROUP - 1) / KV_GROUP) : 1;
}

/* Sixteen nibbles; byte j holds elements 2j and 2j + 1. */
INLINE i32x16 load_nibbles(const uint8_t *p) {
    uint64_t pairs;
    memcpy(&pairs, p, sizeof pairs);
    const i8x16 codes = (i8x16)(u64x2){pairs, pairs >> 4} & 15;
    return widen_i8(SHUFFLE_BYTES(codes, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
}

/* The upper bits of sixteen six-bit codes, two each. */
INLINE i32x16 load_crumbs(const uint8_t *p) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int32_t all;
    memcpy(&all, p, sizeof all);
    return (splat_i(all) >> 2 * lanes) & 3;
}

/* Elements i .. i + 15 of a row as fp32: codes, where the kind has them. */
INLINE f32x16 load_cached(const void *p, long row, long i, long dim, int kind) {
    const uint8_t *bytes = (const uint8_t *)p + element_bytes(row * dim, kind);
    if (kind == KIND_I8) {
        i8x16 codes;
        memcpy(&codes, bytes + i, sizeof codes);
        return to_f32(widen_i8(codes));
    }
    if (kind == KIND_I4) return to_f32(load_nibbles(bytes + i / 2));
    if (kind == KIND_I6) {
        const i32x16 crumbs = load_crumbs(bytes + dim / 2 + i / 4);
        return to_f32((load_nibbles(bytes + i / 2) | crumbs << 4) - 32);
    }
    return load_kind(bytes, i, kind);
}

/* The value of codes whose scale says `step` and, in four bits, `low`. */
INLINE f32x16 dequantize(f32x16 codes, f32x16 step, f32x16 low, int kind) {
    if (kind == KIND_I4) return codes * step + low;
    return is_quantized(kind) ? codes * step : codes;
}

#endif
