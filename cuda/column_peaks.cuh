// The largest magnitudes of the columns of a matrix, in whatever order: a maximum is the same in any.
#pragma once
#include "common.cuh"

constexpr int PEAK_WARPS = 32, PEAK_THREADS = PEAK_WARPS * 32;  // of a block

// A block has 32 columns, each warp every 32nd row of them. NaN lies above all.
static __device__ __forceinline__ void find_column_peaks(const float* matrix, float* peaks, int rows, int columns) {
    __shared__ int of_warps[PEAK_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = blockIdx.x * 32 + lane;
    int largest = 0;  // bits of floats that are not negative: they order alike
    if (column < columns) {
#pragma unroll 4
        for (int row = warp; row < rows; row += PEAK_WARPS)
            largest = max(largest, __float_as_int(fabsf(matrix[static_cast<Size>(row) * columns + column])));
    }
    of_warps[warp][lane] = largest;
    __syncthreads();
    if (warp == 0 && column < columns) {
        for (int other = 1; other < PEAK_WARPS; ++other) largest = max(largest, of_warps[other][lane]);
        peaks[column] = __int_as_float(largest);
    }
}
