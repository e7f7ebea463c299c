// wgmma of Hopper: D (64 outputs x TOKENS) += A (64 x 16, registers) * B (16 x TOKENS, shared).
#pragma once
#include "fragment.cuh"

// B lies in shared memory as rows of 64 inputs (128 bytes), one a token, in atoms of 8 rows whose
// 16-byte chunks are exchanged (chunk ^ row % 8): "K-major, 128-byte swizzle". PTX ISA, "Matrix
// descriptor". A step of 16 inputs moves the start by 32 bytes.
constexpr int kRowBytes = kPiece * 2;

__device__ __forceinline__ unsigned long long descriptor(u32 shared_address) {
    const unsigned long long start = (shared_address & 0x3ffff) >> 4;
    const unsigned long long atom = 8 * kRowBytes >> 4, leading = 1, swizzle128 = 1;
    return start | leading << 16 | atom << 32 | swizzle128 << 62;
}

__device__ __forceinline__ void wgmma_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `pending` of the committed groups run.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
#if BF16
#define NYBBLE_TYPES ".f32.bf16.bf16 "
#else
#define NYBBLE_TYPES ".f32.f16.f16 "
#endif
#define NYBBLE_8(d, i)                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]),                 \
        "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define NYBBLE_16(d, i) NYBBLE_8(d, i), NYBBLE_8(d, i + 8)
#define NYBBLE_A(a) "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3])
#define NYBBLE_NAMES_16                                                                        \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NYBBLE_NAMES_24 NYBBLE_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NYBBLE_NAMES_32 NYBBLE_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NYBBLE_NAMES_48                                                                        \
    NYBBLE_NAMES_32                                                                            \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NYBBLE_NAMES_64                                                                        \
    NYBBLE_NAMES_48                                                                            \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NYBBLE_NAMES_96                                                                        \
    NYBBLE_NAMES_64                                                                            \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"         \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"

__device__ __forceinline__ void wgmma(float (&d)[TOKENS / 2], const Fragment& a,
                                      unsigned long long b) {
#if TOKENS == 32
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16" NYBBLE_TYPES NYBBLE_NAMES_16
                 "}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
                 : NYBBLE_16(d, 0) : NYBBLE_A(a), "l"(b));
#elif TOKENS == 48
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16" NYBBLE_TYPES NYBBLE_NAMES_24
                 "}, {%24, %25, %26, %27}, %28, 1, 1, 1, 0;"
                 : NYBBLE_16(d, 0), NYBBLE_8(d, 16) : NYBBLE_A(a), "l"(b));
#elif TOKENS == 64
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" NYBBLE_TYPES NYBBLE_NAMES_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
                 : NYBBLE_16(d, 0), NYBBLE_16(d, 16) : NYBBLE_A(a), "l"(b));
#elif TOKENS == 96
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16" NYBBLE_TYPES NYBBLE_NAMES_48
                 "}, {%48, %49, %50, %51}, %52, 1, 1, 1, 0;"
                 : NYBBLE_16(d, 0), NYBBLE_16(d, 16), NYBBLE_16(d, 32) : NYBBLE_A(a), "l"(b));
#elif TOKENS == 128
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" NYBBLE_TYPES NYBBLE_NAMES_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
                 : NYBBLE_16(d, 0), NYBBLE_16(d, 16), NYBBLE_16(d, 32), NYBBLE_16(d, 48)
                 : NYBBLE_A(a), "l"(b));
#elif TOKENS == 192
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16" NYBBLE_TYPES NYBBLE_NAMES_96
                 "}, {%96, %97, %98, %99}, %100, 1, 1, 1, 0;"
                 : NYBBLE_16(d, 0), NYBBLE_16(d, 16), NYBBLE_16(d, 32), NYBBLE_16(d, 48),
                   NYBBLE_16(d, 64), NYBBLE_16(d, 80)
                 : NYBBLE_A(a), "l"(b));
#else
#error "TOKENS must be 32, 48, 64, 96, 128 or 192"
#endif
}
