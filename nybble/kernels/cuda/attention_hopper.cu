// attention_prefill.cu for compute capability 9.0: the same work by `wgmma`, in blocks of three
// warpgroups. One brings tiles of 64 keys and values to shared memory, widening codes on the way;
// two multiply, 64 queries each, and run free of one another, so that the tensor cores work for one
// while the other takes exponentials. Within a warpgroup, too, the scores of a tile are multiplied
// ahead of the weighted values of the one before. Shah et al. 2024, "FlashAttention-3".
//
// Tiles lie in blocks of 64 rows of 64 dimensions (128 bytes) with their 16-byte chunks exchanged
// (chunk ^ row % 8), as `wgmma` reads them. PTX ISA, "Matrix descriptor".
#include "arranged.cuh"
#include "partial.cuh"

// With 64 dimensions ptxas 13.0 gives the queries and the probabilities the same registers, though
// the queries are needed again for the next tile: seen in the SASS, and in wrong results.
static_assert(HEAD_DIM == 128, "heads of 64 dimensions take attention_prefill.cu");

constexpr int kGroupThreads = 128;               // of a warpgroup
constexpr int kConsumers = 2;
constexpr int kThreads = kGroupThreads * (1 + kConsumers);
constexpr int kQueries = 64 * kConsumers;        // of a block
constexpr int kKeys = 64;                        // of a tile
constexpr int kStages = kCodes ? 3 : 4;
constexpr int kBlockBytes = kKeys * 128;         // 64 rows, 64 dimensions
constexpr int kTileBytes = kBlockBytes * (HEAD_DIM / 64);  // of keys, and of values
constexpr int kCodesAt = kStages * 2 * kTileBytes;
constexpr int kScalesAt = 2 * kKeys * kRowBytes;  // behind the codes: of keys, then of values
constexpr int kScaleCopies = kCodes ? kKeys * kScaleBytes / 16 : 1;  // of 16 bytes, of either
constexpr int kCodeBytes = kCodes ? kScalesAt + 2 * kKeys * kScaleBytes : 0;  // of one of two

struct Args {
    Cache cache;
    const u16* q;  // (tokens, heads, HEAD_DIM)
    u16* out;      // likewise, or as arranged.cuh has it
    int heads, query_tiles;
    float scale;   // times log2(e)
    int out_rows;  // of an `out` that is arranged, or 0
#if PARTIAL
    float* lse;  // (tokens, heads): ln of the sums that the outputs were divided by
#endif
};

struct Work {
    int head, kv_head, sequence;
    int first_row;    // of this block's queries among the new tokens of the sequence
    int rows, start;  // of the sequence: new tokens, row of the first one in q
    int length, tiles;  // keys in all; tiles that any of these queries sees

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
        const int visible = last_key(length - rows + min(rows, first_row + kQueries) - 1) + 1;
        tiles = (visible + kKeys - 1) / kKeys;
    }

    // Of a row among the new tokens of the sequence.
    __device__ __forceinline__ int position(int row) const { return length - rows + row; }
};

// ---- barriers ------------------------------------------------------------------------------------

__device__ __forceinline__ void start_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 ::"r"(barrier) : "memory");
}
// Until the phase of this parity has ended.
__device__ __forceinline__ void wait_for(u32 barrier, int parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ __forceinline__ void synchronize_producers() {
    asm volatile("bar.sync 1, 128;" ::: "memory");
}
// What ordinary stores and copies wrote becomes visible to wgmma.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

struct Barriers {
    u32 base;
    __device__ __forceinline__ u32 full(int stage) const { return base + 8 * stage; }
    __device__ __forceinline__ u32 empty(int stage) const { return base + 8 * (kStages + stage); }
};

// ---- the producer --------------------------------------------------------------------------------

__device__ __forceinline__ u32 place_of(int row, int chunk) {  // chunk: of 8 dimensions
    return chunk / 8 * kBlockBytes + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

// Where chunk i of a tile lies in the cache; the rows of a tile follow one another inside a page.
__device__ __forceinline__ long chunk_at(const Args& a, const Work& w, int tile, long first, int i) {
    constexpr int kChunks = kRowBytes / 16;
    if constexpr (PAGE % kKeys == 0) return first * kRowBytes + i * 16;
    const int position = min(tile * kKeys + i / kChunks, w.length - 1);
    return row_of(a.cache, w.sequence, w.kv_head, position) * kRowBytes + i % kChunks * 16;
}

__device__ __forceinline__ void copy_tile(const Args& a, const Work& w, int tile, u32 to, int thread) {
    constexpr int kChunks = kRowBytes / 16;
    const long first = row_of(a.cache, w.sequence, w.kv_head, tile * kKeys);
    const int valid = w.length - tile * kKeys;  // keys; the others become zeros
#pragma unroll
    for (int j = 0; j < kKeys * kChunks / kGroupThreads; ++j) {
        const int i = thread + j * kGroupThreads;
        const long from = chunk_at(a, w, tile, first, i);
        const u32 at = to + (kCodes ? i * 16 : place_of(i / kChunks, i % kChunks));
        copy_async(at, a.cache.keys + from, i / kChunks < valid);
        copy_async(at + (kCodes ? kKeys * kRowBytes : kTileBytes), a.cache.values + from,
                   i / kChunks < valid);
    }
    if constexpr (kCodes) {
        for (int i = thread; i < 2 * kScaleCopies; i += kGroupThreads) {
            const int position = tile * kKeys + i % kScaleCopies * (kKeys / kScaleCopies);
            const bool some = position < w.length;
            const long row = row_of(a.cache, w.sequence, w.kv_head, some ? position : 0);
            const u8* scales = i < kScaleCopies ? a.cache.key_scales : a.cache.value_scales;
            copy_async(to + kScalesAt + i * 16, scales + row * kScaleBytes, some);
        }
    }
}

// valid: keys of the tile that belong to the sequence; the others' scales may be NaN.
__device__ __forceinline__ void widen_tile(const u8* codes, u8* to, int valid, int thread) {
    constexpr int kPieces = HEAD_DIM / 8, kRows = kGroupThreads / kPieces;  // kRows at a time
    const int piece = thread % kPieces, first = thread / kPieces;
    const u8* from = codes + first * kRowBytes;
    const u8* scales = codes + kScalesAt + first * kScaleBytes + (KV == 4 ? piece / 8 * 4 : 0);
#pragma unroll
    for (int is_value = 0; is_value < 2; ++is_value)
#pragma unroll 4
        for (int row = 0; row < kKeys; row += kRows) {
            const int at = is_value * kKeys + row;
            const uint4 halves = widen(from + at * kRowBytes, piece, scales + at * kScaleBytes);
            *reinterpret_cast<uint4*>(to + is_value * kTileBytes + place_of(first + row, piece)) =
                first + row < valid ? halves : uint4{0u, 0u, 0u, 0u};
        }
}

__device__ __forceinline__ void produce(const Args& a, const Work& w, u8* memory, Barriers barriers) {
    const int thread = threadIdx.x;
    const u32 base = shared_address(memory);
    if (CLOSED && w.tiles == 0) return;
    if constexpr (kCodes) copy_tile(a, w, 0, base + kCodesAt, thread);
    commit_copies();
    for (int tile = 0; tile < w.tiles; ++tile) {
        const int stage = tile % kStages, use = tile / kStages;
        if constexpr (kCodes) {
            synchronize_producers();  // the codes before last are widened
            const int next = kCodesAt + (tile + 1) % 2 * kCodeBytes;
            if (tile + 1 < w.tiles) copy_tile(a, w, tile + 1, base + next, thread);
            commit_copies();
            wait_for_copies<1>();
            synchronize_producers();  // everyone's copies of this tile are there
            if (use) wait_for(barriers.empty(stage), (use - 1) % 2);
            widen_tile(memory + kCodesAt + tile % 2 * kCodeBytes, memory + stage * 2 * kTileBytes,
                       w.length - tile * kKeys, thread);
            publish_shared();
            arrive(barriers.full(stage));
        } else {
            if (use) wait_for(barriers.empty(stage), (use - 1) % 2);
            copy_tile(a, w, tile, base + stage * 2 * kTileBytes, thread);
            commit_copies();
            wait_for_copies<1>();
            publish_shared();
            if (tile) arrive(barriers.full((tile - 1) % kStages));
        }
    }
    if constexpr (!kCodes) {
        wait_for_copies<0>();
        publish_shared();
        arrive(barriers.full((w.tiles - 1) % kStages));
    }
}

// ---- wgmma ---------------------------------------------------------------------------------------

typedef unsigned long long u64;

// leading, stride: bytes between blocks of 64 columns, and between groups of 8 rows.
__device__ __forceinline__ u64 descriptor(u32 address, u32 leading, u32 stride) {
    const u64 swizzle128 = 1;
    return u64((address & 0x3ffff) >> 4) | u64(leading >> 4) << 16 | u64(stride >> 4) << 32 |
           swizzle128 << 62;
}
__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `pending` of the committed groups run.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Registers move from the warpgroup that copies to those that hold sums.
template <int count>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

#if KV == 17
#define NYBBLE_TYPES ".f32.bf16.bf16 "
#else
#define NYBBLE_TYPES ".f32.f16.f16 "
#endif
#define NYBBLE_8(d, i)                                                                     \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),             \
        "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define NYBBLE_32(d, i) NYBBLE_8(d, i), NYBBLE_8(d, i + 8), NYBBLE_8(d, i + 16), NYBBLE_8(d, i + 24)
#define NYBBLE_NAMES_32                                                                    \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
    "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NYBBLE_NAMES_64                                                                    \
    NYBBLE_NAMES_32                                                                        \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
    "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64 x 64) += a (64 x 16) b (16 x 64); transposed: b's columns, not its rows, lie in a row.
template <int transposed>
__device__ __forceinline__ void multiply_async(float (&d)[32], const Fragment& a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" NYBBLE_TYPES "{" NYBBLE_NAMES_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
                 : NYBBLE_32(d, 0)
                 : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b),
                   "n"(transposed));
}
// The same for 128 columns.
template <int transposed>
__device__ __forceinline__ void multiply_async(float (&d)[64], const Fragment& a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" NYBBLE_TYPES "{" NYBBLE_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
                 : NYBBLE_32(d, 0), NYBBLE_32(d, 32)
                 : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b),
                   "n"(transposed));
}

// ---- a consumer's 64 queries: lane (g, t) of a warp holds rows g and g + 8 of its 16 --------------

struct Sums {
    float o[HEAD_DIM / 2];        // columns 8 j + 2 t, + 1 of row g, then of row g + 8, for each j
    float most[2], weight[2];     // of rows g, g + 8; the weight a lane's share
};

// Row g + 8 * half of the warp; rows beyond the sequence repeat its last one and are not written.
__device__ __forceinline__ u32 query_pair(const Args& a, const Work& w, int row, int dim) {
    const size_t token = w.start + min(row, w.rows - 1);
    const u32 pair =
        *reinterpret_cast<const u32*>(a.q + (token * a.heads + w.head) * HEAD_DIM + dim);
    if (kSameFormat) return pair;
    return operand_pair(activation(u16(pair)), activation(u16(pair >> 16)));
}

// c: scores, unscaled. A maximum that is exceeded by a factor of at most 2^8 may stay: that costs no
// precision, and spares the lanes from agreeing on a new one for nearly every tile.
constexpr float kSlack = 8.f;

__device__ __forceinline__ void raise_maximum(Sums& sums, const float (&c)[kKeys / 2], float scale) {
    float high[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) high[i / 2 % 2] = fmaxf(high[i / 2 % 2], c[i]);
    high[0] *= scale, high[1] *= scale;
    const bool exceeded = high[0] > sums.most[0] + kSlack || high[1] > sums.most[1] + kSlack;
    if (!__any_sync(~0u, exceeded)) return;
    wgmma_wait<0>();  // the sums are about to change
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float next = fmaxf(high[h], __shfl_xor_sync(~0u, high[h], 1));
        next = fmaxf(sums.most[h], fmaxf(next, __shfl_xor_sync(~0u, next, 2)));
        factor[h] = sums.most[h] == next ? 1.f : power_of_two(sums.most[h] - next);
        sums.most[h] = next;
        sums.weight[h] *= factor[h];
    }
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) sums.o[i] *= factor[i / 2 % 2];
}

// The scores of a tile, unscaled; they are on their way when this returns.
__device__ __forceinline__ void multiply_keys(float (&c)[kKeys / 2], const Fragment (&q)[kSteps],
                                              u32 keys) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) c[i] = 0.f;
    wgmma_begin();
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
        multiply_async<0>(c, q[s], descriptor(keys + s / 4 * kBlockBytes + s % 4 * 32, 16, 1024));
    wgmma_commit();
}

__device__ __forceinline__ void multiply_values(Sums& sums, const Fragment (&p)[kKeys / 16],
                                                u32 values) {
    wgmma_begin();
#pragma unroll
    for (int s = 0; s < kKeys / 16; ++s)
        multiply_async<1>(sums.o, p[s], descriptor(values + s * 2048, kBlockBytes, 1024));
    wgmma_commit();
}

// position: of row g of the warp.
__device__ __forceinline__ void hide_later_keys(float (&c)[kKeys / 2], int first_key, int position,
                                                int lane) {
    if (first_key + kKeys - 1 <= last_key(position)) return;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
        const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key > last_key(position + i / 2 % 2 * 8)) c[i] = -infinity();
    }
}

// Scores to weights; those of the rows grow by them.
__device__ __forceinline__ void take_exponentials(Sums& sums, float (&c)[kKeys / 2], float scale) {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) {
        c[i] = power_of_two(c[i] * scale - sums.most[i / 2 % 2]);
        sums.weight[i / 2 % 2] += c[i];
    }
}

// Row g + 8 * h of a warp times factor, of which lane t holds just the t-th chunk of each 32 columns.
__device__ __forceinline__ void write_arranged(const Args& a, const Work& w, const Sums& sums, int row,
                                               int h, float factor) {
    constexpr int kHalves = HEAD_DIM / 32;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
        u32 word[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const float* o = sums.o + 4 * (4 * half + t) + 2 * h;
            word[t] = activation_pair(o[0] * factor, o[1] * factor);
        }
        *arranged_chunk(a.out, a.out_rows, w.start + row + 8 * h, w.head * kHalves + half,
                        threadIdx.x % 4) = make_uint4(word[0], word[1], word[2], word[3]);
    }
}

__device__ __forceinline__ void write_out(const Args& a, const Work& w, Sums& sums, int row, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float weight = sums.weight[h];
        weight += __shfl_xor_sync(~0u, weight, 1);
        weight += __shfl_xor_sync(~0u, weight, 2);
        if (row + 8 * h >= w.rows) continue;
        const bool blind = CLOSED && last_key(w.position(row + 8 * h)) < 0;
        const float factor = 1.f / weight;
        if (!PARTIAL && a.out_rows) {
            write_arranged(a, w, sums, row, h, factor);
            continue;
        }
        const size_t at = size_t(w.start + row + 8 * h) * a.heads + w.head;
        u16* to = a.out + at * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; ++j)
            *reinterpret_cast<u32*>(to + 8 * j + lane % 4 * 2) =
                blind ? 0u : activation_pair(sums.o[4 * j + 2 * h] * factor,
                                             sums.o[4 * j + 2 * h + 1] * factor);
#if PARTIAL
        if (lane % 4 == 0) a.lse[at] = blind ? -infinity() : natural_log(sums.most[h], weight);
#endif
    }
}

__device__ __forceinline__ void consume(const Args& a, const Work& w, u8* memory, Barriers barriers) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes - kGroupThreads / kLanes;
    const int row = w.first_row + warp * 16 + lane / 4;
    Fragment q[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            q[s].reg[i] = query_pair(a, w, row + i % 2 * 8, 16 * s + i / 2 * 8 + lane % 4 * 2);
    Sums sums = {};
    sums.most[0] = sums.most[1] = least_maximum();
    if (CLOSED && w.tiles == 0) return write_out(a, w, sums, row, lane);
    float c[kKeys / 2];
    Fragment p[kKeys / 16];
    const u32 base = shared_address(memory);
    const int position = w.position(row);
    for (int tile = 0; tile < w.tiles; ++tile) {
        const int stage = tile % kStages, before = (tile + kStages - 1) % kStages;
        wait_for(barriers.full(stage), tile / kStages % 2);
        multiply_keys(c, q, base + stage * 2 * kTileBytes);
        if (tile) multiply_values(sums, p, base + before * 2 * kTileBytes + kTileBytes);
        if (tile) wgmma_wait<1>();
        else wgmma_wait<0>();
        hide_later_keys(c, tile * kKeys, position, lane);
        raise_maximum(sums, c, a.scale);
        take_exponentials(sums, c, a.scale);
        wgmma_wait<0>();  // the values of the tile before, whose weights make room
        if (tile && lane == 0) arrive(barriers.empty(before));
#pragma unroll
        for (int i = 0; i < kKeys / 4; ++i)
            p[i / 4].reg[i % 4] = operand_pair(c[2 * i], c[2 * i + 1]);
    }
    multiply_values(sums, p, base + (w.tiles - 1) % kStages * 2 * kTileBytes + kTileBytes);
    wgmma_wait<0>();
    write_out(a, w, sums, row, lane);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
attention_hopper(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) u8 memory[];
    __shared__ __align__(8) u64 barrier_memory[2 * kStages];
    const Barriers barriers = {shared_address(barrier_memory)};
    let_next_kernel_start();
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            start_barrier(barriers.full(s), kGroupThreads);
            start_barrier(barriers.empty(s), kConsumers * kGroupThreads / kLanes);
        }
        publish_shared();
    }
    __syncthreads();
    wait_for_previous_kernel();
    const Work w(a);
    if (w.first_row >= w.rows || w.rows == 1) return;  // single tokens: attention_decode.cu
    if (threadIdx.x < kGroupThreads) {
        give_registers<kCodes ? 72 : 40>();
        produce(a, w, memory, barriers);
    } else {
        take_registers<kCodes ? 216 : 232>();
        consume(a, w, memory, barriers);
    }
}
