// Operations on one row of activations at a time: RMSNorm (Zhang and Sennrich 2019), SiLU times up.
//
// Macros beside that of numbers.cuh: THREADS (of a row), ROWS (of a block).
#include "numbers.cuh"

static_assert(THREADS <= kLanes || ROWS == 1, "rows of several warps have a block of their own");

struct NormArgs {
    const u16* x;       // row r at (r / heads) * token_stride + (r % heads) * head_stride
    const u16* weight;  // (dim,)
    u16* y;             // (rows, dim)
    long token_stride, head_stride;
    int rows, heads, dim;
    float eps;
};

// The sum over the threads of a row; every thread gets it.
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
    for (int other = 16; other; other /= 2) value += __shfl_xor_sync(~0u, value, other);
    if constexpr (THREADS > kLanes) {
        __shared__ float part[THREADS / kLanes];
        if (threadIdx.x % kLanes == 0) part[threadIdx.x / kLanes] = value;
        __syncthreads();
        value = 0.f;
        for (int i = 0; i < THREADS / kLanes; ++i) value += part[i];
    }
    return value;
}

extern "C" __global__ void __launch_bounds__(THREADS* ROWS) rms_norm(const __grid_constant__ NormArgs a) {
    let_next_kernel_start();
    const int thread = threadIdx.x % THREADS;
    const long row = long(blockIdx.x) * ROWS + threadIdx.x / THREADS;
    wait_for_previous_kernel();
    if (row >= a.rows) return;  // of whole warps
    const u16* x = a.x + row / a.heads * a.token_stride + row % a.heads * a.head_stride;
    Eight first = {};  // kept: a row is rarely longer than one round of the block
    float square = 0.f;
    for (int at = 8 * thread; at < a.dim; at += 8 * THREADS) {
        const Eight e = load_eight(x + at);
        if (at < 8 * THREADS) first = e;
#pragma unroll
        for (int i = 0; i < 8; ++i) square += e.x[i] * e.x[i];
    }
    const float scale = rsqrtf(row_sum(square) / float(a.dim) + a.eps);
    for (int at = 8 * thread; at < a.dim; at += 8 * THREADS) {
        Eight e = at < 8 * THREADS ? first : load_eight(x + at);
        const Eight weight = load_eight(a.weight + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) e.x[i] = e.x[i] * scale * weight.x[i];
        store_eight(a.y + row * a.dim + at, e);
    }
}

struct SiluArgs {
    const u16* gate_up;  // (tokens, 2 * width), rows row_stride apart
    u16* y;              // (tokens, width)
    long row_stride, count;  // count: of groups of 8 elements of y
    int width;
};

extern "C" __global__ void __launch_bounds__(THREADS* ROWS) silu_mul(const __grid_constant__ SiluArgs a) {
    let_next_kernel_start();
    const long i = long(blockIdx.x) * THREADS * ROWS + threadIdx.x;
    wait_for_previous_kernel();
    if (i >= a.count) return;
    const int groups = a.width / 8;
    const u16* gate = a.gate_up + i / groups * a.row_stride + i % groups * 8;
    Eight e = load_eight(gate);
    const Eight up = load_eight(gate + a.width);
#pragma unroll
    for (int j = 0; j < 8; ++j) e.x[j] = e.x[j] / (1.f + __expf(-e.x[j])) * up.x[j];
    store_eight(a.y + 8 * i, e);
}
