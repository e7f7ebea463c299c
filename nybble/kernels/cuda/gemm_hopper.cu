// y = x W for tens to hundreds of tokens on compute capability 9.0: the weights are scaled in
// registers and are the A operand of wgmma, the tokens the B operand in shared memory.
//
// A block owns WARPGROUPS * 64 outputs and TOKENS tokens. K is split over the SPLIT blocks of a
// cluster, which add up through one another's shared memory. While a piece of 64 inputs is
// multiplied, the next is unpacked, the weights of DEPTH (even) pieces are on their way to registers
// and the tokens of BUFFERS - 2 pieces to shared memory.
#include "wgmma.cuh"

constexpr int kThreads = WARPGROUPS * 128;
constexpr int kTiles = WARPGROUPS * 4;
constexpr int kGroups = GROUP ? kPiece / GROUP : 1;
constexpr int kBufferBytes = TOKENS * kRowBytes;      // a piece of the tokens; BUFFERS of them
constexpr int kAhead = BUFFERS - 2;                   // pieces of the tokens that are on their way
constexpr int kSumRow = kTiles * 16 + 4;  // floats: rows of different tokens meet other banks

struct Args {  // as in gemm.cu
    const uint4* words;
    const void* scales;
    const u16* zeros;
    const u16* x;  // arranged, see arrange() in dense.cu; x_stride: its rows, a multiple of TOKENS
    const u16* bias;
    const u16* residual;
    u16* y;
    int tokens, x_stride, outputs, tiles, pieces, groups;
    u32 pieces_per_group;
};

struct Stage {
    Weights weights;
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

__device__ __forceinline__ void load_stage(Stage& s, const Args& a, long tile, int piece, int lane) {
    s.weights = load_weights(a.words, tile * a.pieces + piece, lane);
    const int first = GROUP ? piece * kGroups : divide(piece, a.pieces_per_group);
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
        s.groups[i].load(a.scales, a.zeros, (tile * a.groups + first + i) * 8 + lane / 4);
}

__device__ __forceinline__ void unpack_scaled(Fragment (&f)[kSteps], const Stage& s) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        const GroupBits& bits = s.groups[step * kGroups / kSteps];
        const Scale scale = widen(bits.scale);
        const u32 low = pair(scale.low, scale.low), high = pair(scale.high, scale.high);
        f[step] = unpack(s.weights, step, bits.offset());
#pragma unroll
        for (int i = 0; i < 4; ++i) f[step].reg[i] = multiply(f[step].reg[i], i % 2 ? high : low);
    }
}

// Pieces of the tokens come to shared memory by bulk copies, which one thread orders: x is arranged
// so that a piece of TOKENS tokens is one run of bytes, just as wgmma reads it. (Copies by all
// threads would need a fence before wgmma, and that waits for the weights on their way, too.)
struct TokenCopy {
    const u16* from;
    size_t piece_stride;
    u32 buffers, barriers;

    __device__ __forceinline__ void start(int piece, int buffer) const {
        const u32 barrier = barriers + buffer * 8;
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     ::"r"(barrier), "n"(kBufferBytes) : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                     "[%0], [%1], %2, [%3];"
                     ::"r"(buffers + buffer * kBufferBytes), "l"(from + piece * piece_stride),
                       "n"(kBufferBytes), "r"(barrier) : "memory");
    }
    __device__ __forceinline__ void wait(int buffer, u32 phase) const {
        asm volatile("{\n.reg .pred done;\n"
                     "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                     "@!done bra again;\n}"
                     ::"r"(barriers + buffer * 8), "r"(phase) : "memory");
    }
};

__device__ __forceinline__ void init_barriers(u32 barriers) {
#pragma unroll
    for (int i = 0; i < BUFFERS; ++i)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + i * 8) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void multiply_piece(float (&sum)[TOKENS / 2],
                                               const Fragment (&f)[kSteps], u32 buffer) {
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
        wgmma(sum, f[step], descriptor(buffer + step * 32));
    wgmma_commit();
}

__device__ __forceinline__ void sync_cluster() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The sum over the cluster's blocks of one float of their shared memory.
__device__ __forceinline__ float cluster_sum(const float* at) {
    const u32 local = u32(__cvta_generic_to_shared(at));
    float total = 0.f;
#pragma unroll
    for (int rank = 0; rank < SPLIT; ++rank) {
        u32 remote;
        float value;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote));
        total += value;
    }
    return total;
}

__device__ __forceinline__ void store(const Args& a, float value, int token, int output) {
    const size_t at = size_t(token) * a.outputs + output;
    if (a.residual) value += to_float(a.residual[at]);
    a.y[at] = from_float(value);
}

// sums: [TOKENS][kSumRow] of each block of the cluster; each block finishes its share of tokens.
__device__ __forceinline__ void write_block(const Args& a, const float* sums, int tile0, int token0,
                                            int rank) {
    constexpr int kRows = PAIRED ? kTiles * 8 : kTiles * 16;
    for (int i = threadIdx.x; i < TOKENS / SPLIT * kRows; i += kThreads) {
        const int row = i % kRows, column = rank * (TOKENS / SPLIT) + i / kRows;
        const int token = token0 + column, output = tile0 * (PAIRED ? 8 : 16) + row;
        if (token >= a.tokens || output >= a.outputs) continue;
        const float* sum = sums + column * kSumRow + (PAIRED ? row / 8 * 16 + row % 8 : row);
        float value = cluster_sum(sum);
        if (a.bias) value += to_float(a.bias[output]);
        if (PAIRED) {
            float up = cluster_sum(sum + 8);
            if (a.bias) up += to_float(a.bias[a.outputs + output]);
            value = value / (1.f + __expf(-value)) * up;
        }
        store(a, value, token, output);
    }
}

// Grid: (token blocks * SPLIT, row blocks).
extern "C" __global__ void __cluster_dims__(SPLIT, 1, 1) __launch_bounds__(kThreads, MIN_BLOCKS)
gemm_hopper(const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int rank = blockIdx.x % SPLIT, token0 = blockIdx.x / SPLIT * TOKENS;
    const int tile0 = blockIdx.y * kTiles;
    const long tile = min(tile0 + warp, a.tiles - 1);
    const int begin = a.pieces * rank / SPLIT, end = a.pieces * (rank + 1) / SPLIT;

    let_next_kernel_start();
    __shared__ unsigned long long barriers[BUFFERS];
    const u32 address = u32(__cvta_generic_to_shared(shared));
    const TokenCopy copy{a.x + size_t(token0) * kPiece, size_t(a.x_stride) * kPiece, address,
                         u32(__cvta_generic_to_shared(barriers))};
    const bool orders = threadIdx.x == 0;
    if (orders) init_barriers(copy.barriers);
    Stage stage[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (begin + d < end) load_stage(stage[d], a, tile, begin + d, lane);
    __syncthreads();
    wait_for_previous_kernel();
    if (orders)
        for (int i = 0; i < kAhead && begin + i < end; ++i) copy.start(begin + i, i);

    Fragment f[2][kSteps];
    unpack_scaled(f[0], stage[0]);
    float sum[TOKENS / 2] = {};
    int buffer = 0, refill = kAhead;
    u32 phase = 0;
    for (int base = begin; base < end; base += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int piece = base + d;
            if (piece >= end) break;
            copy.wait(buffer, phase);
            multiply_piece(sum, f[d % 2], address + buffer * kBufferBytes);
            __syncthreads();  // all have finished with the piece before the last: refill its buffer
            if (orders && piece + kAhead < end) copy.start(piece + kAhead, refill);
            if (piece + DEPTH < end) load_stage(stage[d], a, tile, piece + DEPTH, lane);
            if (piece + 1 < end) {
                wgmma_wait<1>();  // the piece before: its registers are free
                unpack_scaled(f[(d + 1) % 2], stage[(d + 1) % DEPTH]);
            }
            refill = refill == BUFFERS - 1 ? 0 : refill + 1;
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
    if (SPLIT > 1) sync_cluster(); else __syncthreads();
    write_block(a, sums, tile0, token0, rank);
    if (SPLIT > 1) sync_cluster();  // the others may still read this block's shared memory
}
