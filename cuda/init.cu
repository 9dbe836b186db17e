// init: a rows x cols matrix of (2u - 1) * row_gain * col_gain, u from cuRAND's Philox4x32-10.
//
// Element i is lane i % 4 of counter i / 4, so the values depend on neither the grid nor the device: NumPy makes the
// same bits (awq_pycuda/philox.py). Each product rounds once, in this order, on both sides. A thread makes the four
// numbers of a counter and stores them as one, QUADS of them one after another, so that what all counters have in
// common, the keys of the rounds, is worked out once; a block's stores lie side by side.
#include <curand_kernel.h>

#include "common.cuh"

#if !defined(THREADS) || !defined(QUADS)
#error "threads of a block and what each makes at a time must be given: -DTHREADS=256 -DQUADS=4"
#endif
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
static_assert(QUADS >= 1, "a thread makes QUADS times four numbers at a time");

struct Gains {
    const float *of_row, *of_col;
    Size cols;

    // Of the elements from `first` on that are within the matrix.
    __device__ __forceinline__ void apply(float (&value)[4], Size first, Size count) const {
        if (of_row == nullptr && of_col == nullptr) return;
        Size row = first / cols, col = first % cols;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            if (first + lane == count) return;
            if (of_row != nullptr) value[lane] *= of_row[row];
            if (of_col != nullptr) value[lane] *= of_col[col];
            if (++col == cols) {
                col = 0;
                ++row;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) init(float* __restrict__ out, Size rows, Size cols, Size seed,
                                                        Size subsequence, const float* __restrict__ row_gain,
                                                        const float* __restrict__ col_gain) {
    in_turn();
    const Size count = rows * cols;
    const Gains gains{row_gain, col_gain, cols};
    for (Size block = blockIdx.x; block * (4 * QUADS * THREADS) < count; block += gridDim.x) {
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            const Size quad = (block * QUADS + i) * THREADS + threadIdx.x, first = 4 * quad;
            if (first >= count) break;
            curandStatePhilox4_32_10_t state;
            curand_init(seed, subsequence, first, &state);
            const float4 u = curand_uniform4(&state);
            float value[4] = {2.0f * u.x - 1.0f, 2.0f * u.y - 1.0f, 2.0f * u.z - 1.0f, 2.0f * u.w - 1.0f};
            gains.apply(value, first, count);
            if (first + 4 <= count) {
                *reinterpret_cast<float4*>(out + first) = make_float4(value[0], value[1], value[2], value[3]);
            } else {
#pragma unroll
                for (int lane = 0; lane < 3; ++lane)
                    if (first + lane < count) out[first + lane] = value[lane];
            }
        }
    }
}
