// Attention of one new token a sequence over its paged keys and values: bound by their memory.
//
// A block takes one part of the keys of one sequence, and up to 8 query heads that share a
// key-value head; its warps take turns at tiles of TILE keys, each with copies of STAGES - 1 tiles
// under way. Keys (later values, transposed) are the A operand of mma.m16n8k16, heads are the 8
// columns: S^T (16 keys x 8 heads) = K q^T, O^T (16 dimensions x 8 heads) += V^T P^T. The block that
// finishes last of a sequence's parts adds them up. Dao 2023, "Flash-Decoding".
//
// Lane (g, t) = (lane / 4, lane % 4). Codes keep their own order: what matters is only that keys
// and queries agree, and that write_out() knows where an output belongs.
//
// Macros beside those of partial.cuh: TILE 16|32, STAGES, WARPS, MIN_BLOCKS.
#include "partial.cuh"

constexpr int kHeads = 8;                      // columns of a product
constexpr int kRowTiles = HEAD_DIM / 16;       // of the output
constexpr int kChunks = kRowBytes / 16;        // 16-byte copies of a row
// Rows are spread so that the lanes that read together meet 32 different banks.
constexpr int kValueStride = kRowBytes + (kRowBytes % 64 == 48 ? 0 : 16);
constexpr int kKeyStride = !kCodes                    ? kRowBytes + 16
                           : KV == 6                  ? 96
                           : KV == 8                  ? kRowBytes + (kRowBytes % 128 ? 0 : 64)
                           : kRowBytes % 64           ? kRowBytes
                                                      : kRowBytes + 32;
constexpr int kKeyScales = TILE * (kKeyStride + kValueStride);  // where they begin in a stage
constexpr int kStageBytes = kKeyScales + 2 * TILE * kScaleBytes;
constexpr int kThreads = WARPS * kLanes;

struct Args {
    Cache cache;
    const u16* q;   // (tokens, heads, HEAD_DIM)
    u16* out;       // likewise
    float* parts;   // (sequences, heads, splits, HEAD_DIM + 2): sums, then their maximum and weight
    u32* finished;  // zeros, one for each sequence and tile of heads; left as zeros
    int heads, head_tiles, splits;
    float scale;    // times log2(e)
#if PARTIAL
    float* lse;  // (tokens, heads): ln of the sums that the outputs were divided by
#endif
};

// Which part of the work a block does.
struct Work {
    int split, head_tile, kv_head, sequence, unit;
    int length;               // keys that the token sees
    int first, last;          // tiles of keys: first .. last - 1
    int head, heads;          // first query head, and how many
    int splits;               // of this sequence: parts that have any keys, or one without

    __device__ __forceinline__ explicit Work(const Args& a) {
        split = blockIdx.x % a.splits;
        unit = blockIdx.x / a.splits;
        head_tile = unit % a.head_tiles;
        kv_head = unit / a.head_tiles % a.cache.kv_heads;
        sequence = unit / a.head_tiles / a.cache.kv_heads;
        const int group = a.heads / a.cache.kv_heads;
        head = kv_head * group + head_tile * kHeads;
        heads = min(kHeads, group - head_tile * kHeads);
        length = last_key(a.cache.lengths[sequence] - 1) + 1;
        const int tiles = (length + TILE - 1) / TILE;
        const int share = (tiles + a.splits - 1) / a.splits;
        splits = share ? (tiles + share - 1) / share : CLOSED;
        first = split * share;
        last = min(first + share, tiles);
    }
};

// Queries as the B operand: of step s, lane (g, t) holds four dimensions of head g.
constexpr int kParts = KV == 4 ? kGroups : 1;  // of a row, with a scale of their own
struct Queries {
    u32 reg[kSteps][2];
    // Of heads 2 t and 2 t + 1 and each part: the sum, which the low ends of 4-bit keys are
    // multiplied with, and what the product with keys of 4 or 6 bits is too large by.
    float sum[kParts][2], excess[kParts][2];
};

// The place in memory of the dimensions that lane t multiplies in a step, in pairs.
__device__ __forceinline__ int dimension(int step, int t, int pair, int half) {
    if (KV == 8) return 64 * (step / 4) + 16 * t + 4 * (step % 4) + 2 * pair + half;
    // A masked word gives nibbles 0 and 4, the next 1 and 5, then 2 and 6, 3 and 7.
    if (KV == 4 || KV == 6)
        return 64 * (step / 4) + 16 * t + 8 * (step % 4 / 2) + 2 * (step % 2) + pair + 4 * half;
    return 16 * step + 8 * pair + 2 * t + half;
}

__device__ __forceinline__ float sum_of_lanes(float value) {  // with the same g
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

__device__ __forceinline__ Queries load_queries(const Args& a, const Work& w, int lane) {
    const int g = lane / 4, t = lane % 4;
    Queries q;
    const size_t row = size_t(a.cache.starts[w.sequence]) * a.heads + w.head + min(g, w.heads - 1);
    const u16* from = a.q + row * HEAD_DIM;
    float sum[kParts] = {}, excess[kParts] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            // The second pair of nibbles stays sixteen times as large.
            const float factor = (KV == 4 || KV == 6) && pair == 1 ? 16.f : 1.f;
            const float x = activation(from[dimension(s, t, pair, 0)]) / factor;
            const float y = activation(from[dimension(s, t, pair, 1)]) / factor;
            q.reg[s][pair] = g < w.heads ? operand_pair(x, y) : 0u;
            const float both = from_half(u16(q.reg[s][pair])) + from_half(u16(q.reg[s][pair] >> 16));
            sum[s * kParts / kSteps] += factor * both;
            excess[s * kParts / kSteps] += (kMagic + (KV == 6 ? 32.f * factor : 0.f)) * both;
        }
    if constexpr (KV == 4 || KV == 6) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            sum[i] = sum_of_lanes(sum[i]), excess[i] = sum_of_lanes(excess[i]);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                q.sum[i][h] = __shfl_sync(~0u, sum[i], 8 * t + 4 * h);
                q.excess[i][h] = __shfl_sync(~0u, excess[i], 8 * t + 4 * h);
            }
        }
    }
    return q;
}

__device__ __forceinline__ void load_tile(const Args& a, const Work& w, int tile, u32 stage,
                                          int lane) {
    // Copies by all lanes, 512 bytes each, after which whole rows are done: kRows of them.
    constexpr int kTurns = kChunks % 3 ? 1 : 3, kRows = kTurns * kLanes / kChunks;
    const int position = tile * TILE;
    const long row = row_of(a.cache, w.sequence, w.kv_head, position);
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
        const int at = turn * kLanes + lane, slot = at / kChunks, left = w.length - position - slot;
        const u8* keys = a.cache.keys + row * kRowBytes + at * 16;
        const u8* values = a.cache.values + row * kRowBytes + at * 16;
        const u32 key = stage + slot * kKeyStride + at % kChunks * 16;
        const u32 value = stage + TILE * kKeyStride + slot * kValueStride + at % kChunks * 16;
#pragma unroll
        for (int i = 0; i < TILE / kRows; ++i) {
            const bool valid = i * kRows < left;
            copy_async(key + i * kRows * kKeyStride, keys + i * kTurns * 512, valid);
            copy_async(value + i * kRows * kValueStride, values + i * kTurns * 512, valid);
        }
    }
    constexpr int kCopies = TILE * kScaleBytes / 16;  // of key scales, and as many of value scales
#pragma unroll
    for (int i = 0; i < kCopies; i += kLanes) {
        const int at = (i + lane) * 16;
        if (i + kLanes > kCopies && i + lane >= kCopies) continue;
        const u32 to = stage + kKeyScales + at;
        copy_async(to, a.cache.key_scales + row * kScaleBytes + at, true);
        copy_async(to + TILE * kScaleBytes, a.cache.value_scales + row * kScaleBytes + at, true);
    }
}

// The last tile's scales beyond the sequence are whatever stood there, maybe NaN.
__device__ __forceinline__ void clear_value_scales(u8* stage, int valid, int lane) {
    for (int i = lane + valid * kScaleBytes; i < TILE * kScaleBytes; i += kLanes)
        stage[kKeyScales + TILE * kScaleBytes + i] = 0;
    __syncwarp();
}

// ---- scores: c[0 .. 1] of key g, c[2 .. 3] of key g + 8, for heads 2 t and 2 t + 1 --------------

__device__ __forceinline__ Fragment key_fragment(uint4 a, uint4 b, int step) {  // KV == 8
    const u32 low = step == 0 ? a.x : step == 1 ? a.y : step == 2 ? a.z : a.w;
    const u32 high = step == 0 ? b.x : step == 1 ? b.y : step == 2 ? b.z : b.w;
    const u32 x = unsigned_bytes(low), y = unsigned_bytes(high);
    return {low_bytes(x), low_bytes(y), high_bytes(x), high_bytes(y)};
}

// KV == 6; the upper bits of the word's first and second code are in bits 4-5 and 6-7 of a half.
__device__ __forceinline__ Fragment key_fragment(u32 a, u32 b, u32 a_crumbs, u32 b_crumbs) {
    return {low_sixes(a, a_crumbs), low_sixes(b, b_crumbs), high_sixes(a, a_crumbs << 2),
            high_sixes(b, b_crumbs << 2)};
}

__device__ __forceinline__ Fragment key_fragment(u32 a, u32 b) {  // KV == 4
    return {low_nibbles(a), low_nibbles(b), high_nibbles(a), high_nibbles(b)};
}

__device__ __forceinline__ void scores(float (&c)[4], const Queries& q, const u8* stage, int slot,
                                       int lane, float scale) {
    const int g = lane / 4, t = lane % 4;
    const u8* low = stage + (slot + g) * kKeyStride;
    const u8* high = low + 8 * kKeyStride;
    const u8* scales = stage + kKeyScales + (slot + g) * kScaleBytes;
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] = 0.f;
    if constexpr (!kCodes) {
        const u32 row = shared_address(stage) + (slot + lane % 16) * kKeyStride + lane / 16 * 16;
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
            multiply(c, load_matrices(row + 32 * s), q.reg[s][0], q.reg[s][1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) c[e] *= scale;
    } else if constexpr (KV == 8) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const uint4 a = *reinterpret_cast<const uint4*>(low + 64 * i + 16 * t);
            const uint4 b = *reinterpret_cast<const uint4*>(high + 64 * i + 16 * t);
#pragma unroll
            for (int s = 0; s < 4; ++s)
                multiply(c, key_fragment(a, b, s), q.reg[4 * i + s][0], q.reg[4 * i + s][1]);
        }
        const float first = scale * from_half(*reinterpret_cast<const u16*>(scales));
        const float second = scale * from_half(*reinterpret_cast<const u16*>(scales + 16));
        c[0] *= first, c[1] *= first, c[2] *= second, c[3] *= second;
    } else if constexpr (KV == 6) {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const uint2 a = *reinterpret_cast<const uint2*>(low + 32 * i + 8 * t);
            const uint2 b = *reinterpret_cast<const uint2*>(high + 32 * i + 8 * t);
            const u32 a_crumbs = *reinterpret_cast<const u32*>(low + kCrumbs + 16 * i + 4 * t);
            const u32 b_crumbs = *reinterpret_cast<const u32*>(high + kCrumbs + 16 * i + 4 * t);
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                // Of eight codes: a byte of four crumbs in either half.
                const u32 selector = s < 2 ? 0x4140 : 0x4342;
                const u32 u = __byte_perm(a_crumbs, 0, selector);
                const u32 v = __byte_perm(b_crumbs, 0, selector);
                const u32 x = s < 2 ? a.x : a.y, y = s < 2 ? b.x : b.y;
                const Fragment f = s % 2 ? key_fragment(x >> 8, y >> 8, u, v)
                                         : key_fragment(x, y, u << 4, v << 4);
                multiply(c, f, q.reg[4 * i + s][0], q.reg[4 * i + s][1]);
            }
        }
        const float first = scale * from_half(*reinterpret_cast<const u16*>(scales));
        const float second = scale * from_half(*reinterpret_cast<const u16*>(scales + 16));
#pragma unroll
        for (int e = 0; e < 4; ++e) c[e] = (e < 2 ? first : second) * (c[e] - q.excess[0][e % 2]);
    } else {
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const uint2 a = *reinterpret_cast<const uint2*>(low + 32 * i + 8 * t);
            const uint2 b = *reinterpret_cast<const uint2*>(high + 32 * i + 8 * t);
            float part[4] = {};
#pragma unroll
            for (int s = 0; s < 4; ++s) {
                const u32 x = s < 2 ? a.x : a.y, y = s < 2 ? b.x : b.y;
                const Fragment f = s % 2 ? key_fragment(x >> 8, y >> 8) : key_fragment(x, y);
                multiply(part, f, q.reg[4 * i + s][0], q.reg[4 * i + s][1]);
            }
            const u32 first = *reinterpret_cast<const u32*>(scales + 4 * i);
            const u32 second = *reinterpret_cast<const u32*>(scales + 8 * kScaleBytes + 4 * i);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const u32 affine = e < 2 ? first : second;
                c[e] += from_half(u16(affine)) * (part[e] - q.excess[i][e % 2]) +
                        from_half(u16(affine >> 16)) * q.sum[i][e % 2];
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) c[e] *= scale;
    }
}

// ---- outputs: o[i][0 .. 1] of row g, o[i][2 .. 3] of row g + 8 of tile i ------------------------

// The dimension that row r of an output tile stands for.
__device__ __forceinline__ int output_dimension(int tile, int r) {
    return kCodes ? 64 * (tile / 4) + 8 * (r % 8) + 2 * (tile % 4) + r / 8 : 16 * tile + r;
}

// Of two neighbouring keys: a code's step and low end (or its scale), as pairs of halves.
struct Affine { u32 step, low; };

__device__ __forceinline__ Affine affine_of(const u8* scales) {
    const u32 a = *reinterpret_cast<const u32*>(scales);
    if (KV != 4) return {a, 0u};
    const u32 b = *reinterpret_cast<const u32*>(scales + kScaleBytes);
    return {__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632)};
}

// reg[0] and reg[1] of a fragment from keys 2 t and 2 t + 1: dimensions 2 i and 2 i + 1 of eight.
__device__ __forceinline__ void value_pair(u32& even, u32& odd, uint2 a, uint2 b, int i, Affine f) {
    if (KV == 8) {
        const u32 x = i < 2 ? a.x : a.y, y = i < 2 ? b.x : b.y;
        const u32 bytes = unsigned_bytes(__byte_perm(x, y, i % 2 ? 0x7362 : 0x5140));
        even = multiply_halves(low_bytes(bytes), f.step);
        odd = multiply_halves(high_bytes(bytes), f.step);
    } else if (KV == 6) {
        const u32 selector[4] = {0x0400, 0x0501, 0x0602, 0x0703};
        const u32 bytes = __byte_perm(a.x, b.x, selector[i]);  // bits 8-15 are masked out
        const u32 four = __byte_perm(a.y, b.y, selector[i / 2]);  // here too
        const u32 crumbs = i % 2 ? four : four << 4;
        even = multiply_halves(plain_low_sixes(low_sixes(bytes, crumbs)), f.step);
        odd = multiply_halves(plain_high_sixes(high_sixes(bytes, crumbs << 2)), f.step);
    } else {
        const u32 selector[4] = {0x0400, 0x0501, 0x0602, 0x0703};
        const u32 bytes = __byte_perm(a.x, b.x, selector[i]);  // bits 8-15 are masked out
        even = fma_halves(plain_low(low_nibbles(bytes)), f.step, f.low);
        odd = fma_halves(plain_high(high_nibbles(bytes)), f.step, f.low);
    }
}

__device__ __forceinline__ uint2 value_codes(const u8* row, int g, int group) {
    if (KV == 8) return *reinterpret_cast<const uint2*>(row + 64 * group + 8 * g);
    const u8* crumbs = row + kCrumbs + 16 * group + 2 * g;
    return {*reinterpret_cast<const u32*>(row + 32 * group + 4 * g),
            KV == 6 ? *reinterpret_cast<const u16*>(crumbs) : 0u};
}

// o += V^T P^T for 16 keys; p as the B operand.
__device__ __forceinline__ void add_values(float (&o)[kRowTiles][4], u32 p0, u32 p1,
                                           const u8* stage, int slot, int lane) {
    const u8* values = stage + TILE * kKeyStride;
    if constexpr (!kCodes) {
        const int key = slot + lane % 8 + lane / 16 * 8;
        const u32 row = shared_address(values) + key * kValueStride + lane / 8 % 2 * 16;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) multiply(o[i], load_transposed(row + 32 * i), p0, p1);
    } else {
        const int g = lane / 4, key = slot + 2 * (lane % 4);
        const u8* row = values + key * kValueStride;
        const u8* scales = stage + kKeyScales + (TILE + key) * kScaleBytes;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int at = KV == 4 ? 4 * group : 0;
            const Affine near = affine_of(scales + at);
            const Affine far = affine_of(scales + 8 * kScaleBytes + at);
            const uint2 codes[4] = {
                value_codes(row, g, group), value_codes(row + kValueStride, g, group),
                value_codes(row + 8 * kValueStride, g, group),
                value_codes(row + 9 * kValueStride, g, group)};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Fragment f;
                value_pair(f.reg[0], f.reg[1], codes[0], codes[1], i, near);
                value_pair(f.reg[2], f.reg[3], codes[2], codes[3], i, far);
                multiply(o[4 * group + i], f, p0, p1);
            }
        }
    }
}

// ---- a warp's softmax so far ---------------------------------------------------------------------

struct Sums {
    float o[kRowTiles][4];
    float most[2], weight[2];  // per head; the weight is this lane's share of it
};

// A maximum that is exceeded by a factor of at most 2^8 may stay: that costs no precision, and
// spares the lanes from agreeing on a new one for nearly every tile.
constexpr float kSlack = 8.f;

__device__ __forceinline__ void raise_maximum(Sums& sums, float (&high)[2]) {
    const bool exceeded = high[0] > sums.most[0] + kSlack || high[1] > sums.most[1] + kSlack;
    if (!__any_sync(~0u, exceeded)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int other = 4; other < kLanes; other *= 2)
            high[h] = fmaxf(high[h], __shfl_xor_sync(~0u, high[h], other));
        high[h] = fmaxf(high[h], sums.most[h]);
        const float factor = sums.most[h] == high[h] ? 1.f : power_of_two(sums.most[h] - high[h]);
        sums.most[h] = high[h];
        sums.weight[h] *= factor;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) sums.o[i][h] *= factor, sums.o[i][h + 2] *= factor;
    }
}

__device__ __forceinline__ void add_tile(Sums& sums, const Queries& q, u8* stage, int valid, int lane,
                                         float scale) {
    float c[TILE / 16][4];
    float high[2] = {-infinity(), -infinity()};
    if (kCodes && valid < TILE) clear_value_scales(stage, valid, lane);
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
        scores(c[k], q, stage, 16 * k, lane, scale);
        if (valid < TILE) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (16 * k + lane / 4 + e / 2 * 8 >= valid) c[k][e] = -infinity();
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) high[e % 2] = fmaxf(high[e % 2], c[k][e]);
    }
    raise_maximum(sums, high);
#pragma unroll
    for (int k = 0; k < TILE / 16; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            c[k][e] = power_of_two(c[k][e] - sums.most[e % 2]);
            sums.weight[e % 2] += c[k][e];
        }
        const u32 p0 = transpose(operand_pair(c[k][0], c[k][1]));
        const u32 p1 = transpose(operand_pair(c[k][2], c[k][3]));
        add_values(sums.o, p0, p1, stage, 16 * k, lane);
    }
}

// ---- adding up: warps through shared memory, blocks through global memory -------------------------

// Per head: a warp's sums (HEAD_DIM of them), their maximum and weight.
constexpr int kPart = HEAD_DIM + 2;
static_assert(WARPS * kHeads * kPart * 4 <= WARPS * STAGES * kStageBytes, "sums must fit");

__device__ __forceinline__ void leave_sums(Sums& sums, float* part, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float* to = part + (2 * t + h) * kPart;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            to[output_dimension(i, g)] = sums.o[i][h];
            to[output_dimension(i, g + 8)] = sums.o[i][h + 2];
        }
#pragma unroll
        for (int other = 4; other < kLanes; other *= 2)
            sums.weight[h] += __shfl_xor_sync(~0u, sums.weight[h], other);
        if (g == 0) to[HEAD_DIM] = sums.most[h], to[HEAD_DIM + 1] = sums.weight[h];
    }
}

struct Total { float sum, most, weight; };

// One dimension of `count` parts that lie `stride` floats apart, four at a time on their way.
__device__ __forceinline__ Total add_up(const float* parts, int count, int stride, int dim) {
    Total total = {0.f, -infinity(), 0.f};
    for (int i = 0; i < count; i += 4) {
        Total next[4];
        float most = total.most;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float* part = parts + (i + j) * stride;
            if (i + j < count) next[j] = {part[dim], part[HEAD_DIM], part[HEAD_DIM + 1]};
            else next[j] = {0.f, -infinity(), 0.f};
            most = fmaxf(most, next[j].most);
        }
        const float factor = i ? power_of_two(total.most - most) : 0.f;
        total = {total.sum * factor, most, total.weight * factor};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (i + j >= count) break;
            const float share = power_of_two(next[j].most - most);
            total.sum += share * next[j].sum;
            total.weight += share * next[j].weight;
        }
    }
    return total;
}

__device__ __forceinline__ void write_out(const Args& a, const Work& w, int head, int dim, Total t) {
    const size_t row = size_t(a.cache.starts[w.sequence]) * a.heads + w.head + head;
    const bool blind = CLOSED && w.length == 0;
    a.out[row * HEAD_DIM + dim] = blind ? u16(0) : u16(activation_pair(t.sum / t.weight, 0.f));
#if PARTIAL
    if (dim == 0) a.lse[row] = blind ? -infinity() : natural_log(t.most, t.weight);
#endif
}

// True in the block whose part was the last one to be written.
__device__ __forceinline__ bool finishes(const Args& a, const Work& w) {
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // after the barrier, for the writes of the whole block
        is_last = atomicAdd(a.finished + w.unit, 1u) == u32(w.splits - 1);
        if (is_last) a.finished[w.unit] = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
attention_decode(const __grid_constant__ Args a) {
    extern __shared__ __align__(128) u8 memory[];
    let_next_kernel_start();
    const Work w(a);
    const bool one_token = a.cache.starts[w.sequence + 1] - a.cache.starts[w.sequence] == 1;
    if (!one_token || w.split >= w.splits) {
        wait_for_previous_kernel();  // or this kernel might end before the one ahead of it
        return;
    }
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    u8* stages = memory + warp * STAGES * kStageBytes;

    // Keys of earlier steps can be asked for before the kernel ahead has stored the new one. Closed
    // pages hold no others; open ones may have been copied in this very step.
    bool waited = PARTIAL && !CLOSED;
    if (waited) wait_for_previous_kernel();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        const int tile = w.first + warp + s * WARPS;
        if (!CLOSED && !waited && (tile + 1) * TILE >= w.length) {
            wait_for_previous_kernel();
            waited = true;
        }
        if (tile < w.last) load_tile(a, w, tile, shared_address(stages + s * kStageBytes), lane);
        commit_copies();
    }
    if (!waited) wait_for_previous_kernel();

    Sums sums = {};
    sums.most[0] = sums.most[1] = -infinity();
    const Queries q = load_queries(a, w, lane);
    int stage = 0;
    for (int tile = w.first + warp; tile < w.last; tile += WARPS) {
        wait_for_copies<STAGES - 2>();
        __syncwarp();
        const int next = tile + (STAGES - 1) * WARPS, free = stage ? stage - 1 : STAGES - 1;
        if (next < w.last) load_tile(a, w, next, shared_address(stages + free * kStageBytes), lane);
        commit_copies();
        add_tile(sums, q, stages + stage * kStageBytes, w.length - tile * TILE, lane, a.scale);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    __syncthreads();
    float* parts = reinterpret_cast<float*>(memory);
    leave_sums(sums, parts + warp * kHeads * kPart, lane);
    __syncthreads();

    float* mine = a.parts + (size_t(w.sequence) * a.heads + w.head) * a.splits * kPart;
    for (int i = threadIdx.x; i < w.heads * HEAD_DIM; i += kThreads) {
        const int head = i / HEAD_DIM, dim = i % HEAD_DIM;
        const Total total = add_up(parts + head * kPart, WARPS, kHeads * kPart, dim);
        if (w.splits == 1) {
            write_out(a, w, head, dim, total);
            continue;
        }
        float* part = mine + (head * a.splits + w.split) * kPart;
        part[dim] = total.sum;
        if (dim == 0) part[HEAD_DIM] = total.most, part[HEAD_DIM + 1] = total.weight;
    }
    if (w.splits == 1 || !finishes(a, w)) return;
    for (int i = threadIdx.x; i < w.heads * HEAD_DIM; i += kThreads) {
        const int head = i / HEAD_DIM, dim = i % HEAD_DIM;
        write_out(a, w, head, dim, add_up(mine + head * a.splits * kPart, w.splits, kPart, dim));
    }
}
