/* Attention over pages, with grouped heads, in the online-softmax form (Dao et al. 2022).
 *
 * The query heads that share a K/V head are rows of one small matrix, so a key is read once for
 * all of them. Keys are taken in blocks of 32 (which never straddle pages), transposed into fp32;
 * 4 blocks make a segment. Each segment is summed up from nothing and then merged into the row's
 * state, in order: whether one thread walks all segments or many threads take one each does not
 * change a bit of the result, and neither does the composition of the batch. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>

#include "blocks.h"

/* The loops inside keep their registers only in functions of their own (GCC 12). */
#define NOINLINE __attribute__((noinline))
#define SEGMENT 128
#define ROWS 4       /* rows per register block */
#define ITEM_ROWS 64 /* rows per work item when there are many queries */
#define SPLIT_ROWS 16

typedef struct {
    const float *q; /* (tokens, kv_heads * group, dim) */
    float *out;     /* like q */
    float *lse;     /* (tokens, kv_heads * group) ln of the softmax sums, or NULL: not wanted */
    const int32_t *pages, *starts, *lengths; /* (sequences, page_stride), (sequences + 1), ... */
    long tokens, sequences, page_stride, most_pages, group;
    Cache cache; /* dim is a multiple of 16, page_size of KEYS */
    float scale;
    int closed; /* a row sees the pages before its own, and else its own key and all before it */
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

/* The slots [row, row + count) into fp32, those from `next` on asked for; the kind is a constant
 * in each branch. */
NOINLINE static void load_block(const Cache *c, long row, long count, long next, Scratch *s) {
    if (next >= 0) prefetch_block(c, next, KEYS, c->kind);
    switch (c->kind) {
    case KIND_F16: load_kv(c, row, count, s, KIND_F16); break;
    case KIND_BF16: load_kv(c, row, count, s, KIND_BF16); break;
    case KIND_I8: load_kv(c, row, count, s, KIND_I8); break;
    case KIND_I6: load_kv(c, row, count, s, KIND_I6); break;
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

/* A work item: new tokens [first, last) of a sequence over its keys [start, end). Without `states`
 * it takes all keys of one head and stores its rows. With them it is a piece of whole segments, of
 * all heads in the order in which they stand in memory, and each state goes to its place. */
typedef struct {
    long seq, head, first, last, start, end;
    float *states;
} Item;

INLINE long new_tokens(const Attention *a, long seq) { return a->starts[seq + 1] - a->starts[seq]; }
INLINE long item_rows(const Attention *a, const Item *i) { return (i->last - i->first) * a->group; }
INLINE long segments_of(long keys) { return (keys + SEGMENT - 1) / SEGMENT; }

/* How many keys, from the first on, new token `token` of a sequence sees. */
INLINE long keys_seen(const Attention *a, long seq, long token) {
    const long position = a->lengths[seq] - new_tokens(a, seq) + token;
    return a->closed ? position / a->cache.page_size * a->cache.page_size : position + 1;
}

/* The block that will be loaded after that of `key` at `row`: the next one in memory where all
 * heads are taken together, and else the head's own. -1 behind the last one. */
INLINE long next_row(const Attention *a, const Item *item, long key, long row) {
    const Cache *c = &a->cache;
    if (item->states)
        return row + KEYS < c->num_pages * c->kv_heads * c->page_size ? row + KEYS : -1;
    return key + KEYS < item->end ? block_row(a, item->seq, item->head, key + KEYS) : -1;
}

/* All rows of an item's head against the keys [start, end) within one segment. */
NOINLINE static void attend_keys(const Attention *a, const Item *item, long start, long end,
                                 Scratch *s) {
    const long rows = item_rows(a, item), dim = a->cache.dim;
    if (start % SEGMENT == 0) clear_state(s->segment, rows, dim);
    for (long key = start; key < end; key += KEYS) {
        const long count = min_l(KEYS, end - key);
        const long slot = block_row(a, item->seq, item->head, key);
        load_block(&a->cache, slot, count, next_row(a, item, key, slot), s);
        for (long row = 0; row < rows; row += ROWS) {
            long seen[ROWS];
            for (long r = 0; r < ROWS; r++)
                seen[r] = keys_seen(a, item->seq, item->first + (row + r) / a->group) - key;
            switch (rows - row) {
            case 1: attend_rows(s, row, seen, count, dim, 1); break;
            case 2: attend_rows(s, row, seen, count, dim, 2); break;
            case 3: attend_rows(s, row, seen, count, dim, 3); break;
            default: attend_rows(s, row, seen, count, dim, ROWS);
            }
        }
    }
}

/* The number of an item's row among those of q, and where it begins. */
INLINE long row_number(const Attention *a, const Item *item, long row) {
    const long token = a->starts[item->seq] + item->first + row / a->group;
    return (token * a->cache.kv_heads + item->head) * a->group + row % a->group;
}

INLINE long row_offset(const Attention *a, const Item *item, long row) {
    return row_number(a, item, row) * a->cache.dim;
}

static void load_queries(const Attention *a, const Item *item, Scratch *s) {
    const long dim = a->cache.dim;
    for (long row = 0; row < item_rows(a, item); row++)
        for (long d = 0; d < dim; d += LANES)
            store_f32(s->q + row * dim + d,
                      load_f32(a->q + row_offset(a, item, row) + d) * splat(a->scale));
}

/* A row without keys is told by its place and not by its sum: that is 0 too where every score is
 * -inf, and what others of its item see may have made its 0 * NaN a NaN. */
static void store_row(const Attention *a, const Item *item, State s, long row) {
    const long dim = a->cache.dim;
    float *out = a->out + row_offset(a, item, row);
    const int none = keys_seen(a, item->seq, item->first + row / a->group) == 0;
    const f32x16 inverse = splat(1.0f / s.sum[row]);
    for (long d = 0; d < dim; d += LANES)
        store_f32(out + d, none ? splat(0.0f) : load_f32(s.weighted + row * dim + d) * inverse);
    if (a->lse) /* ln(0) is -inf: so it is for a row without keys */
        a->lse[row_number(a, item, row)] = s.peak[row] + logf(s.sum[row]);
}

INLINE long state_floats(long rows, long dim) { return (rows * (dim + 2) + 15) / 16 * 16; }

/* The state of segment j of the item's head. */
INLINE State state_of(const Attention *a, const Item *item, long j) {
    const long rows = item_rows(a, item), size = state_floats(rows, a->cache.dim);
    return state_at(item->states + (j * a->cache.kv_heads + item->head) * size, rows);
}

static void merge_rows(const Attention *a, const Item *item, State into, State from) {
    const long dim = a->cache.dim;
    for (long r = 0; r < item_rows(a, item); r++) merge_row(into, r, from, r, dim);
}

static void store_rows(const Attention *a, const Item *item, State s) {
    for (long r = 0; r < item_rows(a, item); r++) store_row(a, item, s, r);
}

/* One head, all its keys. */
static void attend_head(const Attention *a, const Item *item, Scratch s) {
    load_queries(a, item, &s);
    clear_state(s.total, item_rows(a, item), a->cache.dim);
    for (long start = 0; start < item->end; start += SEGMENT) {
        attend_keys(a, item, start, min_l(start + SEGMENT, item->end), &s);
        merge_rows(a, item, s.total, s.segment);
    }
    store_rows(a, item, s.total);
}

/* All heads, some segments: head after head within a page, so that the memory is read on and on.
 * A cache that is not in L3 was seen to be read a third faster than one head after the other. */
static void attend_piece(const Attention *a, Item item, Scratch s) {
    const long page = a->cache.page_size, chunk = page < SEGMENT ? page : SEGMENT;
    const long heads = a->cache.kv_heads, stride = item_rows(a, &item) * a->cache.dim;
    float *const q = s.q;
    for (item.head = 0; item.head < heads; item.head++, s.q += stride) load_queries(a, &item, &s);
    for (long start = item.start, end; start < item.end; start = end) {
        end = min_l(min_l(start + chunk, item.end), (start / SEGMENT + 1) * SEGMENT);
        for (item.head = 0; item.head < heads; item.head++) {
            s.q = q + item.head * stride;
            s.segment = state_of(a, &item, start / SEGMENT);
            attend_keys(a, &item, start, end, &s);
        }
    }
}

/* What the pieces found for one head, merged in the order of the segments. */
static void merge_head(const Attention *a, Item item, long head, Scratch s) {
    item.head = head;
    clear_state(s.total, item_rows(a, &item), a->cache.dim);
    for (long j = 0; j < segments_of(keys_seen(a, item.seq, item.last - 1)); j++)
        merge_rows(a, &item, s.total, state_of(a, &item, j));
    store_rows(a, &item, s.total);
}

/* The work of a batch: counted by a first walk (items NULL), written down by a second one. */
typedef struct {
    Item *items;
    float *states;
    long count, state_floats, most_rows, segments;
} Plan;

static void add_item(Plan *p, const Attention *a, Item item, long heads) {
    const long rows = item_rows(a, &item) * heads;
    if (p->items) p->items[p->count] = item;
    p->count++;
    p->segments += segments_of(item.end - item.start) * heads;
    if (rows > p->most_rows) p->most_rows = rows;
}

/* Pieces of `step` keys and of all heads. */
static void add_pieces(Plan *p, const Attention *a, Item item, long step) {
    const long keys = item.end, heads = a->cache.kv_heads;
    if (p->items) item.states = p->states + p->state_floats;
    p->state_floats += segments_of(keys) * heads * state_floats(item_rows(a, &item), a->cache.dim);
    for (item.start = 0; item.start < keys; item.start += step) {
        item.end = min_l(item.start + step, keys);
        add_item(p, a, item, heads);
    }
}

/* Few rows with more than `longest` segments a head are cut into pieces: one thread would keep the
 * others waiting. */
static void plan_sequence(Plan *p, const Attention *a, long seq, long longest) {
    const long tokens = new_tokens(a, seq), heads = a->cache.kv_heads;
    const long keys = keys_seen(a, seq, tokens - 1);
    const long span = a->group < ITEM_ROWS ? ITEM_ROWS / a->group : 1;
    if (tokens && tokens * a->group <= SPLIT_ROWS && segments_of(keys) > longest) {
        const long step = longest > heads ? longest / heads * SEGMENT : SEGMENT;
        add_pieces(p, a, (Item){seq, 0, 0, tokens, 0, keys, NULL}, step);
        return;
    }
    for (long i = (tokens - 1) / span; i >= 0 && tokens; i--) /* the longest items first */
        for (long head = 0; head < heads; head++) {
            const long last = min_l((i + 1) * span, tokens);
            const Item item = {seq, head, i * span, last, 0, keys_seen(a, seq, last - 1), NULL};
            add_item(p, a, item, 1);
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
    const long heads = a->cache.kv_heads, merges = p->state_floats ? p->count * heads : 0;
#pragma omp parallel num_threads(threads)
    {
        const Scratch s = scratch_at(memory + thread_number() * size, &a->cache, p->most_rows);
#pragma omp for schedule(dynamic)
        for (long i = 0; i < p->count; i++)
            if (p->items[i].states) attend_piece(a, p->items[i], s);
            else attend_head(a, p->items + i, s);
#pragma omp for schedule(static)
        for (long i = 0; i < merges; i++) {
            const Item *item = p->items + i / heads;
            if (item->states && item->start == 0) merge_head(a, *item, i % heads, s);
        }
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
