// What a row of attention sees, and what it leaves beside its output: for the three kernels.
//
// Macros beside those of attention.cuh: PARTIAL 0|1 (also write the logarithms of the sums),
// CLOSED 0|1 (with PARTIAL: a row sees only the pages before its own).
#pragma once

#include "attention.cuh"

static_assert(PARTIAL || !CLOSED, "attention over the closed pages is partial");

// The last key that the row at `position` sees; -1 where it sees none.
__device__ __forceinline__ int last_key(int position) {
    return CLOSED ? position / PAGE * PAGE - 1 : position;
}

// Where a maximum begins: finite if a row may see no key of a tile, as -inf - -inf is no number.
__device__ __forceinline__ float least_maximum() { return CLOSED ? -3e38f : -infinity(); }

// ln(weight * 2^most)
__device__ __forceinline__ float natural_log(float most, float weight) {
    constexpr float kLn2 = 0.693147181f;
    return kLn2 * (most + __log2f(weight));
}
