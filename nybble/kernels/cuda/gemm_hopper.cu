// y = x W for tens of tokens and more on compute capability 9.0: the weights are scaled in registers
// and are the A operand of wgmma, the tokens the B operand in shared memory.
//
// A block owns WARPGROUPS * 64 outputs and TOKENS tokens. The tiles of a last wave that would be partly
// filled are shared by several blocks, which split K and add up through global memory. While a piece of
// 64 inputs is multiplied, the next is unpacked. A chunk is PIECES of them (DEPTH * PIECES is even): the
// weights of DEPTH chunks are on their way to registers, the tokens of BUFFERS - 2 to shared memory.
#include "arranged.cuh"
#include "wgmma.cuh"

constexpr int kThreads = WARPGROUPS * 128;
constexpr int kTiles = WARPGROUPS * 4;
constexpr int kChunk = PIECES * kPiece;
constexpr int kGroups = GROUP ? kChunk / GROUP : 1;
constexpr int kPieceBytes = TOKENS * kRowBytes;       // a piece of the tokens
constexpr int kBufferBytes = PIECES * kPieceBytes;    // a chunk of them; there are BUFFERS
constexpr int kAhead = BUFFERS - 2;                   // chunks of the tokens that are on their way
constexpr int kSumRow = kTiles * 16 + 4;  // floats: rows of different tokens meet other banks

struct Args {  // as in gemm.cu, as far as scratch
    const uint4* words;
    const void* scales;
    const u16* zeros;
    const u16* x;  // arranged, see arranged.cuh; x_stride: its rows, a multiple of TOKENS
    const u16* bias;
    const u16* residual;
    u16* y;
    int tokens, x_stride, outputs, tiles, chunks, groups;
    u32 chunks_per_group;
    float4* scratch;  // [shared tiles][parts][TOKENS][16 * kTiles]: sums of each part
    int* arrived;     // of the parts of each shared tile; zeros before and after
    int whole, parts;  // so many tiles have a block each, the others `parts` blocks
    int y_rows;       // of y, arranged, too; 0: y is (tokens, outputs)
};

struct Stage {
    Weights weights[PIECES];
    GroupBits groups[kGroups];
};

__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    u32 out;
#if BF16
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
#else
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
    return out;
}

__device__ __forceinline__ void load_stage(Stage& s, const Args& a, const Tile& tile, int chunk) {
#pragma unroll
    for (int p = 0; p < PIECES; ++p) s.weights[p] = tile.piece(chunk * PIECES + p);
    const int first = GROUP ? chunk * kGroups : divide(chunk, a.chunks_per_group);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) s.groups[i] = tile.group(first + i);
}

struct ScalePairs { u32 low, high; };

__device__ __forceinline__ ScalePairs scale_pairs(ScaleBits bits) {
#if SCALE == 16 && !BF16 || SCALE == 17 && BF16
    return {__byte_perm(bits, 0, 0x1010), __byte_perm(bits, 0, 0x3232)};
#else
    const Scale scale = widen(bits);
    return {pair(scale.low, scale.low), pair(scale.high, scale.high)};
#endif
}

__device__ __forceinline__ void unpack_scaled(Fragment (&f)[kSteps], const Stage& s, int piece) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const GroupBits& bits = s.groups[(piece * kSteps + step) * kGroups / (PIECES * kSteps)];
        const ScalePairs scale = scale_pairs(bits.scale);
        f[step] = unpack(s.weights[piece], step, bits.offset());
#pragma unroll
        for (int i = 0; i < 4; ++i)
            f[step].reg[i] = multiply(f[step].reg[i], i % 2 ? scale.high : scale.low);
    }
}

// Pieces of the tokens come to shared memory by bulk copies, which one thread orders: x is arranged
// so that a piece of TOKENS tokens is one run of bytes, just as wgmma reads it. (Copies by all
// threads would need a fence before wgmma, and that waits for the weights on their way, too.)
struct TokenCopy {
    const u16* from;
    size_t piece_stride;
    u32 buffers, barriers;  // at barriers: BUFFERS for chunks that came, as many for chunks read

    __device__ __forceinline__ u32 full(int buffer) const { return barriers + buffer * 8; }
    __device__ __forceinline__ u32 empty(int buffer) const { return full(BUFFERS + buffer); }

    __device__ __forceinline__ void start(int chunk, int buffer) const {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     ::"r"(full(buffer)), "n"(kBufferBytes) : "memory");
        const u32 to = buffers + buffer * kBufferBytes;
        if (TOKENS <= 64 && piece_stride == TOKENS * kPiece) {  // one tile has all tokens
            copy<kBufferBytes>(to, from + chunk * PIECES * piece_stride, full(buffer));
            return;
        }
#pragma unroll
        for (int p = 0; p < PIECES; ++p)
            copy<kPieceBytes>(to + p * kPieceBytes, from + (chunk * PIECES + p) * piece_stride,
                              full(buffer));
    }
    template <int bytes>
    static __device__ __forceinline__ void copy(u32 to, const u16* from, u32 barrier) {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "n"(bytes), "r"(barrier) : "memory");
    }
    // A warp has read the buffer. Relaxed: wgmma is known to have read, and a release may wait for the
    // weights on their way, too.
    __device__ __forceinline__ void release(int buffer) const {
        asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];"
                     ::"r"(empty(buffer)) : "memory");
    }
};

__device__ __forceinline__ void wait_for(u32 barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}"
                 ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void init_barriers(const TokenCopy& copy) {
#pragma unroll
    for (int i = 0; i < BUFFERS; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(copy.full(i)) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                     ::"r"(copy.empty(i)), "n"(kTiles) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void multiply_piece(float (&sum)[TOKENS / 2],
                                               const Fragment (&f)[kSteps],
                                               unsigned long long piece) {
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) wgmma(sum, f[step], piece + (step * 32 >> 4));
    wgmma_commit();
}

__device__ __forceinline__ void add_bias(const Args& a, float (&value)[4], int output, int limit) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (output + e < limit) value[e] += to_float(a.bias[output + e]);
}

constexpr int kRows = kTiles * (PAIRED ? 8 : 16);             // outputs of a block
constexpr int kFours = TOKENS * kRows / 4;                    // that it writes, four by four
constexpr int kBatch = kFours < 4 * kThreads ? (kFours + kThreads - 1) / kThreads : 4;  // of a thread

// Four neighbouring outputs of a token.
struct Four {
    int row, column, token, output;
    bool some;
    __device__ __forceinline__ Four(const Args& a, int tile0, int token0, int index) {
        row = index % (kRows / 4) * 4, column = index / (kRows / 4);
        token = token0 + column, output = tile0 * (PAIRED ? 8 : 16) + row;
        some = index < kFours && token < a.tokens && output < a.outputs;
    }
    __device__ __forceinline__ size_t at(const Args& a) const {
        return size_t(token) * a.outputs + output;
    }
    __device__ __forceinline__ uint2 load(const Args& a, const u16* from) const {
        from += at(a);
        if (a.outputs % 4 == 0) return *reinterpret_cast<const uint2*>(from);
        u16 x[4] = {};
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (output + e < a.outputs) x[e] = from[e];
        return make_uint2(x[0] | u32(x[1]) << 16, x[2] | u32(x[3]) << 16);
    }
    __device__ __forceinline__ void store(const Args& a, const float (&value)[4]) const {
        u16* to = a.y + at(a);
        if (a.outputs % 4 == 0) {
            *reinterpret_cast<uint2*>(to) = make_uint2(pair(value[0], value[1]), pair(value[2], value[3]));
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (output + e < a.outputs) to[e] = from_float(value[e]);
    }
};

__device__ __forceinline__ void write_four(const Args& a, const float* sums, const Four& four,
                                           uint2 residual) {
    const int row = PAIRED ? four.row / 8 * 16 + four.row % 8 : four.row;
    const float* sum = sums + four.column * kSumRow + row;
    const float4 first = *reinterpret_cast<const float4*>(sum);
    float value[4] = {first.x, first.y, first.z, first.w};
    if (a.bias) add_bias(a, value, four.output, a.outputs);
    if (PAIRED) {
        const float4 second = *reinterpret_cast<const float4*>(sum + 8);
        float up[4] = {second.x, second.y, second.z, second.w};
        if (a.bias) add_bias(a, up, a.outputs + four.output, 2 * a.outputs);
#pragma unroll
        for (int e = 0; e < 4; ++e) value[e] = silu_times(value[e], up[e]);
    }
    if (a.residual) {
        value[0] += to_float(u16(residual.x)), value[1] += to_float(u16(residual.x >> 16));
        value[2] += to_float(u16(residual.y)), value[3] += to_float(u16(residual.y >> 16));
    }
    four.store(a, value);
}

// sums: [TOKENS][kSumRow].
__device__ __forceinline__ void write_block(const Args& a, const float* sums, int tile0, int token0) {
    for (int first = threadIdx.x; first < kFours; first += kBatch * kThreads) {
        uint2 residual[kBatch] = {};  // all on their way before the first is used
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const Four four(a, tile0, token0, first + i * kThreads);
            if (a.residual && four.some) residual[i] = four.load(a, a.residual);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const Four four(a, tile0, token0, first + i * kThreads);
            if (four.some) write_four(a, sums, four, residual[i]);
        }
    }
}

// The same for a y that is arranged, of gate and up without a bias; outputs is a multiple of 64. A warp
// takes 8 tokens by 32 outputs at a time, its lanes in an order in which they meet different banks.
__device__ __forceinline__ void write_arranged(const Args& a, const float* sums, int tile0, int token0) {
    constexpr int kHalves = kTiles / 4, kWarps = kThreads / kLanes;
    const int lane = threadIdx.x % kLanes, c = lane % 4, among = lane / 4 % 4 * 2 + lane / 16;
#pragma unroll 2
    for (int i = threadIdx.x / kLanes; i < TOKENS / 8 * kHalves; i += kWarps) {
        const int half = i % kHalves, column = i / kHalves * 8 + among, token = token0 + column;
        if (token >= a.tokens || (tile0 / 4 + half) * 32 >= a.outputs) continue;
        const float* sum = sums + column * kSumRow + half * 64 + 2 * c;
        u32 word[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const float2 gate = *reinterpret_cast<const float2*>(sum + t * 16);
            const float2 up = *reinterpret_cast<const float2*>(sum + t * 16 + 8);
            word[t] = pair(silu_times(gate.x, up.x), silu_times(gate.y, up.y));
        }
        *arranged_chunk(a.y, a.y_rows, token, tile0 / 4 + half, c) =
            make_uint4(word[0], word[1], word[2], word[3]);
    }
}

// Which tile of the result a block works at, and at which part of the inputs.
struct Share { int tile, part, parts; };
__device__ __forceinline__ Share share_of_block(const Args& a) {
    const int block = blockIdx.x, rest = block - a.whole;
    if (rest < 0) return {block, 0, 1};
    return {a.whole + rest / a.parts, rest % a.parts, a.parts};
}

// The last block that comes here adds up the parts of its tile, in their order, and gets true.
__device__ __forceinline__ bool add_parts(const Args& a, float* sums, const Share& share) {
    constexpr int kRow = kTiles * 4, kCount = TOKENS * kRow;  // in float4
    __shared__ bool last;
    const int tile = share.tile - a.whole;
    float4* parts = a.scratch + size_t(tile) * share.parts * kCount;
    for (int i = threadIdx.x; i < kCount; i += kThreads)
        __stcg(parts + share.part * kCount + i,
               *reinterpret_cast<float4*>(sums + i / kRow * kSumRow + i % kRow * 4));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(a.arrived + tile, 1) == share.parts - 1;
        if (last) a.arrived[tile] = 0;
    }
    __syncthreads();
    if (!last) return false;
    __threadfence();
    for (int i = threadIdx.x; i < kCount; i += kThreads) {
        float4 total = {};
#pragma unroll 4
        for (int part = 0; part < share.parts; ++part) {
            const float4 one = __ldcg(parts + part * kCount + i);
            total = make_float4(total.x + one.x, total.y + one.y, total.z + one.z, total.w + one.w);
        }
        *reinterpret_cast<float4*>(sums + i / kRow * kSumRow + i % kRow * 4) = total;
    }
    __syncthreads();
    return true;
}

// The blocks that run at a time shall share tokens and weights in the L2 cache: a band of token blocks
// takes all row blocks before the next one begins.
struct Place { int tokens, rows; };
__device__ __forceinline__ Place place_of(const Args& a, int tile) {
    const int across = (a.tokens + TOKENS - 1) / TOKENS, down = (a.tiles + kTiles - 1) / kTiles;
    const int first = tile / (BAND * down) * BAND, width = min(BAND, across - first);
    const int rest = tile - first * down;
    return {first + rest % width, rest / width};
}

// Grid: the whole tiles, then the parts of the others.
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
gemm_hopper(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const Share share = share_of_block(a);
    const Place place = place_of(a, share.tile);
    const int token0 = place.tokens * TOKENS, tile0 = place.rows * kTiles;
    const int begin = a.chunks * share.part / share.parts;
    const int end = a.chunks * (share.part + 1) / share.parts;

    let_next_kernel_start();
    __shared__ unsigned long long barriers[2 * BUFFERS];
    const u32 address = u32(__cvta_generic_to_shared(shared));
    const TokenCopy copy{a.x + size_t(token0) * kPiece, size_t(a.x_stride) * kPiece, address,
                         u32(__cvta_generic_to_shared(barriers))};
    const unsigned long long first_buffer = descriptor(address);
    const bool orders = threadIdx.x == 0;
    if (orders) init_barriers(copy);
    const Tile tile = tile_of(a, min(tile0 + warp, a.tiles - 1), a.chunks * PIECES, lane);
    Stage stage[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (begin + d < end) load_stage(stage[d], a, tile, begin + d);
    __syncthreads();
    wait_for_previous_kernel();
    if (orders)
        for (int i = 0; i < kAhead && begin + i < end; ++i) copy.start(begin + i, i);

    Fragment f[2][kSteps];
    unpack_scaled(f[0], stage[0], 0);
    float sum[TOKENS / 2] = {};
    int buffer = 0, refill = kAhead;
    u32 phase = 0, refill_phase = 1;
    for (int base = begin; base < end; base += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int chunk = base + d;
            if (chunk >= end) break;
            wait_for(copy.full(buffer), phase);
            const unsigned long long tokens = first_buffer + (buffer * kBufferBytes >> 4);
#pragma unroll
            for (int p = 0; p < PIECES; ++p) {
                const int i = (d * PIECES + p) % 2;
                multiply_piece(sum, f[i], tokens + (p * kPieceBytes >> 4));
                if (p == 0 && orders && chunk + kAhead < end) {
                    if (chunk - begin >= 2) wait_for(copy.empty(refill), refill_phase);
                    copy.start(chunk + kAhead, refill);
                }
                if (p == PIECES - 1 && chunk + DEPTH < end)
                    load_stage(stage[d], a, tile, chunk + DEPTH);
                if (p < PIECES - 1 || chunk + 1 < end) {
                    wgmma_wait<1>();  // the piece before: its registers are free
                    if (p == 0 && chunk > begin && lane == 0)
                        copy.release(buffer ? buffer - 1 : BUFFERS - 1);
                    const int next = d * PIECES + p + 1;
                    unpack_scaled(f[1 - i], stage[next / PIECES % DEPTH], next % PIECES);
                }
            }
            if (++refill == BUFFERS) refill = 0, refill_phase ^= 1;
            if (++buffer == BUFFERS) buffer = 0, phase ^= 1;
        }
    }
    wgmma_wait<0>();
    __syncthreads();  // the buffers become the sums

    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) {
        const int token = i / 4 * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + (i % 4 / 2) * 8;
        sums[token * kSumRow + warp * 16 + row] = sum[i];
    }
    __syncthreads();
    if (share.parts > 1 && !add_parts(a, sums, share)) return;
    if (PAIRED && a.y_rows)
        write_arranged(a, sums, tile0, token0);
    else
        write_block(a, sums, tile0, token0);
}
