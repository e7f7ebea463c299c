/* Causal attention over a cache, with grouped heads, in the online-softmax form (Dao et al. 2022).
 *
 * The query heads that share a K/V head are rows of one small matrix, so a key is read once for
 * all of them. Keys are taken in blocks of 32, transposed into fp32; 4 blocks make a segment.
 * Each segment is summed up from nothing and then merged into the row's state, in order: whether
 * one thread walks all segments (prefill) or many threads take one each (decode) does not change
 * a bit of the result, and neither does the composition of the batch. */
#include <float.h>
#include <stdlib.h>

#include "simd.h"

#define KEYS 32
#define SEGMENT 128
#define ROWS 4       /* rows per register block */
#define ITEM_ROWS 64 /* rows per work item when there are many queries */
#define SPLIT_ROWS 16

typedef struct {
    const float *q;           /* (tokens, kv_heads * group, dim) */
    const void *keys, *values; /* (kv_heads, slots, dim) of cache_kind, heads apart by strides */
    float *out;               /* like q */
    long tokens, kv_heads, group, dim, length, keys_stride, values_stride;
    float scale;
    int cache_kind;
} Attention;

/* Softmax state of some rows: out = weighted / sum once everything is merged. */
typedef struct {
    float *peak, *sum; /* [rows] */
    float *weighted;   /* [rows][dim] */
} State;

/* One thread's working memory; q is scaled, rows padded to a multiple of ROWS. */
typedef struct {
    float *q, *keys, *values, *weights;
    State segment, total;
} Scratch;

INLINE long min_l(long a, long b) { return a < b ? a : b; }
INLINE float max_s(float a, float b) { return a > b ? a : b; }
INLINE float exp_s(float x) { return exp_f(splat(x))[0]; }

INLINE State state_at(float *memory, long rows) {
    return (State){memory, memory + rows, memory + 2 * rows};
}

static void clear_state(State s, long rows, long dim) {
    for (long r = 0; r < rows; r++) s.peak[r] = -FLT_MAX, s.sum[r] = 0.0f;
    memset(s.weighted, 0, (size_t)(rows * dim) * sizeof(float));
}

static void merge_row(State into, long i, State from, long j, long dim) {
    const float peak = max_s(into.peak[i], from.peak[j]);
    const float a = exp_s(into.peak[i] - peak), b = exp_s(from.peak[j] - peak);
    float *x = into.weighted + i * dim;
    const float *y = from.weighted + j * dim;
    into.sum[i] = into.sum[i] * a + from.sum[j] * b;
    into.peak[i] = peak;
    for (long d = 0; d < dim; d += LANES)
        store_f32(x + d, load_f32(x + d) * splat(a) + load_f32(y + d) * splat(b));
}

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

/* 16 keys x 16 of their elements, transposed; `count` is a constant 16 but in the last block. */
INLINE void load_square(float *kt, const void *keys, long first, long count, long dim, int kind) {
    f32x16 rows[16];
    for (int i = 0; i < LANES; i++)
        rows[i] = i < count ? load_kind(keys, first + i * dim, kind) : splat(0.0f);
    transpose16(rows);
    for (int i = 0; i < LANES; i++) store_f32(kt + i * KEYS, rows[i]);
}

/* Keys [0, count) of a block, transposed: kt[d][key]; missing keys are 0. */
INLINE void load_keys(float *kt, const void *keys, long first, long count, long dim, int kind) {
    for (long j = 0; j < KEYS; j += LANES)
        for (long d = 0; d < dim; d += LANES) {
            float *square = kt + d * KEYS + j;
            if (count - j >= LANES) load_square(square, keys, first + j * dim + d, LANES, dim, kind);
            else load_square(square, keys, first + j * dim + d, count - j, dim, kind);
        }
}

INLINE void load_values(float *v, const void *values, long first, long count, long dim, int kind) {
    for (long i = 0; i < count * dim; i += LANES)
        store_f32(v + i, load_kind(values, first + i, kind));
}

/* The block after this one, asked for while this one is worked on: a long cache is not in L3. */
INLINE void prefetch_block(const void *p, long first, long count, long dim, int kind) {
    const char *next = (const char *)p + (first + KEYS * dim) * kind_size(kind);
    for (long i = 0; i < count * dim * kind_size(kind); i += 64) __builtin_prefetch(next + i);
}

/* Keys and values of one block into fp32; the kind is a constant in each branch. */
static void load_block(const Attention *a, long head, long start, long count, Scratch *s) {
    const long ahead = min_l(KEYS, a->length - start - KEYS);
    prefetch_block(a->keys, head * a->keys_stride + start * a->dim, ahead, a->dim, a->cache_kind);
    prefetch_block(a->values, head * a->values_stride + start * a->dim, ahead, a->dim,
                   a->cache_kind);
#define LOAD_BOTH(kind)                                                                     \
    load_keys(s->keys, a->keys, head * a->keys_stride + start * a->dim, count, a->dim, kind); \
    load_values(s->values, a->values, head * a->values_stride + start * a->dim, count, a->dim, kind)
    if (a->cache_kind == KIND_F16) {
        LOAD_BOTH(KIND_F16);
    } else if (a->cache_kind == KIND_BF16) {
        LOAD_BOTH(KIND_BF16);
    } else {
        LOAD_BOTH(KIND_F32);
    }
}

INLINE f32x16 lane_numbers(void) {
    return (f32x16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

/* Scores of n rows against the block, -inf beyond `seen[r]` keys, then their softmax weights. */
INLINE void weigh_keys(Scratch *s, long row, const long *seen, long dim, float *shrink, int n) {
    f32x16 low[ROWS], high[ROWS];
    const float *q = s->q + row * dim;
    for (int r = 0; r < n; r++) low[r] = high[r] = splat(0.0f);
    for (long d = 0; d < dim; d++) {
        const f32x16 k0 = load_f32(s->keys + d * KEYS), k1 = load_f32(s->keys + d * KEYS + LANES);
        for (int r = 0; r < n; r++) {
            const f32x16 x = splat(q[r * dim + d]);
            low[r] += x * k0;
            high[r] += x * k1;
        }
    }
    for (int r = 0; r < n; r++) {
        float *peak = s->segment.peak + row + r, *sum = s->segment.sum + row + r;
        if (seen[r] < KEYS) {
            const f32x16 last = splat((float)seen[r]), none = splat(-__builtin_inff());
            low[r] = select_f(lane_numbers() < last, low[r], none);
            high[r] = select_f(lane_numbers() + LANES < last, high[r], none);
        }
        const float top = max_s(max_lanes(max_f(low[r], high[r])), *peak);
        low[r] = exp_f(low[r] - top);
        high[r] = exp_f(high[r] - top);
        shrink[r] = exp_s(*peak - top);
        *sum = *sum * shrink[r] + sum_lanes(low[r] + high[r]);
        *peak = top;
        store_f32(s->weights + r * KEYS, low[r]);
        store_f32(s->weights + r * KEYS + LANES, high[r]);
    }
}

/* weighted = weighted * shrink + weights x values, `width` vectors of the head at a time. */
INLINE void add_values(Scratch *s, long row, long count, long dim, const float *shrink, int n,
                       int width) {
    for (long d = 0; d < dim; d += LANES * width) {
        f32x16 sums[ROWS * 4];
        for (int r = 0; r < n; r++)
            for (int w = 0; w < width; w++)
                sums[r * width + w] =
                    load_f32(s->segment.weighted + (row + r) * dim + d + w * LANES) *
                    splat(shrink[r]);
        for (long j = 0; j < count; j++)
            for (int w = 0; w < width; w++) {
                const f32x16 v = load_f32(s->values + j * dim + d + w * LANES);
                for (int r = 0; r < n; r++)
                    sums[r * width + w] += splat(s->weights[r * KEYS + j]) * v;
            }
        for (int r = 0; r < n; r++)
            for (int w = 0; w < width; w++)
                store_f32(s->segment.weighted + (row + r) * dim + d + w * LANES,
                          sums[r * width + w]);
    }
}

INLINE void attend_rows(Scratch *s, long row, const long *seen, long count, long dim, int n) {
    float shrink[ROWS];
    weigh_keys(s, row, seen, dim, shrink, n);
    if (dim % (4 * LANES) == 0) add_values(s, row, count, dim, shrink, n, 4);
    else add_values(s, row, count, dim, shrink, n, 1);
}

/* A work item: tokens [first, last) of one K/V head. */
typedef struct {
    long head, first, last;
} Item;

INLINE long item_rows(const Attention *a, Item i) { return (i.last - i.first) * a->group; }
INLINE long item_keys(const Attention *a, Item i) { return a->length - a->tokens + i.last; }

/* All rows of an item against the keys [start, end) of one segment, into s->segment. */
static void attend_segment(const Attention *a, Item item, long start, long end, Scratch *s) {
    const long rows = item_rows(a, item);
    clear_state(s->segment, rows, a->dim);
    for (long key = start; key < end; key += KEYS) {
        const long count = min_l(KEYS, end - key);
        load_block(a, item.head, key, count, s);
        for (long row = 0; row < rows; row += ROWS) {
            long seen[ROWS];
            for (long r = 0; r < ROWS; r++)
                seen[r] = a->length - a->tokens + item.first + (row + r) / a->group + 1 - key;
            switch (rows - row) {
            case 1: attend_rows(s, row, seen, count, a->dim, 1); break;
            case 2: attend_rows(s, row, seen, count, a->dim, 2); break;
            case 3: attend_rows(s, row, seen, count, a->dim, 3); break;
            default: attend_rows(s, row, seen, count, a->dim, ROWS);
            }
        }
    }
}

INLINE long row_offset(const Attention *a, Item item, long row) {
    const long token = item.first + row / a->group;
    return ((token * a->kv_heads + item.head) * a->group + row % a->group) * a->dim;
}

static void load_queries(const Attention *a, Item item, Scratch *s) {
    for (long row = 0; row < item_rows(a, item); row++)
        for (long d = 0; d < a->dim; d += LANES)
            store_f32(s->q + row * a->dim + d,
                      load_f32(a->q + row_offset(a, item, row) + d) * splat(a->scale));
}

static void store_row(const Attention *a, Item item, State s, long row) {
    const f32x16 inverse = splat(1.0f / s.sum[row]);
    for (long d = 0; d < a->dim; d += LANES)
        store_f32(a->out + row_offset(a, item, row) + d,
                  load_f32(s.weighted + row * a->dim + d) * inverse);
}

/* Many queries: one thread takes the item through all its segments. */
static void attend_item(const Attention *a, Item item, Scratch *s) {
    const long rows = item_rows(a, item), keys = item_keys(a, item);
    load_queries(a, item, s);
    clear_state(s->total, rows, a->dim);
    for (long start = 0; start < keys; start += SEGMENT) {
        attend_segment(a, item, start, min_l(start + SEGMENT, keys), s);
        for (long r = 0; r < rows; r++) merge_row(s->total, r, s->segment, r, a->dim);
    }
    for (long r = 0; r < rows; r++) store_row(a, item, s->total, r);
}

INLINE long state_floats(long rows, long dim) { return (rows * (dim + 2) + 15) / 16 * 16; }

INLINE long scratch_floats(long rows, long dim) {
    return rows * dim + 2 * KEYS * dim + ROWS * KEYS + 2 * state_floats(rows, dim);
}

static Scratch scratch_at(float *memory, long rows, long dim) {
    float *keys = memory + rows * dim, *values = keys + KEYS * dim, *weights = values + KEYS * dim;
    float *states = weights + ROWS * KEYS;
    return (Scratch){memory, keys, values, weights, state_at(states, rows),
                     state_at(states + state_floats(rows, dim), rows)};
}

INLINE float *allocate(long floats) {
    return aligned_alloc(64, (size_t)(floats * 4 + 63) / 64 * 64);
}

#ifdef _OPENMP
#include <omp.h>
INLINE int thread_number(void) { return omp_get_thread_num(); }
#else
INLINE int thread_number(void) { return 0; }
#endif

/* Prefill: items of about ITEM_ROWS rows, the longest first. */
static int attend_queries(const Attention *a, int threads) {
    const long span = a->group < ITEM_ROWS ? ITEM_ROWS / a->group : 1;
    const long spans = (a->tokens + span - 1) / span, rows = span * a->group;
    const long size = (scratch_floats(rows, a->dim) + 15) / 16 * 16;
    float *memory = allocate(size * threads);
    if (!memory) return -1;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long i = 0; i < spans * a->kv_heads; i++) {
        const long first = (spans - 1 - i / a->kv_heads) * span;
        const Item item = {i % a->kv_heads, first, min_l(first + span, a->tokens)};
        Scratch s = scratch_at(memory + thread_number() * size, rows, a->dim);
        attend_item(a, item, &s);
    }
    free(memory);
    return 0;
}

/* Decode: one item a segment, whose states are then merged in order. */
static int attend_split(const Attention *a, int threads) {
    const long rows = a->tokens * a->group, segments = (a->length + SEGMENT - 1) / SEGMENT;
    const long size = (scratch_floats(rows, a->dim) + 15) / 16 * 16;
    const long state = state_floats(rows, a->dim), items = segments * a->kv_heads;
    float *memory = allocate(size * threads + state * items);
    if (!memory) return -1;
    float *states = memory + size * threads;
#pragma omp parallel num_threads(threads)
    {
        Scratch s = scratch_at(memory + thread_number() * size, rows, a->dim);
#pragma omp for schedule(static)
        for (long i = 0; i < items; i++) {
            const Item item = {i / segments, 0, a->tokens};
            const long start = i % segments * SEGMENT;
            load_queries(a, item, &s);
            s.segment = state_at(states + i * state, rows);
            attend_segment(a, item, start, min_l(start + SEGMENT, a->length), &s);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < rows * a->kv_heads; i++) {
            const Item item = {i / rows, 0, a->tokens};
            clear_state(s.total, rows, a->dim);
            for (long j = 0; j < segments; j++)
                merge_row(s.total, i % rows,
                          state_at(states + (item.head * segments + j) * state, rows), i % rows,
                          a->dim);
            store_row(a, item, s.total, i % rows);
        }
    }
    free(memory);
    return 0;
}

/* dim a multiple of 16, tokens >= 1, length >= tokens. 0, or -1 when memory ran out. */
int nybble_attention(const Attention *a, int threads) {
    return a->tokens * a->group <= SPLIT_ROWS ? attend_split(a, threads)
                                              : attend_queries(a, threads);
}
