// init: a rows x cols matrix of (2u - 1) * row_gain * col_gain, u from cuRAND's Philox4x32-10.
//
// Element i is lane i % 4 of counter i / 4, so the values depend on neither the grid nor the device: NumPy makes the
// same bits (awq_pycuda/philox.py). Each product rounds once, in this order, on both sides.
#include <curand_kernel.h>

#include "common.cuh"

extern "C" __global__ void init(float* __restrict__ out, Size rows, Size cols, Size seed, Size subsequence,
                                const float* __restrict__ row_gain, const float* __restrict__ col_gain) {
    const Size count = rows * cols;
    for (Size quad = global_thread(); 4 * quad < count; quad += global_threads()) {
        curandStatePhilox4_32_10_t state;
        curand_init(seed, subsequence, 4 * quad, &state);
        const float4 u = curand_uniform4(&state);
        const float lanes[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const Size i = 4 * quad + lane;
            if (i < count) {
                float value = 2.0f * lanes[lane] - 1.0f;
                if (row_gain != nullptr) value *= row_gain[i / cols];
                if (col_gain != nullptr) value *= col_gain[i % cols];
                out[i] = value;
            }
        }
    }
}
