// Activations in the order in which gemm_hopper reads them: [pieces][rows][64 inputs], a row one token,
// rows padded. Of each half of a piece, the 16-byte chunk c = 2 (s % 2) + j holds, from the lanes
// t = 0 .. 3, the pair j of a k16 step s: inputs 8 t + 2 c, 8 t + 2 c + 1. A row's chunks are exchanged
// as wgmma's 128-byte swizzle wants it.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

// Where chunk c of a token's inputs 32 * half .. 32 * half + 31 lies.
__device__ __forceinline__ uint4* arranged_chunk(u16* out, int rows, int token, int half, int c) {
    uint4* row = reinterpret_cast<uint4*>(out) + (size_t(half / 2) * rows + token) * 8;
    return row + ((half % 2 * 4 + c) ^ token % 8);
}

// Each of four neighbouring lanes has eight inputs in a row, and gets a chunk of these 32: a
// transposition of four words by four lanes, by all lanes of a warp.
__device__ __forceinline__ uint4 chunk_of_inputs(uint4 v) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const u32 first = __shfl_xor_sync(~0u, odd ? v.x : v.y, 1);
    const u32 second = __shfl_xor_sync(~0u, odd ? v.z : v.w, 1);
    v = odd ? make_uint4(first, v.y, second, v.w) : make_uint4(v.x, first, v.z, second);
    const u32 third = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2);
    const u32 fourth = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
    return upper ? make_uint4(third, fourth, v.z, v.w) : make_uint4(v.x, v.y, third, fourth);
}
