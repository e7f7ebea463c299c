// What surrounds the products: dequantise a slab of a matrix for cuBLAS, gather inputs.
#include "arranged.cuh"
#include "fragment.cuh"

constexpr int kGroups = GROUP ? kPiece / GROUP : 1;  // groups in a piece

struct DequantizeArgs {
    const uint4* words;
    const void* scales;
    const u16* zeros;
    u16* dense;  // (outputs of the slab, k), inputs contiguous
    int first_tile, pieces, groups, slab_tiles;
    u32 pieces_per_group;  // as its inverse, for divide()
};

// One warp a piece of a tile. Rows are written in matrix order: where gate and up rows share
// tiles (PAIRED), the slab's gate rows come first, then its up rows.
extern "C" __global__ void __launch_bounds__(256)
dequantize(const __grid_constant__ DequantizeArgs a) {
    const int lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
    const long unit = blockIdx.x * 8l + threadIdx.x / kLanes;
    let_next_kernel_start();
    if (unit >= long(a.slab_tiles) * a.pieces) return;
    const int local = unit / a.pieces, piece = unit % a.pieces;
    const long tile = a.first_tile + local;
    const Tile from = tile_of(a, tile, a.pieces, lane);
    const Weights w = from.piece(piece);

    GroupBits bits[kGroups];
    const int group = GROUP ? piece * kGroups : divide(piece, a.pieces_per_group);
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
        bits[i] = from.group(group + i);

    u32 low[kSteps * 2], high[kSteps * 2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        const GroupBits& of = bits[s * kGroups / kSteps];
        const Fragment f = unpack(w, s, of.offset());
        const Scale scale = widen(of.scale);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 l = f.reg[2 * i], h = f.reg[2 * i + 1];
            low[2 * s + i] = pair(to_float(u16(l)) * scale.low, to_float(u16(l >> 16)) * scale.low);
            high[2 * s + i] = pair(to_float(u16(h)) * scale.high, to_float(u16(h >> 16)) * scale.high);
        }
    }
    wait_for_previous_kernel();  // it may still read the slab that is overwritten here
    const int row_low = PAIRED ? local * 8 + g : local * 16 + g;
    const int row_high = PAIRED ? row_low + a.slab_tiles * 8 : row_low + 8;
    const size_t k = size_t(a.pieces) * kPiece;
    u16* to = a.dense + piece * kPiece;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u16* column = to + input_of(t, 2 * i);
        *reinterpret_cast<uint4*>(column + row_low * k) =
            make_uint4(low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3]);
        *reinterpret_cast<uint4*>(column + row_high * k) =
            make_uint4(high[4 * i], high[4 * i + 1], high[4 * i + 2], high[4 * i + 3]);
    }
}

// Grid: (blocks of 64 tokens, pieces); a thread takes eight inputs of a token.
struct ArrangeArgs {
    const u16* x;  // (tokens, x_stride)
    u16* out;      // see arranged.cuh
    int x_stride, tokens, rows;
};

extern "C" __global__ void __launch_bounds__(256) arrange(const __grid_constant__ ArrangeArgs a) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int half = blockIdx.y * 2 + threadIdx.x / 4 % 2, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = blockIdx.x * 64 + i * 32 + threadIdx.x / 8;
        const u16* from = a.x + size_t(min(token, a.tokens - 1)) * a.x_stride + half * 32 + t * 8;
        const uint4 chunk = chunk_of_inputs(*reinterpret_cast<const uint4*>(from));
        if (token < a.tokens) *arranged_chunk(a.out, a.rows, token, half, t) = chunk;
    }
}

// Grids of these two: (tokens, blocks of 256 columns).
struct GatherArgs {
    const u16* x;      // (tokens, x_stride)
    const int* index;  // (k,): which input, or -1 for a zero
    u16* out;          // (tokens, k)
    int x_stride, k;
};

extern "C" __global__ void __launch_bounds__(256) gather(const __grid_constant__ GatherArgs a) {
    let_next_kernel_start();
    const int k = blockIdx.y * 256 + threadIdx.x;
    const int from = k < a.k ? a.index[k] : -1;
    wait_for_previous_kernel();
    if (k >= a.k) return;
    const u16* x = a.x + size_t(blockIdx.x) * a.x_stride;
    a.out[size_t(blockIdx.x) * a.k + k] = from < 0 ? u16(0) : x[from];
}

struct SiluArgs {
    const u16* gate_up;   // (tokens, 2 * width), gate first; width a multiple of 8
    const u16* residual;  // like y, or null
    u16* y;               // (tokens, y_stride)
    int width, columns, y_stride;  // columns: of width, how many y has
};

__device__ __forceinline__ float number(const uint4& v, int i) {
    const u32 word = i < 4 ? (i < 2 ? v.x : v.y) : (i < 6 ? v.z : v.w);
    return to_float(u16(word >> 16 * (i % 2)));
}

// A thread takes eight columns. Grid: (tokens, blocks of 2048 columns).
extern "C" __global__ void __launch_bounds__(256) silu_mul(const __grid_constant__ SiluArgs a) {
    let_next_kernel_start();
    wait_for_previous_kernel();
    const int column = (blockIdx.y * 256 + threadIdx.x) * 8;
    if (column >= a.columns) return;
    const u16* row = a.gate_up + size_t(blockIdx.x) * 2 * a.width + column;
    const uint4 gate = *reinterpret_cast<const uint4*>(row);
    const uint4 up = *reinterpret_cast<const uint4*>(row + a.width);
    const size_t at = size_t(blockIdx.x) * a.y_stride + column;
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        value[i] = silu_times(number(gate, i), number(up, i));
        if (a.residual && column + i < a.columns) value[i] += to_float(a.residual[at + i]);
    }
    if (a.y_stride % 8 == 0 && column + 8 <= a.columns) {
        *reinterpret_cast<uint4*>(a.y + at) = make_uint4(
            pair(value[0], value[1]), pair(value[2], value[3]),
            pair(value[4], value[5]), pair(value[6], value[7]));
    } else {
        for (int i = 0; i < 8 && column + i < a.columns; ++i) a.y[at + i] = from_float(value[i]);
    }
}
