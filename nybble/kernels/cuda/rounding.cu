// A few rows of a matrix rounded one after another, each at what the errors of those before make of
// it: the part of GPTQ that no product can do. See round_with_feedback in gptq/solver.py.
//
// Macros: DOUBLE 0|1 (the type of all numbers), MOST (rows of a call, at most), THREADS (of a block;
// one an output).

#if DOUBLE
typedef double Real;
#else
typedef float Real;
#endif

struct Args {
    const Real* target;    // (rows, outputs): what to round, without the errors of these rows
    const Real* weight;    // (rows, outputs)
    const Real* feedback;  // (rows, rows): its upper triangle is used
    const Real *scales, *zeros;  // (rows, outputs)
    Real *errors, *codes;  // (rows, outputs): errors hold the old ones
    int rows, outputs;
    Real top;
};

extern "C" __global__ void __launch_bounds__(THREADS) round_rows(const __grid_constant__ Args a) {
    __shared__ Real feedback[MOST][MOST];
    for (int i = threadIdx.x; i < a.rows * a.rows; i += THREADS)
        feedback[i / a.rows][i % a.rows] = a.feedback[i];
    __syncthreads();
    const int output = blockIdx.x * THREADS + threadIdx.x;
    if (output >= a.outputs) return;
    Real change[MOST];  // of the errors of the rows before
#pragma unroll
    for (int k = 0; k < MOST; ++k) {
        if (k >= a.rows) break;
        const long at = long(k) * a.outputs + output;
        Real value = a.target[at];
#pragma unroll
        for (int j = 0; j < k; ++j) value += feedback[j][k] * change[j];
        const Real scale = a.scales[at], zero = a.zeros[at];
        Real code = rint(value / scale + zero);
        code = code < Real(0) ? Real(0) : code > a.top ? a.top : code;
        const Real error = a.weight[at] - scale * (code - zero);
        change[k] = error - a.errors[at];
        a.errors[at] = error, a.codes[at] = code;
    }
}
