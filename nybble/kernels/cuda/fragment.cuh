// Codes of 4 or 8 bits as fp16 or bf16 pairs, in the register order of mma.m16n8k16.
//
// Macros, set by the compiler call: BITS 4|8, BF16 0|1 (activations), SCALE 16 fp16 | 17 bf16 |
// 32 fp32, ASYM 0|1, GROUP 32|64|128 or 0 (a multiple of a chunk, known at run time only).
//
// Lane (g, t) = (lane / 4, lane % 4) holds rows g and g + 8 of a 16-row tile and, of each piece
// of 64 inputs, k = 32 (s / 2) + 8 t + 4 (s % 2) + {0, 1, 2, 3} in step s: two steps take 16 bytes
// of activations in a row, and four lanes 64. Steps 2 i and 2 i + 1 stay inside a group of 32.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;

constexpr int kPiece = 64;                  // inputs of a tile that a warp loads at once
constexpr int kSteps = 4;                   // k16 products of a piece
constexpr int kVectors = BITS / 4;          // 16-byte loads of a lane for a piece
constexpr int kLanes = 32;

struct Weights { uint4 vector[kVectors]; };  // one piece of one tile, one lane's part
struct Fragment { u32 reg[4]; };             // (g, k01), (g + 8, k01), (g, k23), (g + 8, k23)

__device__ __forceinline__ int input_of(int t, int step) {
    return 32 * (step / 2) + 8 * t + 4 * (step % 2);
}

// ---- memory --------------------------------------------------------------------------------

// Weights are read once: they must not push the activations out of L1. Volatile, so that these
// loads stay where they are written, ahead of the wait for the kernel before.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

// ---- numbers -------------------------------------------------------------------------------

__device__ __forceinline__ float from_half(u16 bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}
__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float(u32(bits) << 16); }

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 out;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
#endif
    return out;
}

#if BF16
__device__ __forceinline__ float to_float(u16 bits) { return from_bf16(bits); }
#else
__device__ __forceinline__ float to_float(u16 bits) { return from_half(bits); }
#endif
__device__ __forceinline__ u16 from_float(float f) { return u16(pair(f, 0.f)); }

__device__ __forceinline__ float silu_times(float gate, float up) {
    return gate / (1.f + __expf(-gate)) * up;
}

__device__ __forceinline__ u32 subtract(u32 a, u32 b) {
    u32 out;
#if BF16
    // Compute capability 8.0 has no subtraction of bf16 pairs: b * -1 + a.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(b), "r"(0xbf80bf80u), "r"(a));
#else
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
#endif
    return out;
}

__device__ __forceinline__ u32 both(u32 bits16) { return bits16 * 0x10001u; }

// (a & mask) | bits, one lop3.
template <u32 mask, u32 bits>
__device__ __forceinline__ u32 stamp(u32 a) {
    u32 out;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "n"(mask), "n"(bits));
    return out;
}

// ---- scales and zero points ----------------------------------------------------------------

struct Scale { float low, high; };  // of rows g and g + 8

#if SCALE == 32
typedef float2 ScaleBits;
__device__ __forceinline__ Scale widen(ScaleBits b) { return {b.x, b.y}; }
#else
typedef u32 ScaleBits;
__device__ __forceinline__ Scale widen(ScaleBits b) {
#if SCALE == 17
    return {from_bf16(u16(b)), from_bf16(u16(b >> 16))};
#else
    return {from_half(u16(b)), from_half(u16(b >> 16))};
#endif
}
#endif

// What is subtracted from the stamped codes of rows g and g + 8.
struct Offset { u32 low, high; };

#if BF16 && BITS == 8
// bf16 has 8 significant bits, one too few for 128 + code. The code's top bit moves the number
// that is subtracted instead (256 and 128 differ in just that bit): code - 128, exactly.
__device__ __forceinline__ u32 centred(u32 w) {
    const u32 top = 0x43804380u ^ (w & 0x00800080u);
    return subtract(stamp<0x007f007f, 0x43004300>(w), top);
}
#endif

__device__ __forceinline__ Offset offset_of(u32 low, u32 high) {
#if BITS == 4 && !BF16
    // Row g's codes carry 1024, row g + 8's, sixteen times as large, become 64 + code.
    return {both(0x6400u + low), both(0xd400u + 16u * high)};
#elif BITS == 8 && !BF16
    return {both(0x6400u + low), both(0x6400u + high)};
#elif BITS == 4
    return {both(0x4300u + low), both(0x4300u + high)};
#else
    return {centred(both(low)), centred(both(high))};
#endif
}

// Steps 2 * i and 2 * i + 1 of a piece stand in vector i where codes have 8 bits, in one where
// they have 4.
__device__ __forceinline__ Fragment unpack(const Weights& w, int step, Offset z) {
    Fragment f;
#if BITS == 4
    const uint4& v = w.vector[0];
    const u32 word = step == 0 ? v.x : step == 1 ? v.y : step == 2 ? v.z : v.w;
#if BF16
    f.reg[0] = subtract(stamp<0x000f000f, 0x43004300>(word), z.low);
    f.reg[1] = subtract(stamp<0x000f000f, 0x43004300>(word >> 4), z.high);
    f.reg[2] = subtract(stamp<0x000f000f, 0x43004300>(word >> 8), z.low);
    f.reg[3] = subtract(stamp<0x000f000f, 0x43004300>(word >> 12), z.high);
#else
    const u32 upper = word >> 8;
    const u32 sixteenth = 0x2c002c00u;
    f.reg[0] = subtract(stamp<0x000f000f, 0x64006400>(word), z.low);
    f.reg[2] = subtract(stamp<0x000f000f, 0x64006400>(upper), z.low);
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(f.reg[1])
        : "r"(stamp<0x00f000f0, 0x64006400>(word)), "r"(sixteenth), "r"(z.high));
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(f.reg[3])
        : "r"(stamp<0x00f000f0, 0x64006400>(upper)), "r"(sixteenth), "r"(z.high));
#endif
#else
    const uint4& v = w.vector[step >> 1];
    const u32 word[2] = {step & 1 ? v.z : v.x, step & 1 ? v.w : v.y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#if BF16
        f.reg[2 * i] = centred(word[i]);
        f.reg[2 * i + 1] = centred(word[i] >> 8);
        if (ASYM) {
            f.reg[2 * i] = subtract(f.reg[2 * i], z.low);
            f.reg[2 * i + 1] = subtract(f.reg[2 * i + 1], z.high);
        }
#else
        f.reg[2 * i] = subtract(stamp<0x00ff00ff, 0x64006400>(word[i]), z.low);
        f.reg[2 * i + 1] = subtract(stamp<0x00ff00ff, 0x64006400>(word[i] >> 8), z.high);
#endif
    }
#endif
    return f;
}

// n / d for n < 2^31 / d, where inverse = 2^31 / d + 1: the group of a chunk, without a division.
__device__ __forceinline__ int divide(int n, u32 inverse) {
    return int((unsigned long long)n * inverse >> 31);
}

// One group's scale and zero point of rows g and g + 8, at (tile * groups + group) * 8 + g.
struct GroupBits {
    ScaleBits scale;
    u32 zeros;

    __device__ __forceinline__ Offset offset() const {
        const u32 middle = 1u << (BITS - 1);
        return ASYM ? offset_of(zeros & 0xffu, zeros >> 8) : offset_of(middle, middle);
    }
};

// One lane's view of a tile. Offsets inside a tile fit 32 bits, which saves instructions.
struct Tile {
    const uint4* words;
    const ScaleBits* scales;
    const u16* zeros;

    __device__ __forceinline__ Weights piece(int index) const {
        Weights w;
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            w.vector[i] = load_once(words + u32(index * kVectors + i) * kLanes);
        return w;
    }
    __device__ __forceinline__ GroupBits group(int index) const {
        GroupBits bits;
        bits.scale = __ldg(scales + u32(index) * 8);
        if (ASYM) bits.zeros = __ldg(zeros + u32(index) * 8);
        return bits;
    }
};

template <class Args>
__device__ __forceinline__ Tile tile_of(const Args& a, long tile, int pieces, int lane) {
    const long groups = tile * a.groups * 8 + lane / 4;
    return {a.words + tile * pieces * (kVectors * kLanes) + lane,
            reinterpret_cast<const ScaleBits*>(a.scales) + groups, a.zeros + groups};
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
