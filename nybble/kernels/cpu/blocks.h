/* Blocks of KEYS slots of the cache as fp32: keys transposed, values as they stand. */
#ifndef NYBBLE_BLOCKS_H
#define NYBBLE_BLOCKS_H

#include "cache.h"

#define KEYS 32

INLINE long min_l(long a, long b) { return a < b ? a : b; }

/* Lane l of the pair (a, b) after exchanging off-diagonal pieces of n lanes. */
#define LOW1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define SWAP_STEP(n, LOW, HIGH)                                                             \
    for (int i = 0; i < 16; i++)                                                            \
        if (!(i & n)) {                                                                     \
            const f32x16 a = r[i], b = r[i + n];                                            \
            r[i] = SHUFFLE2(a, b, LOW);                                                     \
            r[i + n] = SHUFFLE2(a, b, HIGH);                                                \
        }

INLINE void transpose16(f32x16 *r) {
    SWAP_STEP(1, LOW1, HIGH1)
    SWAP_STEP(2, LOW2, HIGH2)
    SWAP_STEP(4, LOW4, HIGH4)
    SWAP_STEP(8, LOW8, HIGH8)
}

/* Step and low of sixteen slots, `per` numbers apart. */
INLINE void gather_scales(const float *scales, long per, int kind, f32x16 *step, f32x16 *low) {
    if (kind == KIND_I8 || kind == KIND_I6) *step = load_f32(scales);
    for (int i = 0; i < LANES && kind == KIND_I4; i++) {
        (*step)[i] = scales[i * per];
        (*low)[i] = scales[i * per + 1];
    }
}

/* A block of keys, transposed: kt[d][key]. Slots that no key fills yet give lanes that no row
 * sees: they exist, for a page is a multiple of KEYS. */
INLINE void load_keys(float *kt, const Cache *c, long row, const float *scales, int kind) {
    const long dim = c->dim, span = scale_span(c, kind), per = scales_per_slot(c, kind);
    for (long j = 0; j < KEYS; j += LANES)
        for (long first = 0; first < dim; first += span) {
            f32x16 step = splat(1.0f), low = splat(0.0f), square[LANES];
            gather_scales(scales + j * per + 2 * (first / span), per, kind, &step, &low);
            for (long d = first; d < min_l(dim, first + span); d += LANES) {
                for (int i = 0; i < LANES; i++)
                    square[i] = load_cached(c->keys, row + j + i, d, dim, kind);
                transpose16(square);
                for (int i = 0; i < LANES; i++)
                    store_f32(kt + (d + i) * KEYS + j, dequantize(square[i], step, low, kind));
            }
        }
}

INLINE void load_values(float *v, const Cache *c, long row, long count, const float *scales,
                        int kind) {
    const long dim = c->dim, span = scale_span(c, kind), per = scales_per_slot(c, kind);
    for (long j = 0; j < count; j++)
        for (long first = 0; first < dim; first += span) {
            const float *at = scales + j * per + 2 * (first / span);
            const f32x16 step = splat(is_quantized(kind) ? at[0] : 1.0f);
            const f32x16 low = splat(kind == KIND_I4 ? at[1] : 0.0f);
            for (long d = first; d < min_l(dim, first + span); d += LANES)
                store_f32(v + j * dim + d,
                          dequantize(load_cached(c->values, row + j, d, dim, kind), step, low,
                                     kind));
        }
}

/* The fp16 scales of a block's slots. */
INLINE void load_scales(float *out, const Cache *c, const uint16_t *scales, long row, int kind) {
    const long per = scales_per_slot(c, kind);
    for (long i = 0; i < KEYS * per; i += LANES)
        store_f32(out + i, load_kind(scales, row * per + i, KIND_F16));
}

INLINE void prefetch(const void *p, long first, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)p + first + i);
}

/* A block to come, asked for while another is worked on: a long cache is not in L3. */
INLINE void prefetch_block(const Cache *c, long row, long count, int kind) {
    const long first = element_bytes(row * c->dim, kind), size = element_bytes(c->dim, kind);
    prefetch(c->keys, first, count * size);
    prefetch(c->values, first, count * size);
    if (is_quantized(kind)) {
        const long per = 2 * scales_per_slot(c, kind);
        prefetch(c->key_scales, row * per, count * per);
        prefetch(c->value_scales, row * per, count * per);
    }
}

#endif
