/* y = x W + bias for GPTQ words of 4 or 8 bits, activations rounded to 8 bits inside.
 *
 * A tile is 16 outputs; its words stand in the order [K / pack][16], so one vector load brings one
 * GPTQ word of each output. The low nibbles of such a word are k = 0, 2, 4, 6 and the high ones
 * 1, 3, 5, 7: the activations are put in that order, and the weights are used as they come.
 *
 * Every 32 inputs of a row of x share one scale (largest magnitude / 127). Their products are
 * summed exactly in integers; the zero point enters through the sum of the 32 activations.
 * A row's arithmetic does not depend on which other rows are computed with it. */
#include <stdlib.h>

#include "simd.h"

#define BLOCK 32
#define QUADS (BLOCK / 4)
#define MAX_ROWS 8   /* rows that share one pass over a tile: 8 sums, 8 partial sums, 2 weights */
#define ROW_PANEL 64 /* rows whose quantised activations should stay in the L2 cache */

typedef struct {
    const int32_t *words; /* [tiles][blocks * BLOCK / pack][16] */
    const void *scales;   /* [tiles][groups][16] of scale_kind */
    const uint8_t *zeros; /* [tiles][groups][16], or NULL: 2 ** (bits - 1) everywhere */
    const float *bias;    /* [outputs] or NULL */
    const int32_t *perm;  /* [rows]: the input of each row of W, or NULL; `inputs` means 0 */
    long inputs, outputs, rows, groups, blocks_per_group;
    int bits, scale_kind;
} Matrix;

/* Quantised rows, interleaved within a batch of `n` rows: element [i * n + r]. */
typedef struct {
    int32_t *quads; /* [blocks * QUADS][n]: four int8 each */
    float *scales;  /* [blocks][n] */
    int32_t *sums;  /* [blocks][n]: -(sum of the block), times the zero when that is constant */
} Batch;

INLINE long min_l(long a, long b) { return a < b ? a : b; }
INLINE long block_count(const Matrix *m) { return (m->rows + BLOCK - 1) / BLOCK; }

INLINE Batch batch_at(const Batch *all, long row, long blocks) {
    return (Batch){all->quads + row * blocks * QUADS, all->scales + row * blocks,
                   all->sums + row * blocks};
}

/* Rows are taken by eights, then by four, two, one. */
INLINE int batch_rows(long left) { return left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* The 32 inputs of one block; the short last block and act-order are gathered first. */
INLINE const float *block_inputs(const Matrix *m, const float *x, long block, float *gathered) {
    const long start = block * BLOCK, count = min_l(BLOCK, m->rows - start);
    if (!m->perm && count == BLOCK) return x + start;
    for (long k = 0; k < BLOCK; k++) {
        const long source = k >= count ? m->inputs : m->perm ? m->perm[start + k] : start + k;
        gathered[k] = source < m->inputs ? x[source] : 0.0f;
    }
    return gathered;
}

INLINE i8x32 order_for(i8x32 bytes, int bits) {
    if (bits == 8) return bytes;
#define EVEN_ODD(o) o, o + 2, o + 4, o + 6, o + 1, o + 3, o + 5, o + 7
#if defined(__clang__)
    return __builtin_shufflevector(bytes, bytes, EVEN_ODD(0), EVEN_ODD(8), EVEN_ODD(16),
                                   EVEN_ODD(24));
#else
    return __builtin_shuffle(
        bytes, (i8x32){EVEN_ODD(0), EVEN_ODD(8), EVEN_ODD(16), EVEN_ODD(24)});
#endif
}

/* One block of one row: a NaN or Inf anywhere makes the scale NaN, and so the whole output row. */
INLINE void quantise_block(const float *x, int bits, int zero, int32_t *quads, float *scale,
                           int32_t *sum, int stride) {
    const f32x16 low = load_f32(x), high = load_f32(x + LANES);
    const i32x16 magnitude = max_i((i32x16)low & 0x7fffffff, (i32x16)high & 0x7fffffff);
    const int32_t largest_bits = max_lanes_i(magnitude); /* as integers: finite < Inf < NaN */
    float largest;
    memcpy(&largest, &largest_bits, sizeof largest);
    const int tiny = largest < 1e-30f; /* 127 / largest would overflow; such a block is 0 */
    const f32x16 inverse = splat(tiny ? 0.0f : 127.0f / largest), magic = splat(12582912.0f);
    const i32x16 a = (i32x16)(low * inverse + magic) - 0x4b400000;
    const i32x16 b = (i32x16)(high * inverse + magic) - 0x4b400000;
    const i8x16 parts[2] = {__builtin_convertvector(a, i8x16), __builtin_convertvector(b, i8x16)};
    i8x32 bytes;
    memcpy(&bytes, parts, sizeof bytes);
    bytes = order_for(bytes, bits);
    int32_t words[QUADS];
    memcpy(words, &bytes, sizeof words);
    for (int i = 0; i < QUADS; i++) quads[i * stride] = words[i];
    *scale = largest_bits >= 0x7f800000 ? __builtin_nanf("") : tiny ? 0.0f : largest / 127.0f;
    *sum = -zero * sum_lanes_i(a + b);
}

static void quantise_rows(const Matrix *m, const float *x, Batch batch, int n) {
    const long blocks = block_count(m);
    const int zero = m->zeros ? 1 : 1 << (m->bits - 1);
    float gathered[BLOCK];
    for (int r = 0; r < n; r++)
        for (long b = 0; b < blocks; b++)
            quantise_block(block_inputs(m, x + r * m->inputs, b, gathered), m->bits, zero,
                           batch.quads + b * QUADS * n + r, batch.scales + b * n + r,
                           batch.sums + b * n + r, n);
}

/* The integer sums of one block: sixteen outputs by n rows. */
INLINE void block_product(const int32_t *words, const int32_t *quads, i32x16 *sums, int bits,
                          int n) {
    const i32x16 nibble = splat_i(0x0f0f0f0f);
    for (int w = 0; w < BLOCK * bits / 32; w++) {
        const i32x16 codes = load_i32(words + w * LANES);
        if (bits == 8) {
            for (int r = 0; r < n; r++) sums[r] = dot4(sums[r], codes, quads[w * n + r], 8);
            continue;
        }
        const i32x16 even = codes & nibble, odd = (codes >> 4) & nibble;
        for (int r = 0; r < n; r++) sums[r] = dot4(sums[r], even, quads[2 * w * n + r], 4);
        for (int r = 0; r < n; r++) sums[r] = dot4(sums[r], odd, quads[(2 * w + 1) * n + r], 4);
    }
}

/* Sixteen outputs of n rows. `bits` and `n` are constants wherever this is inlined. */
INLINE void tile_product(const Matrix *m, long tile, Batch x, float *out, int bits, int n) {
    const long blocks = block_count(m), words_per_block = BLOCK * bits / 32 * LANES;
    const int32_t *words = m->words + tile * blocks * words_per_block;
    const long first = tile * LANES, count = min_l(LANES, m->outputs - first);
    f32x16 total[MAX_ROWS], part[MAX_ROWS];
    i32x16 sums[MAX_ROWS], zeros = {0};
    for (int r = 0; r < n; r++) total[r] = splat(0.0f);
    for (long g = 0, b = 0; g < m->groups; g++) {
        const long at = (tile * m->groups + g) * LANES, end = min_l(b + m->blocks_per_group, blocks);
        if (m->zeros) {
            u8x16 z;
            memcpy(&z, m->zeros + at, sizeof z);
            zeros = __builtin_convertvector(z, i32x16);
        }
        for (int r = 0; r < n; r++) part[r] = splat(0.0f);
        for (; b < end; b++, words += words_per_block) {
            for (int r = 0; r < n; r++) {
                const i32x16 sum = splat_i(x.sums[b * n + r]);
                sums[r] = m->zeros ? sum * zeros : sum;
            }
            block_product(words, x.quads + b * QUADS * n, sums, bits, n);
            for (int r = 0; r < n; r++) part[r] += to_f32(sums[r]) * splat(x.scales[b * n + r]);
        }
        const f32x16 scale = load_kind(m->scales, at, m->scale_kind);
        for (int r = 0; r < n; r++) total[r] += part[r] * scale;
    }
    for (int r = 0; r < n; r++) {
        float *y = out + r * m->outputs;
        if (m->bias) total[r] += load_tail(m->bias, first, count, KIND_F32);
        if (count == LANES) store_f32(y + first, total[r]);
        else store_tail(y, first, total[r], count, KIND_F32);
    }
}

#define TILE_FUNCTION(bits, n)                                                              \
    static void tile_##bits##_##n(const Matrix *m, long tile, Batch x, float *out) {        \
        tile_product(m, tile, x, out, bits, n);                                             \
    }
TILE_FUNCTION(4, 1)
TILE_FUNCTION(4, 2)
TILE_FUNCTION(4, 4)
TILE_FUNCTION(4, 8)
TILE_FUNCTION(8, 1)
TILE_FUNCTION(8, 2)
TILE_FUNCTION(8, 4)
TILE_FUNCTION(8, 8)

typedef void TileFunction(const Matrix *, long, Batch, float *);

static TileFunction *tile_function(int bits, int n) {
    static TileFunction *const four[] = {tile_4_1, tile_4_2, tile_4_4, tile_4_8};
    static TileFunction *const eight[] = {tile_8_1, tile_8_2, tile_8_4, tile_8_8};
    return (bits == 4 ? four : eight)[n == 8 ? 3 : n == 4 ? 2 : n == 2 ? 1 : 0];
}

/* Tiles [tile, tile_end) of rows [row, row_end). */
static void panel_product(const Matrix *m, long tile, long tile_end, const Batch *all, long row,
                          long row_end, float *out) {
    for (; tile < tile_end; tile++)
        for (long r = row; r < row_end;) {
            const int n = batch_rows(row_end - r);
            const Batch x = batch_at(all, r, block_count(m));
            tile_function(m->bits, n)(m, tile, x, out + r * m->outputs);
            r += n;
        }
}

/* x (count, inputs) -> out (count, outputs), both contiguous. 0, or -1 when memory ran out. */
int nybble_quant_linear(const Matrix *m, const float *x, long count, float *out, int threads) {
    const long blocks = block_count(m), tiles = (m->outputs + LANES - 1) / LANES;
    const long cells = count * blocks;
    int32_t *memory = aligned_alloc(64, (size_t)(cells * (QUADS + 2) * 4 + 63) / 64 * 64);
    if (!memory) return -1;
    const Batch all = {memory, (float *)(memory + cells * QUADS), memory + cells * (QUADS + 1)};
    const long batches = (count + MAX_ROWS - 1) / MAX_ROWS;
    const long panels = (count + ROW_PANEL - 1) / ROW_PANEL;
    /* One row panel (decode): each thread reads one run of the weights. More: small items. */
    const long step = panels == 1 ? (tiles + threads - 1) / threads : 8;
    const long steps = (tiles + step - 1) / step;

#define QUANTISE_BATCH(i)                                                                   \
    for (long r = (i) * MAX_ROWS, end = min_l(r + MAX_ROWS, count), n; r < end; r += n) {   \
        n = batch_rows(end - r);                                                            \
        quantise_rows(m, x + r * m->inputs, batch_at(&all, r, blocks), (int)n);             \
    }
    if (batches == 1) QUANTISE_BATCH(0L)
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (batches > 1) {
#pragma omp for schedule(static)
            for (long i = 0; i < batches; i++) QUANTISE_BATCH(i)
        }
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < panels * steps; i++) {
            const long row = i / steps * ROW_PANEL, tile = i % steps * step;
            panel_product(m, tile, min_l(tile + step, tiles), &all, row,
                          min_l(row + ROW_PANEL, count), out);
        }
    }
    free(memory);
    return 0;
}

/* What this object was compiled for, for people to read. */
const char *nybble_isa(void) {
#ifdef _OPENMP
#define THREADS ", OpenMP"
#else
#define THREADS ", one thread"
#endif
#if defined(NYBBLE_X86) && defined(__AVX512VNNI__)
    return "AVX-512 VNNI" THREADS;
#elif defined(NYBBLE_X86) && defined(__AVX2__) && defined(__AVXVNNI__)
    return "AVX-VNNI" THREADS;
#elif defined(NYBBLE_X86) && defined(__AVX2__)
    return "AVX2" THREADS;
#else
    return "portable C" THREADS;
#endif
}
