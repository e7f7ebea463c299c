// Rotary embedding of queries and keys (half-split form), and the write of keys and values to the
// cache, in one pass. A warp takes one head of one token; a lane the dimensions kEach * lane + e of
// either half. Rotating, quantising and packing are defined by ref.py and ref_cache.py.
#include "attention.cuh"

constexpr int kWarps = 8;
constexpr int kHalf = HEAD_DIM / 2;
constexpr int kEach = kHalf / kLanes;

struct Args {
    const u16 *q, *k, *v;  // (tokens, heads, HEAD_DIM), rows of a token q_stride ... apart
    const float *cos, *sin;  // (tokens, kHalf)
    const int* slots;        // (tokens,): page * PAGE + offset
    u16* q_out;              // (tokens, heads, HEAD_DIM)
    u8 *keys, *values, *key_scales, *value_scales;  // see Cache
    long q_stride, k_stride, v_stride;
    int tokens, heads, kv_heads;
};

struct Head { float x[2][kEach]; };  // of both halves

__device__ __forceinline__ Head load_head(const u16* from, int lane) {
    Head h;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < kEach; ++e)
            h.x[half][e] = activation(from[half * kHalf + kEach * lane + e]);
    return h;
}

__device__ __forceinline__ void rotate(Head& h, const Args& a, int token, int lane) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const long at = long(token) * kHalf + kEach * lane + e;
        const float cos = a.cos[at], sin = a.sin[at], x = h.x[0][e], y = h.x[1][e];
        h.x[0][e] = x * cos - y * sin;
        h.x[1][e] = y * cos + x * sin;
    }
}

// Normalised, over all HEAD_DIM elements: one butterfly for each bit of an element's number.
__device__ __forceinline__ void hadamard(Head& h, int lane) {
    const float norm = rsqrtf(float(HEAD_DIM));
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
        const float x = h.x[0][e], y = h.x[1][e];
        h.x[0][e] = (x + y) * norm;
        h.x[1][e] = (x - y) * norm;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if constexpr (kEach == 2) {
            const float x = h.x[half][0], y = h.x[half][1];
            h.x[half][0] = x + y;
            h.x[half][1] = x - y;
        }
#pragma unroll
        for (int e = 0; e < kEach; ++e)
#pragma unroll
            for (int bit = 1; bit < kLanes; bit *= 2) {
                const float other = __shfl_xor_sync(~0u, h.x[half][e], bit);
                h.x[half][e] = lane & bit ? other - h.x[half][e] : h.x[half][e] + other;
            }
    }
}

// A NaN stays one, unlike in fmaxf: it must reach the scale.
__device__ __forceinline__ float largest(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float largest_of_warp(float value) {
#pragma unroll
    for (int other = 16; other; other /= 2)
        value = largest(value, __shfl_xor_sync(~0u, value, other));
    return value;
}

__device__ __forceinline__ int nearest(float x, float step, float least, float most) {
    return step > 0.f ? __float2int_rn(fminf(fmaxf(x / step, least), most)) : 0;
}

// One scale a head, for codes of -most to most.
__device__ __forceinline__ u16 store_scale(const Head& h, float most, u8* scales, long row, int lane) {
    float high = 0.f;
#pragma unroll
    for (int e = 0; e < 2 * kEach; ++e) high = largest(high, fabsf(h.x[e / kEach][e % kEach]));
    const u16 scale = u16(half_pair(largest_of_warp(high) / most, 0.f));
    if (lane == 0) reinterpret_cast<u16*>(scales)[row] = scale;
    return scale;
}

__device__ __forceinline__ void store_int8(const Head& h, u8* codes, u8* scales, long row, int lane) {
    const u16 scale = store_scale(h, 127.f, scales, row, lane);
#pragma unroll
    for (int e = 0; e < 2 * kEach; ++e)
        codes[row * kRowBytes + e / kEach * kHalf + kEach * lane + e % kEach] =
            u8(nearest(h.x[e / kEach][e % kEach], from_half(scale), -127.f, 127.f));
}

// The codes of one half of a row, `bits` of each: the lanes that share a byte give them to the first.
template <int bits>
__device__ __forceinline__ void pack(const int (&code)[kEach], u8* to, int lane) {
    constexpr int kSharers = 8 / bits / kEach;
    int byte = code[0];
    if constexpr (kEach == 2) byte |= code[kEach - 1] << bits;
#pragma unroll
    for (int other = 1; other < kSharers; other *= 2)
        byte |= __shfl_down_sync(~0u, byte, other) << other * kEach * bits;
    if (lane % kSharers == 0) to[lane / kSharers] = u8(byte);
}

__device__ __forceinline__ void store_int6(const Head& h, u8* codes, u8* scales, long row, int lane) {
    const float step = from_half(store_scale(h, 31.f, scales, row, lane));
    u8* to = codes + row * kRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int nibble[kEach], crumb[kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
            const int code = nearest(h.x[half][e], step, -31.f, 31.f) + 32;
            nibble[e] = code & 15, crumb[e] = code >> 4;
        }
        pack<4>(nibble, to + half * (HEAD_DIM / 4), lane);
        pack<2>(crumb, to + kCrumbs + half * (HEAD_DIM / 8), lane);
    }
}

// A group is one half of 128 dimensions, or both halves of 64.
__device__ __forceinline__ void store_int4(const Head& h, u8* codes, u8* scales, long row, int lane) {
    float low[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        high[half] = largest(h.x[half][0], h.x[half][kEach - 1]);
        low[half] = -largest(-h.x[half][0], -h.x[half][kEach - 1]);
    }
    if constexpr (kGroups == 1) {
        high[0] = high[1] = largest(high[0], high[1]);
        low[0] = low[1] = -largest(-low[0], -low[1]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float most = largest_of_warp(high[half]), least = -largest_of_warp(-low[half]);
        const u32 affine = half_pair((most - least) / 15.f, least);
        const float step = from_half(u16(affine)), from = from_half(u16(affine >> 16));
        int code[kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) code[e] = nearest(h.x[half][e] - from, step, 0.f, 15.f);
        pack<4>(code, codes + row * kRowBytes + half * (kRowBytes / 2), lane);
        if (lane == 0 && half < kGroups)
            reinterpret_cast<u32*>(scales)[row * kGroups + half] = affine;
    }
}

__device__ __forceinline__ void store(const Head& h, u8* cache, u8* scales, long row, int lane) {
    if constexpr (KV == 8) {
        store_int8(h, cache, scales, row, lane);
    } else if constexpr (KV == 6) {
        store_int6(h, cache, scales, row, lane);
    } else if constexpr (KV == 4) {
        store_int4(h, cache, scales, row, lane);
    } else {
        u16* to = reinterpret_cast<u16*>(cache) + row * HEAD_DIM + kEach * lane;
#pragma unroll
        for (int e = 0; e < 2 * kEach; ++e)
            to[e / kEach * kHalf + e % kEach] = u16(operand_pair(h.x[e / kEach][e % kEach], 0.f));
    }
}

extern "C" __global__ void __launch_bounds__(kWarps* kLanes)
rope_store(const __grid_constant__ Args a) {
    let_next_kernel_start();
    const int lane = threadIdx.x % kLanes, per_token = a.heads + 2 * a.kv_heads;
    const long index = long(blockIdx.x) * kWarps + threadIdx.x / kLanes;
    const int token = int(index / per_token), head = int(index % per_token);
    wait_for_previous_kernel();
    if (token >= a.tokens) return;
    if (head < a.heads) {
        Head q = load_head(a.q + token * a.q_stride + head * HEAD_DIM, lane);
        rotate(q, a, token, lane);
        if constexpr (kCodes) hadamard(q, lane);
        u16* to = a.q_out + (long(token) * a.heads + head) * HEAD_DIM + kEach * lane;
#pragma unroll
        for (int e = 0; e < 2 * kEach; ++e)
            to[e / kEach * kHalf + e % kEach] = u16(activation_pair(q.x[e / kEach][e % kEach], 0.f));
        return;
    }
    const bool is_key = head < a.heads + a.kv_heads;
    const int kv_head = head - a.heads - (is_key ? 0 : a.kv_heads);
    const long slot = a.slots[token];
    const long row = (slot / PAGE * a.kv_heads + kv_head) * PAGE + slot % PAGE;
    if (is_key) {
        Head k = load_head(a.k + token * a.k_stride + kv_head * HEAD_DIM, lane);
        rotate(k, a, token, lane);
        if constexpr (kCodes) hadamard(k, lane);
        store(k, a.keys, a.key_scales, row, lane);
    } else {
        const Head v = load_head(a.v + token * a.v_stride + kv_head * HEAD_DIM, lane);
        store(v, a.values, a.value_scales, row, lane);
    }
}
