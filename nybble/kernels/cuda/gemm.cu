// y = x W for few tokens: bound by the memory that W is read from.
//
// Weights are the A operand of mma.m16n8k16 (16 outputs x 16 inputs), tokens the B operand
// (8 columns). A block owns BANDS * TILES tiles of 16 outputs and COLUMNS * 8 tokens; its warps
// split K in SLICES and add up through shared memory. A chunk is what a warp takes at a time,
// PIECES * 64 inputs; DEPTH chunks of weights are on their way while one is multiplied.
#include "fragment.cuh"

constexpr int kChunk = PIECES * kPiece;
constexpr int kGroups = GROUP ? kChunk / GROUP : 1;     // groups in a chunk
constexpr int kGroupSteps = PIECES * kSteps / kGroups;  // k16 products in a group
constexpr int kWarps = SLICES * BANDS;
constexpr int kRow = kLanes + 1;  // one float of padding: the reduction reads without conflicts

struct Args {
    const uint4* words;    // [tiles][pieces][kVectors][32 lanes]
    const void* scales;    // [tiles][groups][8] pairs (rows g, g + 8)
    const u16* zeros;      // the same in pairs of bytes, or null
    const u16* x;          // (tokens, x_stride), inputs contiguous
    const u16* bias;       // (outputs,) or null
    const u16* residual;   // like y, or null
    u16* y;                // (tokens, outputs)
    int tokens, x_stride, outputs, tiles, chunks, groups;
    u32 chunks_per_group;  // as its inverse, for divide()
};

struct Stage {
    Weights weights[TILES][PIECES];
    GroupBits groups[TILES][kGroups];
};

struct Inputs { uint4 half[COLUMNS][PIECES][2]; };

__device__ __forceinline__ void multiply(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_stage(Stage& s, const Args& a, const Tile (&tiles)[TILES],
                                           int chunk) {
    const int first = GROUP ? chunk * kGroups : divide(chunk, a.chunks_per_group);
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
        for (int p = 0; p < PIECES; ++p) s.weights[r][p] = tiles[r].piece(chunk * PIECES + p);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) s.groups[r][i] = tiles[r].group(first + i);
    }
}

__device__ __forceinline__ void load_inputs(Inputs& in, const u16* const (&x)[COLUMNS], int chunk) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
        for (int p = 0; p < PIECES; ++p) {
            const uint4* from =
                reinterpret_cast<const uint4*>(x[c] + size_t(chunk) * kChunk + p * kPiece);
            in.half[c][p][0] = from[0];
            in.half[c][p][1] = from[4];
        }
}

__device__ __forceinline__ void accumulate(float (&sum)[TILES][COLUMNS][4], const Stage& s,
                                           const Inputs& in) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        float part[TILES][COLUMNS][4] = {};
#pragma unroll
        for (int j = 0; j < kGroupSteps; ++j) {
            const int step = (i * kGroupSteps + j) % kSteps, p = (i * kGroupSteps + j) / kSteps;
#pragma unroll
            for (int r = 0; r < TILES; ++r) {
                const Fragment f = unpack(s.weights[r][p], step, s.groups[r][i].offset());
#pragma unroll
                for (int c = 0; c < COLUMNS; ++c) {
                    const uint4& v = in.half[c][p][step >> 1];
                    multiply(part[r][c], f, step & 1 ? v.z : v.x, step & 1 ? v.w : v.y);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < TILES; ++r) {
            const Scale scale = widen(s.groups[r][i].scale);
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sum[r][c][e] += (e < 2 ? scale.low : scale.high) * part[r][c][e];
        }
    }
}

__device__ __forceinline__ void store(const Args& a, float value, int token, int output) {
    const size_t at = size_t(token) * a.outputs + output;
    if (a.residual) value += to_float(a.residual[at]);
    a.y[at] = from_float(value);
}

// Adds up the slices of one tile a band. part: [BANDS][SLICES][COLUMNS * 4][kRow].
__device__ __forceinline__ void write_tile(const Args& a, const float* part, int tile0, int token0) {
    constexpr int kRows = PAIRED ? 8 : 16;  // outputs of a tile
    for (int i = threadIdx.x; i < BANDS * COLUMNS * 8 * kRows; i += kWarps * kLanes) {
        const int row = i % kRows, column = i / kRows % (COLUMNS * 8);
        const int band = i / (kRows * COLUMNS * 8);
        const int tile = tile0 + band * TILES, token = token0 + column;
        const int output = tile * kRows + row;
        if (tile >= a.tiles || token >= a.tokens || output >= a.outputs) continue;
        const int element = column / 8 * 4 + column % 2, lane = row % 8 * 4 + column % 8 / 2;
        float low = 0.f, high = 0.f;
        for (int s = 0; s < SLICES; ++s) {
            const float* slice = part + (band * SLICES + s) * COLUMNS * 4 * kRow + lane;
            low += slice[element * kRow];
            high += slice[(element + 2) * kRow];
        }
        if (PAIRED) {
            if (a.bias) low += to_float(a.bias[output]), high += to_float(a.bias[a.outputs + output]);
            store(a, silu_times(low, high), token, output);
        } else {
            float value = row < 8 ? low : high;
            if (a.bias) value += to_float(a.bias[output]);
            store(a, value, token, output);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kWarps* kLanes, MIN_BLOCKS)
gemm(const __grid_constant__ Args a) {
    __shared__ float part[BANDS * SLICES * COLUMNS * 4 * kRow];
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const int slice = warp % SLICES, band = warp / SLICES;
    const int tile0 = blockIdx.y * BANDS * TILES, token0 = blockIdx.x * COLUMNS * 8;

    let_next_kernel_start();
    Tile tiles[TILES];
#pragma unroll
    for (int r = 0; r < TILES; ++r)
        tiles[r] = tile_of(a, min(tile0 + band * TILES + r, a.tiles - 1), a.chunks * PIECES, lane);
    Stage stage[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; ++d)
        if (slice + d * SLICES < a.chunks) load_stage(stage[d], a, tiles, slice + d * SLICES);
    wait_for_previous_kernel();

    const u16* x[COLUMNS];  // columns beyond the last token repeat it and are not stored
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c)
        x[c] = a.x + size_t(min(token0 + c * 8 + lane / 4, a.tokens - 1)) * a.x_stride +
               input_of(lane % 4, 0);

    float sum[TILES][COLUMNS][4] = {};
    for (int base = slice; base < a.chunks; base += DEPTH * SLICES) {
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int chunk = base + d * SLICES, next = chunk + DEPTH * SLICES;
            if (chunk >= a.chunks) break;
            Inputs inputs;
            load_inputs(inputs, x, chunk);
            accumulate(sum, stage[d], inputs);
            if (next < a.chunks) load_stage(stage[d], a, tiles, next);
        }
    }

#pragma unroll
    for (int r = 0; r < TILES; ++r) {
        if (r) __syncthreads();
#pragma unroll
        for (int e = 0; e < COLUMNS * 4; ++e)
            part[(warp * COLUMNS * 4 + e) * kRow + lane] = sum[r][e / 4][e % 4];
        __syncthreads();
        write_tile(a, part, tile0 + r, token0);
    }
}
