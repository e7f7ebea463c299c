// The ceiling that the other kernels are measured against: read everything once, write nothing.
typedef unsigned int u32;

struct Args { const uint4* from; u32* to; long count; };  // count of 16-byte vectors

extern "C" __global__ void __launch_bounds__(512) read_only(const __grid_constant__ Args a) {
    u32 seen = 0;
    const long stride = long(gridDim.x) * 512 * 4;
    for (long i = blockIdx.x * 2048l + threadIdx.x; i + 1536 < a.count; i += stride) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(v[j].x), "=r"(v[j].y), "=r"(v[j].z), "=r"(v[j].w)
                         : "l"(a.from + i + j * 512));
#pragma unroll
        for (int j = 0; j < 4; ++j) seen ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (seen == 0x9e3779b9u) *a.to = seen;  // never in practice; keeps the loads alive
}
