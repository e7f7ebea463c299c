// Activations as floats and back, and dependent launch: for every kernel beside the matrices.
//
// Macro, set by the compiler call: BF16 0|1 (activations).
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int kLanes = 32;
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float from_half(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}
__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float(u32(bits) << 16); }

__device__ __forceinline__ u32 half_pair(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ float activation(u16 bits) {
    return BF16 ? from_bf16(bits) : from_half(bits);
}
__device__ __forceinline__ u32 activation_pair(float low, float high) {
    return BF16 ? bf16_pair(low, high) : half_pair(low, high);
}

// ---- sixteen bytes of activations ------------------------------------------------------------

struct Eight { float x[8]; };

__device__ __forceinline__ Eight load_eight(const u16* from) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    const u32 word[4] = {v.x, v.y, v.z, v.w};
    Eight e;
#pragma unroll
    for (int i = 0; i < 8; ++i) e.x[i] = activation(u16(word[i / 2] >> 16 * (i % 2)));
    return e;
}
__device__ __forceinline__ uint4 packed_eight(const Eight& e) {
    return {activation_pair(e.x[0], e.x[1]), activation_pair(e.x[2], e.x[3]),
            activation_pair(e.x[4], e.x[5]), activation_pair(e.x[6], e.x[7])};
}
__device__ __forceinline__ void store_eight(u16* to, const Eight& e) {
    *reinterpret_cast<uint4*>(to) = packed_eight(e);
}

// ---- dependent launch (a no-op before compute capability 9.0) --------------------------------

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
