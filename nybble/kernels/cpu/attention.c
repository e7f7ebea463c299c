/* Causal attention over pages, with grouped heads, in the online-softmax form (Dao et al. 2022).
 *
 * The query heads that share a K/V head are rows of one small matrix, so a key is read once for
 * all of them. Keys are taken in blocks of 32 (which never straddle pages), transposed into fp32;
 * 4 blocks make a segment. Each segment is summed up from nothing and then merged into the row's
 * state, in order: whether one thread walks all segments or many threads take one each does not
 * change a bit of the result, and neither does the composition of the batch. */
#include <float.h>
#include <limits.h>
#include <stdlib.h>

#include "cache.h"

/* The loops inside keep their registers only in functions of their own (GCC 12). */
#define NOINLINE __attribute__((noinline))
#define KEYS 32
#define SEGMENT 128
#define ROWS 4       /* rows per register block */
#define ITEM_ROWS 64 /* rows per work item when there are many queries */
#define SPLIT_ROWS 16

typedef struct {
    const float *q; /* (tokens, kv_heads * group, dim) */
    float *out;     /* like q */
    const int32_t *pages, *starts, *lengths; /* (sequences, page_stride), (sequences + 1), ... */
    long tokens, sequences, page_stride, most_pages, group;
    Cache cache; /* dim is a multiple of 16, page_size of KEYS */
    float scale;
} Attention;

/* Softmax state of some rows: out = weighted / sum once everything is merged. */
typedef struct {
    float *peak, *sum; /* [rows] */
    float *weighted;   /* [rows][dim] */
} State;

/* One thread's working memory; q is scaled, rows padded to a multiple of ROWS. */
typedef struct {
    float *q, *keys, *values, *weights, *scales;
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

/* Step and low of sixteen slots, `per` numbers apart. */
INLINE void gather_scales(const float *scales, long per, int kind, f32x16 *step, f32x16 *low) {
    if (kind == KIND_I8) *step = load_f32(scales);
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
                    square[i] = load_cached(c->keys, (row + j + i) * dim + d, kind);
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
                          dequantize(load_cached(c->values, (row + j) * dim + d, kind), step, low,
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

INLINE void load_kv(const Cache *c, long row, long count, Scratch *s, int kind) {
    if (is_quantized(kind)) load_scales(s->scales, c, c->key_scales, row, kind);
    load_keys(s->keys, c, row, s->scales, kind);
    if (is_quantized(kind)) load_scales(s->scales, c, c->value_scales, row, kind);
    load_values(s->values, c, row, count, s->scales, kind);
}

/* Where the slots of the block that begins at key `start` stand. */
INLINE long block_row(const Attention *a, long seq, long head, long start) {
    const long page = a->pages[seq * a->page_stride + start / a->cache.page_size];
    return cache_row(&a->cache, page, head, start % a->cache.page_size);
}

/* Keys [start, start + count) of a head into fp32; the kind is a constant in each branch. */
NOINLINE static void load_block(const Attention *a, long seq, long head, long start, long count,
                       Scratch *s) {
    const Cache *c = &a->cache;
    const long row = block_row(a, seq, head, start), left = a->lengths[seq] - start - KEYS;
    if (left > 0)
        prefetch_block(c, block_row(a, seq, head, start + KEYS), min_l(KEYS, left), c->kind);
    switch (c->kind) {
    case KIND_F16: load_kv(c, row, count, s, KIND_F16); break;
    case KIND_BF16: load_kv(c, row, count, s, KIND_BF16); break;
    case KIND_I8: load_kv(c, row, count, s, KIND_I8); break;
    case KIND_I4: load_kv(c, row, count, s, KIND_I4); break;
    default: load_kv(c, row, count, s, KIND_F32);
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

/* A work item: rows of one K/V head for new tokens [first, last) of a sequence, over its keys
 * [start, end). Without `states` it sees all keys and stores its rows; with them it is a piece of
 * whole segments, and the state of each goes to the place of its number. */
typedef struct {
    long seq, head, first, last, start, end;
    float *states;
} Item;

INLINE long new_tokens(const Attention *a, long seq) { return a->starts[seq + 1] - a->starts[seq]; }
INLINE long item_rows(const Attention *a, const Item *i) { return (i->last - i->first) * a->group; }

/* All rows of an item against the keys [start, end) of one segment, into s->segment. */
NOINLINE static void attend_segment(const Attention *a, const Item *item, long start, long end,
                           Scratch *s) {
    const long rows = item_rows(a, item), dim = a->cache.dim;
    const long past = a->lengths[item->seq] - new_tokens(a, item->seq);
    clear_state(s->segment, rows, dim);
    for (long key = start; key < end; key += KEYS) {
        const long count = min_l(KEYS, end - key);
        load_block(a, item->seq, item->head, key, count, s);
        for (long row = 0; row < rows; row += ROWS) {
            long seen[ROWS];
            for (long r = 0; r < ROWS; r++)
                seen[r] = past + item->first + (row + r) / a->group + 1 - key;
            switch (rows - row) {
            case 1: attend_rows(s, row, seen, count, dim, 1); break;
            case 2: attend_rows(s, row, seen, count, dim, 2); break;
            case 3: attend_rows(s, row, seen, count, dim, 3); break;
            default: attend_rows(s, row, seen, count, dim, ROWS);
            }
        }
    }
}

INLINE long row_offset(const Attention *a, const Item *item, long row) {
    const long token = a->starts[item->seq] + item->first + row / a->group;
    return ((token * a->cache.kv_heads + item->head) * a->group + row % a->group) * a->cache.dim;
}

static void load_queries(const Attention *a, const Item *item, Scratch *s) {
    const long dim = a->cache.dim;
    for (long row = 0; row < item_rows(a, item); row++)
        for (long d = 0; d < dim; d += LANES)
            store_f32(s->q + row * dim + d,
                      load_f32(a->q + row_offset(a, item, row) + d) * splat(a->scale));
}

static void store_row(const Attention *a, const Item *item, State s, long row) {
    const f32x16 inverse = splat(1.0f / s.sum[row]);
    for (long d = 0; d < a->cache.dim; d += LANES)
        store_f32(a->out + row_offset(a, item, row) + d,
                  load_f32(s.weighted + row * a->cache.dim + d) * inverse);
}

INLINE long state_floats(long rows, long dim) { return (rows * (dim + 2) + 15) / 16 * 16; }

/* The state of segment j of a split item. */
INLINE State state_of(const Attention *a, const Item *item, long j) {
    const long rows = item_rows(a, item);
    return state_at(item->states + j * state_floats(rows, a->cache.dim), rows);
}

static void merge_rows(const Attention *a, const Item *item, State into, State from) {
    const long dim = a->cache.dim;
    for (long r = 0; r < item_rows(a, item); r++) merge_row(into, r, from, r, dim);
}

static void store_rows(const Attention *a, const Item *item, State s) {
    for (long r = 0; r < item_rows(a, item); r++) store_row(a, item, s, r);
}

static void attend_item(const Attention *a, const Item *item, Scratch s) {
    load_queries(a, item, &s);
    if (!item->states) clear_state(s.total, item_rows(a, item), a->cache.dim);
    for (long start = item->start; start < item->end; start += SEGMENT) {
        if (item->states) s.segment = state_of(a, item, start / SEGMENT);
        attend_segment(a, item, start, min_l(start + SEGMENT, item->end), &s);
        if (!item->states) merge_rows(a, item, s.total, s.segment);
    }
    if (!item->states) store_rows(a, item, s.total);
}

INLINE long segments_of(long keys) { return (keys + SEGMENT - 1) / SEGMENT; }

/* What the segments of a split item found, merged in their order. */
static void merge_item(const Attention *a, const Item *item, Scratch s) {
    clear_state(s.total, item_rows(a, item), a->cache.dim);
    for (long j = 0; j < segments_of(a->lengths[item->seq]); j++)
        merge_rows(a, item, s.total, state_of(a, item, j));
    store_rows(a, item, s.total);
}

/* The work of a batch: counted by a first walk (items NULL), written down by a second one. */
typedef struct {
    Item *items;
    float *states;
    long count, state_floats, most_rows, segments;
} Plan;

static void add_item(Plan *p, const Attention *a, Item item) {
    if (p->items) p->items[p->count] = item;
    p->count++;
    p->segments += segments_of(item.end - item.start);
    if (item_rows(a, &item) > p->most_rows) p->most_rows = item_rows(a, &item);
}

/* In pieces of at most `longest` segments. */
static void add_split(Plan *p, const Attention *a, Item item, long longest) {
    const long keys = item.end, state = state_floats(item_rows(a, &item), a->cache.dim);
    if (p->items) item.states = p->states + p->state_floats;
    p->state_floats += segments_of(keys) * state;
    for (item.start = 0; item.start < keys; item.start += longest * SEGMENT) {
        item.end = min_l(item.start + longest * SEGMENT, keys);
        add_item(p, a, item);
    }
}

/* Few rows over more than `longest` segments are split: one thread would keep the others waiting. */
static void plan_sequence(Plan *p, const Attention *a, long seq, long longest) {
    const long tokens = new_tokens(a, seq), past = a->lengths[seq] - tokens;
    const long span = a->group < ITEM_ROWS ? ITEM_ROWS / a->group : 1;
    const int split = tokens * a->group <= SPLIT_ROWS && segments_of(past + tokens) > longest;
    for (long i = (tokens - 1) / span; i >= 0 && tokens; i--) /* the longest items first */
        for (long head = 0; head < a->cache.kv_heads; head++) {
            const long first = i * span, last = min_l(first + span, tokens);
            const Item item = {seq, head, first, last, 0, past + last, NULL};
            if (split) add_split(p, a, item, longest);
            else add_item(p, a, item);
        }
}

static void plan_batch(Plan *p, const Attention *a, long longest) {
    p->count = p->state_floats = p->segments = 0;
    for (long seq = 0; seq < a->sequences; seq++) plan_sequence(p, a, seq, longest);
}

INLINE long scratch_floats(const Cache *c, long rows) {
    const long scales = KEYS * scales_per_slot(c, c->kind);
    return rows * c->dim + 2 * KEYS * c->dim + ROWS * KEYS + scales +
           2 * state_floats(rows, c->dim);
}

static Scratch scratch_at(float *memory, const Cache *c, long rows) {
    float *keys = memory + rows * c->dim, *values = keys + KEYS * c->dim;
    float *weights = values + KEYS * c->dim, *scales = weights + ROWS * KEYS;
    float *states = scales + KEYS * scales_per_slot(c, c->kind);
    return (Scratch){memory, keys, values, weights, scales, state_at(states, rows),
                     state_at(states + state_floats(rows, c->dim), rows)};
}

#ifdef _OPENMP
#include <omp.h>
INLINE int thread_number(void) { return omp_get_thread_num(); }
#else
INLINE int thread_number(void) { return 0; }
#endif

static void run_plan(const Attention *a, const Plan *p, float *memory, long size, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Scratch s = scratch_at(memory + thread_number() * size, &a->cache, p->most_rows);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < p->count; i++) attend_item(a, p->items + i, s);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (p->state_floats ? p->count : 0); i++)
            if (p->items[i].states && p->items[i].start == 0) merge_item(a, p->items + i, s);
    }
}

INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* Whether rows, lengths and pages make sense together: what is read must lie in the cache. */
static int check_batch(const Attention *a) {
    if (a->starts[0] != 0 || a->starts[a->sequences] != a->tokens) return BAD_BATCH;
    for (long seq = 0; seq < a->sequences; seq++) {
        const long tokens = new_tokens(a, seq), length = a->lengths[seq];
        if (tokens < 0 || length < tokens) return BAD_BATCH;
        const long used = round_up(length, a->cache.page_size) / a->cache.page_size;
        if (used > a->most_pages) return NO_SUCH_SLOT;
        for (long i = 0; i < used; i++) {
            const long page = a->pages[seq * a->page_stride + i];
            if (page < 0 || page >= a->cache.num_pages) return NO_SUCH_SLOT;
        }
    }
    return 0;
}

int nybble_attention(const Attention *a, int threads) {
    Plan p = {0};
    const int status = check_batch(a);
    if (status) return status;
    plan_batch(&p, a, LONG_MAX);
    const long longest = p.segments / (8 * threads) + 1; /* an eighth of a thread's share */
    plan_batch(&p, a, longest);
    const long size = round_up(scratch_floats(&a->cache, p.most_rows), 16);
    const long floats = size * threads + p.state_floats;
    float *memory = aligned_alloc(64, (size_t)round_up(floats * 4, 64));
    p.items = malloc((size_t)(p.count + 1) * sizeof(Item));
    p.states = memory + size * threads;
    if (memory && p.items) {
        plan_batch(&p, a, longest);
        run_plan(a, &p, memory, size, threads);
    }
    const int done = memory && p.items ? 0 : NO_MEMORY;
    free(memory);
    free(p.items);
    return done;
}
