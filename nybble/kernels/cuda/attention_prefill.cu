// Causal attention of many new tokens of a sequence over its paged keys and values: bound by the
// tensor cores. Dao 2023, "FlashAttention-2".
//
// A block takes 128 queries of one head, 32 a warp; tiles of TILE keys (64, or 32 where shared memory
// is short) pass through shared memory, where a 16-bit cache's next one arrives while one is multiplied. Codes arrive in a buffer of
// their own and are widened to fp16. Scores, probabilities and sums never leave the registers.
//
// Lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8 of a 16-row tile, columns 2 t, 2 t + 1.
#include "partial.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kQueries = 128;                    // of a block
constexpr int kRowTiles = kQueries / kWarps / 16;  // of a warp
constexpr int kKeys = TILE;                      // of a tile
constexpr int kKeyTiles = kKeys / 8;             // columns of scores, 8 a product
constexpr int kDimTiles = HEAD_DIM / 8;          // columns of the output
constexpr int kStride = HEAD_DIM * 2 + 16;       // of a row in shared memory: no bank conflicts

// Shared memory: queries, then (keys, values) once for codes and twice otherwise, then the codes.
constexpr int kQueryBytes = kQueries * kStride;
constexpr int kTileBytes = kKeys * kStride;      // of keys, and of values
constexpr int kBuffers = kCodes ? 1 : 2;
constexpr int kCodesAt = kQueryBytes + kBuffers * 2 * kTileBytes;
constexpr int kScalesAt = 2 * kKeys * kRowBytes;  // behind the codes: of keys, then of values
constexpr int kScaleCopies = kCodes ? kKeys * kScaleBytes / 16 : 1;  // of 16 bytes, of either

struct Args {
    Cache cache;
    const u16* q;  // (tokens, heads, HEAD_DIM)
    u16* out;      // likewise
    int heads, query_tiles;
    float scale;   // times log2(e)
#if PARTIAL
    float* lse;  // (tokens, heads): ln of the sums that the outputs were divided by
#endif
};

struct Work {
    int head, kv_head, sequence;
    int first_row;    // of this block's queries among the new tokens of the sequence
    int rows, start;  // of the sequence: new tokens, row of the first one in q
    int length, visible;  // keys in all, and those that any of these queries sees

    // The blocks of a head follow one another and share its keys in the L2 cache; the longest first.
    __device__ __forceinline__ explicit Work(const Args& a) {
        const int tile = a.query_tiles - 1 - blockIdx.x % a.query_tiles;
        head = blockIdx.x / a.query_tiles % a.heads;
        sequence = blockIdx.x / a.query_tiles / a.heads;
        kv_head = head / (a.heads / a.cache.kv_heads);
        first_row = tile * kQueries;
        start = a.cache.starts[sequence];
        rows = a.cache.starts[sequence + 1] - start;
        length = a.cache.lengths[sequence];
        visible = last_key(length - rows + min(rows, first_row + kQueries) - 1) + 1;
    }

    // Of a row among the new tokens of the sequence.
    __device__ __forceinline__ int position(int row) const { return length - rows + row; }
};

__device__ __forceinline__ void load_queries(const Args& a, const Work& w, u32 to, u8* memory) {
    constexpr int kChunks = HEAD_DIM / 8;
    for (int i = threadIdx.x; i < kQueries * kChunks; i += kThreads) {
        const int row = w.first_row + i / kChunks, chunk = i % kChunks;
        const bool valid = row < w.rows;
        const size_t token = w.start + (valid ? row : 0);
        const u16* from = a.q + (token * a.heads + w.head) * HEAD_DIM + chunk * 8;
        const int at = i / kChunks * kStride + chunk * 16;
        if constexpr (kSameFormat) {
            copy_async(to + at, from, valid);
        } else {
            const Eight e = load_eight(from);
            *reinterpret_cast<uint4*>(memory + at) = {
                operand_pair(e.x[0], e.x[1]), operand_pair(e.x[2], e.x[3]),
                operand_pair(e.x[4], e.x[5]), operand_pair(e.x[6], e.x[7])};
        }
    }
}

// A tile of keys and of values as it stands in the cache; zeros beyond the sequence.
__device__ __forceinline__ void load_tile(const Args& a, const Work& w, int tile, u32 to) {
    constexpr int kChunks = kRowBytes / 16, kSpread = kCodes ? kRowBytes : kStride;
#pragma unroll
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
        const int slot = i / kChunks, chunk = i % kChunks * 16, position = tile * kKeys + slot;
        const bool valid = position < w.length;
        const long row = row_of(a.cache, w.sequence, w.kv_head, valid ? position : 0);
        const u32 at = to + slot * kSpread + chunk;
        copy_async(at, a.cache.keys + row * kRowBytes + chunk, valid);
        copy_async(at + kKeys * kSpread, a.cache.values + row * kRowBytes + chunk, valid);
    }
    if constexpr (kCodes) {
        for (int i = threadIdx.x; i < 2 * kScaleCopies; i += kThreads) {
            const int position = tile * kKeys + i % kScaleCopies * (kKeys / kScaleCopies);
            const bool valid = position < w.length;
            const long row = row_of(a.cache, w.sequence, w.kv_head, valid ? position : 0);
            const u8* scales = i < kScaleCopies ? a.cache.key_scales : a.cache.value_scales;
            copy_async(to + kScalesAt + i * 16, scales + row * kScaleBytes, valid);
        }
    }
}

// ---- codes to a tile of halves ---------------------------------------------------------------------

// valid: keys of the tile that belong to the sequence; the others' scales may be NaN.
__device__ __forceinline__ void widen_tile(const u8* codes, u8* to, int valid) {
    constexpr int kPieces = HEAD_DIM / 8, kRows = kThreads / kPieces;  // kRows at a time
    const int piece = threadIdx.x % kPieces, first = threadIdx.x / kPieces;
    const u8* from = codes + first * kRowBytes;
    const u8* scales = codes + kScalesAt + first * kScaleBytes + (KV == 4 ? piece / 8 * 4 : 0);
    to += first * kStride + piece * 16;
#pragma unroll
    for (int is_value = 0; is_value < 2; ++is_value)
#pragma unroll 4
        for (int row = 0; row < kKeys; row += kRows) {
            const int at = is_value * kKeys + row;
            const uint4 halves = widen(from + at * kRowBytes, piece, scales + at * kScaleBytes);
            *reinterpret_cast<uint4*>(to + is_value * kTileBytes + row * kStride) =
                first + row < valid ? halves : uint4{0u, 0u, 0u, 0u};
        }
}

// ---- a warp's 32 queries -------------------------------------------------------------------------

struct Sums {
    float o[kRowTiles][kDimTiles][4];
    float most[kRowTiles][2], weight[kRowTiles][2];  // of rows g, g + 8; the weight a lane's share
};

typedef float Scores[kRowTiles][kKeyTiles][4];

// S = Q K^T
__device__ __forceinline__ void multiply_keys(Scores& c, u32 queries, u32 keys, int lane) {
    const u32 query_row = queries + lane % 16 * kStride + lane / 16 * 16;
    const u32 key_row = keys + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 16;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        Fragment q[kRowTiles];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) q[r] = load_matrices(query_row + 16 * r * kStride + 32 * s);
#pragma unroll
        for (int j = 0; j < kKeyTiles; j += 2) {
            const Fragment k = load_matrices(key_row + 8 * j * kStride + 32 * s);
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
                multiply(c[r][j], q[r], k.reg[0], k.reg[1]);
                multiply(c[r][j + 1], q[r], k.reg[2], k.reg[3]);
            }
        }
    }
}

// O += P V
__device__ __forceinline__ void add_values(Sums& sums, const Scores& p, u32 values, int lane) {
    const u32 row = values + lane % 16 * kStride + lane / 16 * 16;
#pragma unroll
    for (int s = 0; s < kKeys / 16; ++s) {
        Fragment f[kRowTiles];
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float* pair = &p[r][2 * s + e / 2][e % 2 * 2];
                f[r].reg[e] = operand_pair(pair[0], pair[1]);
            }
#pragma unroll
        for (int j = 0; j < kDimTiles; j += 2) {
            const Fragment v = load_transposed(row + 16 * s * kStride + 16 * j);
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) {
                multiply(sums.o[r][j], f[r], v.reg[0], v.reg[1]);
                multiply(sums.o[r][j + 1], f[r], v.reg[2], v.reg[3]);
            }
        }
    }
}

// Hides the keys after those that each query sees; position: of the warp's first row.
__device__ __forceinline__ void mask(Scores& c, int first_key, int position, int lane) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = 16 * r + lane / 4 + e / 2 * 8;
                const int key = first_key + 8 * j + lane % 4 * 2 + e % 2;
                if (key > last_key(position + row)) c[r][j][e] = -infinity();
            }
}

// A maximum that is exceeded by a factor of at most 2^8 may stay: that costs no precision, and
// spares the lanes from agreeing on a new one for nearly every tile. Scores here are unscaled.
constexpr float kSlack = 8.f;

__device__ __forceinline__ void raise_maximum(Sums& sums, const Scores& c, float scale) {
    float high[kRowTiles][2];
    bool exceeded = false;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            high[r][h] = -infinity();
#pragma unroll
            for (int j = 0; j < kKeyTiles; ++j)
                high[r][h] = fmaxf(high[r][h], fmaxf(c[r][j][2 * h], c[r][j][2 * h + 1]));
            high[r][h] *= scale;
            exceeded |= high[r][h] > sums.most[r][h] + kSlack;
        }
    if (!__any_sync(~0u, exceeded)) return;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float& most = sums.most[r][h];
            float next = fmaxf(high[r][h], __shfl_xor_sync(~0u, high[r][h], 1));
            next = fmaxf(most, fmaxf(next, __shfl_xor_sync(~0u, next, 2)));
            const float factor = most == next ? 1.f : power_of_two(most - next);
            most = next;
            sums.weight[r][h] *= factor;
#pragma unroll
            for (int j = 0; j < kDimTiles; ++j)
                sums.o[r][j][2 * h] *= factor, sums.o[r][j][2 * h + 1] *= factor;
        }
}

__device__ __forceinline__ void add_tile(Sums& sums, u32 queries, u32 keys, u32 values,
                                         int first_key, int position, int lane, float scale) {
    Scores c = {};
    multiply_keys(c, queries, keys, lane);
    if (first_key + kKeys - 1 > last_key(position)) mask(c, first_key, position, lane);
    raise_maximum(sums, c, scale);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                c[r][j][e] = power_of_two(c[r][j][e] * scale - sums.most[r][e / 2]);
                sums.weight[r][e / 2] += c[r][j][e];
            }
    add_values(sums, c, values, lane);
}

__device__ __forceinline__ void write_out(const Args& a, const Work& w, Sums& sums, int warp,
                                          int lane) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float weight = sums.weight[r][h];
            weight += __shfl_xor_sync(~0u, weight, 1);
            weight += __shfl_xor_sync(~0u, weight, 2);
            const int row = w.first_row + (warp * kRowTiles + r) * 16 + lane / 4 + 8 * h;
            if (row >= w.rows) continue;
            const bool blind = CLOSED && last_key(w.position(row)) < 0;
            const float factor = 1.f / weight;
            const size_t at = size_t(w.start + row) * a.heads + w.head;
            u16* to = a.out + at * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kDimTiles; ++j)
                *reinterpret_cast<u32*>(to + 8 * j) =
                    blind ? 0u : activation_pair(sums.o[r][j][2 * h] * factor,
                                                 sums.o[r][j][2 * h + 1] * factor);
#if PARTIAL
            if (lane % 4 == 0)
                a.lse[at] = blind ? -infinity() : natural_log(sums.most[r][h], weight);
#endif
        }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
attention_prefill(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    let_next_kernel_start();
    wait_for_previous_kernel();
    const Work w(a);
    if (w.first_row >= w.rows || w.rows == 1) return;  // single tokens: attention_decode.cu
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    Sums sums = {};
    if (CLOSED && w.visible == 0) return write_out(a, w, sums, warp, lane);
    const u32 base = shared_address(memory);
    load_queries(a, w, base, memory);
    load_tile(a, w, 0, base + (kCodes ? kCodesAt : kQueryBytes));
    commit_copies();

#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) sums.most[r][0] = sums.most[r][1] = least_maximum();
    const int position = w.position(w.first_row + warp * (kRowTiles * 16));
    const int tiles = (w.visible + kKeys - 1) / kKeys;
    for (int tile = 0; tile < tiles; ++tile) {
        const int buffer = kCodes ? 0 : tile % 2;
        wait_for_copies<0>();
        __syncthreads();
        if constexpr (kCodes) {
            widen_tile(memory + kCodesAt, memory + kQueryBytes, w.length - tile * kKeys);
            __syncthreads();
        }
        const u32 next = kCodes ? kCodesAt : kQueryBytes + (1 - buffer) * 2 * kTileBytes;
        if (tile + 1 < tiles) load_tile(a, w, tile + 1, base + next);
        commit_copies();
        // Nothing that this warp sees?
        if (tile * kKeys > last_key(position + kRowTiles * 16 - 1)) continue;
        const u32 keys = base + kQueryBytes + buffer * 2 * kTileBytes;
        add_tile(sums, base + warp * (kRowTiles * 16) * kStride, keys, keys + kTileBytes,
                 tile * kKeys, position, lane, a.scale);
    }
    write_out(a, w, sums, warp, lane);
}
