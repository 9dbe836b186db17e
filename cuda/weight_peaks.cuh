// The largest magnitude of all scaled weights, by which the steps of NVFP4 are scaled: that of the largest weight of
// some channel, since rounding keeps the order of numbers.
#pragma once
#include "column_peaks.cuh"
#include "format.cuh"

// The largest |w| of every channel.
extern "C" __global__ void __launch_bounds__(PEAK_THREADS) weight_peaks(const float* __restrict__ w,
                                                                     float* __restrict__ peaks, int out_features,
                                                                     int in_features) {
    in_turn();
    find_column_peaks(w, peaks, out_features, in_features);
}

// What follows from them for some scales, for every thread of a block of PEAK_THREADS.
static __device__ __forceinline__ float scale_of_peaks(const float* peaks, const float* s, const float* form,
                                                       int in_features) {
    __shared__ int of_warps[PEAK_WARPS];
    int largest = 0;
    for (int k = threadIdx.x; k < in_features; k += PEAK_THREADS)
        largest = max(largest, __float_as_int(peaks[k] * s[k]));
    largest = __reduce_max_sync(~0u, largest);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    return Form(form).tensor_scale(__int_as_float(__reduce_max_sync(~0u, of_warps[threadIdx.x % 32])));
}
