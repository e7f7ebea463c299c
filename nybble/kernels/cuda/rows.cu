// Operations on one row at a time: RMSNorm (Zhang and Sennrich 2019), SiLU times up, embedding, and
// what two parts of attention are together.
//
// Macros beside that of numbers.cuh: THREADS (of a row), ROWS (of a block), ROUNDS (of THREADS
// times eight numbers: a row that is normalised has at most so many, and is read once).
#include "arranged.cuh"
#include "numbers.cuh"

static_assert(THREADS <= kLanes || ROWS == 1, "rows of several warps have a block of their own");

struct NormArgs {
    const u16* x;       // row r at (r / heads) * token_stride + (r % heads) * head_stride
    const u16* weight;  // (dim,)
    u16* y;             // (rows, dim), or as arranged.cuh has it
    long token_stride, head_stride;
    int rows, heads, dim;
    int y_rows;         // of a y that is arranged, or 0; dim is a multiple of 64 then
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
    Eight kept[ROUNDS] = {};
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int at = 8 * (thread + r * THREADS);
        if (at < a.dim) kept[r] = load_eight(x + at);
    }
    float square = 0.f;
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) square += kept[r].x[i] * kept[r].x[i];
    const float scale = rsqrtf(row_sum(square) / float(a.dim) + a.eps);
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int at = 8 * (thread + r * THREADS);
        const bool some = at < a.dim;
        const Eight weight = load_eight(a.weight + (some ? at : 0));
#pragma unroll
        for (int i = 0; i < 8; ++i) kept[r].x[i] *= scale * weight.x[i];
        const uint4 y = packed_eight(kept[r]);
        if (a.y_rows) {
            const uint4 chunk = chunk_of_inputs(y);
            if (some) *arranged_chunk(a.y, a.y_rows, int(row), at / 32, thread % 4) = chunk;
        } else if (some) {
            *reinterpret_cast<uint4*>(a.y + row * a.dim + at) = y;
        }
    }
}

struct EmbedArgs {
    const long* ids;
    const u16* table;  // (vocab, dim); may lie in main memory, pinned
    u16* y;            // (tokens, dim)
    int dim;
};

// Grid: (tokens, blocks of 8 * THREADS numbers).
extern "C" __global__ void __launch_bounds__(THREADS* ROWS) embed(const __grid_constant__ EmbedArgs a) {
    let_next_kernel_start();
    const int at = 8 * (blockIdx.y * THREADS + threadIdx.x);
    wait_for_previous_kernel();
    if (at >= a.dim) return;
    *reinterpret_cast<uint4*>(a.y + size_t(blockIdx.x) * a.dim + at) =
        *reinterpret_cast<const uint4*>(a.table + a.ids[blockIdx.x] * a.dim + at);
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

struct MergeArgs {
    const u16 *a, *b;              // (rows, dim), a row being a head of a token
    const float *a_lse, *b_lse;  // (rows,): ln of what each was divided by; a's may be -inf
    u16* y;                        // (rows, dim)
    long count;                    // of groups of 8 elements of y
    int dim;
};

extern "C" __global__ void __launch_bounds__(THREADS* ROWS)
merge_attention(const __grid_constant__ MergeArgs a) {
    let_next_kernel_start();
    const long i = long(blockIdx.x) * THREADS * ROWS + threadIdx.x;
    wait_for_previous_kernel();
    if (i >= a.count) return;
    const long row = i / (a.dim / 8);
    const float share = 1.f / (1.f + __expf(a.a_lse[row] - a.b_lse[row]));  // of b
    Eight e = load_eight(a.a + 8 * i);
    const Eight other = load_eight(a.b + 8 * i);
#pragma unroll
    for (int j = 0; j < 8; ++j) e.x[j] += (other.x[j] - e.x[j]) * share;
    store_eight(a.y + 8 * i, e);
}
