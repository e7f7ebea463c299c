// What the attention kernels share: numbers of the cache, tensor-core fragments, copies.
//
// Macros, set by the compiler call: KV 16 fp16 | 17 bf16 | 8 | 6 | 4 (kind of the cache), BF16 0|1
// (activations), HEAD_DIM 64|128, PAGE (slots of a page).
//
// Products run in the number format of a 16-bit cache, or in fp16 where the cache holds codes.
#pragma once

#include "numbers.cuh"

constexpr int kGroup = 64;                        // dimensions that share a step at 4 bits
constexpr int kGroups = HEAD_DIM / kGroup;
constexpr int kSteps = HEAD_DIM / 16;             // k16 products of a row
constexpr bool kCodes = KV < 16;                  // int8, int6 or int4: keys and values are codes
constexpr int kRowBytes = HEAD_DIM * (kCodes ? KV : 16) / 8;   // of a key or value
constexpr int kScaleBytes = !kCodes ? 0 : KV == 4 ? 4 * kGroups : 2;  // beside each of them
constexpr int kCrumbs = HEAD_DIM / 2;             // at 6 bits: where the upper two of a row begin

__device__ __forceinline__ u32 shared_address(const void* p) {
    return u32(__cvta_generic_to_shared(p));
}

// ---- numbers -------------------------------------------------------------------------------

// What the tensor cores multiply.
__device__ __forceinline__ u32 operand_pair(float low, float high) {
    return KV == 17 ? bf16_pair(low, high) : half_pair(low, high);
}
constexpr bool kSameFormat = (KV == 17) == (BF16 == 1);  // activations are operands as they are

__device__ __forceinline__ u32 subtract_halves(u32 a, u32 b) {
    u32 out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
    u32 out;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

__device__ __forceinline__ float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- codes to halves -----------------------------------------------------------------------

// 0x6400 | n is the half 1024 + n: masks place codes, arithmetic takes the 1024 off; all exact.
constexpr float kMagic = 1024.f;
__device__ __forceinline__ u32 place(u32 word, u32 mask, u32 onto = 0x64006400u) {
    u32 out;  // (word & mask) | onto in one instruction, which the compiler does not find
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(onto));
    return out;
}
__device__ __forceinline__ u32 low_nibbles(u32 word) {  // 1024 + n of bits 0-3 and 16-19
    return place(word, 0x000f000fu);
}
__device__ __forceinline__ u32 high_nibbles(u32 word) {  // 1024 + 16 n of bits 4-7 and 20-23
    return place(word, 0x00f000f0u);
}
__device__ __forceinline__ u32 plain_low(u32 nibbles) {
    return subtract_halves(nibbles, 0x64006400u);
}
__device__ __forceinline__ u32 plain_high(u32 nibbles) {
    return fma_halves(nibbles, 0x2c002c00u, 0xd400d400u);  // / 16 - 64
}
// Both nibbles of one byte of a word, the lower one first.
__device__ __forceinline__ u32 nibble_pair(u32 word, int byte) {
    const u32 twice = __byte_perm(word, 0, 0x4040 + 0x101 * byte);
    return fma_halves(place(twice, 0x00f0000fu), 0x2c003c00u, 0xd400e400u);
}
// The same at 6 bits, n of code n - 32: `crumbs` has the upper two bits where they belong, behind
// those of the nibbles.
__device__ __forceinline__ u32 low_sixes(u32 word, u32 crumbs) {  // 1024 + n
    return place(crumbs, 0x00300030u, low_nibbles(word));
}
__device__ __forceinline__ u32 high_sixes(u32 word, u32 crumbs) {  // 1024 + 16 n
    return place(crumbs, 0x03000300u, high_nibbles(word));
}
__device__ __forceinline__ u32 plain_low_sixes(u32 sixes) {
    return subtract_halves(sixes, 0x64206420u);
}
__device__ __forceinline__ u32 plain_high_sixes(u32 sixes) {
    return fma_halves(sixes, 0x2c002c00u, 0xd600d600u);  // / 16 - 96
}
// Elements 2 i and 2 i + 1 of eight.
__device__ __forceinline__ u32 six_pair(u32 word, u32 crumbs, int i) {
    const u32 twice = __byte_perm(word, 0, 0x4040 + 0x101 * i);
    const u32 apart = (crumbs >> 4 * i) * 0x00400010u;  // << 4 in the lower half, << 6 in the upper
    const u32 sixes = place(apart, 0x03000030u, place(twice, 0x00f0000fu));
    return fma_halves(sixes, 0x2c003c00u, 0xd600e420u);
}
// Bytes are signed; with the top bit turned over they are n + 128.
__device__ __forceinline__ u32 unsigned_bytes(u32 word) { return word ^ 0x80808080u; }
__device__ __forceinline__ u32 low_bytes(u32 word) {  // bytes 0 and 1 of unsigned_bytes
    return subtract_halves(__byte_perm(word, 0x64646464u, 0x4140), 0x64806480u);
}
__device__ __forceinline__ u32 high_bytes(u32 word) {  // bytes 2 and 3
    return subtract_halves(__byte_perm(word, 0x64646464u, 0x4342), 0x64806480u);
}

// Codes 8 piece .. 8 piece + 7 of a row to halves, their scale or (step, low) applied.
__device__ __forceinline__ uint4 widen(const u8* row, int piece, const u8* scale) {
    if constexpr (KV == 8) {
        const u32 step = *reinterpret_cast<const u16*>(scale) * 0x10001u;
        const uint2 v = *reinterpret_cast<const uint2*>(row + 8 * piece);
        const u32 x = unsigned_bytes(v.x), y = unsigned_bytes(v.y);
        return {multiply_halves(low_bytes(x), step), multiply_halves(high_bytes(x), step),
                multiply_halves(low_bytes(y), step), multiply_halves(high_bytes(y), step)};
    } else if constexpr (KV == 6) {
        const u32 step = *reinterpret_cast<const u16*>(scale) * 0x10001u;
        const u32 word = *reinterpret_cast<const u32*>(row + 4 * piece);
        const u32 crumbs = *reinterpret_cast<const u16*>(row + kCrumbs + 2 * piece);
        return {multiply_halves(six_pair(word, crumbs, 0), step),
                multiply_halves(six_pair(word, crumbs, 1), step),
                multiply_halves(six_pair(word, crumbs, 2), step),
                multiply_halves(six_pair(word, crumbs, 3), step)};
    } else {
        const u32 affine = *reinterpret_cast<const u32*>(scale);
        const u32 step = __byte_perm(affine, 0, 0x1010), low = __byte_perm(affine, 0, 0x3232);
        const u32 word = *reinterpret_cast<const u32*>(row + 4 * piece);
        return {fma_halves(nibble_pair(word, 0), step, low),
                fma_halves(nibble_pair(word, 1), step, low),
                fma_halves(nibble_pair(word, 2), step, low),
                fma_halves(nibble_pair(word, 3), step, low)};
    }
}

// ---- tensor cores --------------------------------------------------------------------------

struct Fragment { u32 reg[4]; };

// Four 8 x 8 matrices of 16-bit numbers; lanes 8 i .. 8 i + 7 give the rows of matrix i.
__device__ __forceinline__ Fragment load_matrices(u32 row) {
    Fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.reg[0]), "=r"(f.reg[1]), "=r"(f.reg[2]), "=r"(f.reg[3]) : "r"(row));
    return f;
}
__device__ __forceinline__ Fragment load_transposed(u32 row) {
    Fragment f;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.reg[0]), "=r"(f.reg[1]), "=r"(f.reg[2]), "=r"(f.reg[3]) : "r"(row));
    return f;
}
__device__ __forceinline__ u32 transpose(u32 pair) {
    u32 out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
    return out;
}

// c (16 x 8) += a (16 x 16) b (16 x 8)
__device__ __forceinline__ void multiply(float (&c)[4], const Fragment& a, u32 b0, u32 b1) {
#if KV == 17
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b0), "r"(b1));
}

// ---- copies --------------------------------------------------------------------------------

// 16 bytes to shared memory, zeros where not `valid`; the address must be one that can be read.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Until at most `pending` of the committed groups are on their way.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- one sequence of the batch ---------------------------------------------------------------

struct Cache {
    const u8 *keys, *values;               // (pages, kv_heads, PAGE) rows of kRowBytes
    const u8 *key_scales, *value_scales;   // likewise of kScaleBytes, or null
    const int* pages;                      // (sequences, page_stride)
    const int* starts;                     // (sequences + 1,)
    const int* lengths;                    // (sequences,)
    int page_stride, kv_heads;
};

// The row of the cache in which the key at `position` stands.
__device__ __forceinline__ long row_of(const Cache& cache, int sequence, int head, int position) {
    const long page = __ldg(cache.pages + long(sequence) * cache.page_stride + position / PAGE);
    return (page * cache.kv_heads + head) * PAGE + position % PAGE;
}
