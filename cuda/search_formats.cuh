// What the searches that take every format share: for NVFP4 what the steps of each candidate are scaled by.
#pragma once
#include "weight_peaks.cuh"

// A block has a candidate.
extern "C" __global__ void __launch_bounds__(PEAK_THREADS) scales_of_tensor(const float* __restrict__ peaks,
                                                                         const float* __restrict__ candidate_s,
                                                                         const float* __restrict__ form,
                                                                         float* __restrict__ tensor_scales,
                                                                         int in_features) {
    in_turn();
    const float* const s = candidate_s + static_cast<Size>(blockIdx.x) * in_features;
    const float found = scale_of_peaks(peaks, s, form, in_features);
    if (threadIdx.x == 0) tensor_scales[blockIdx.x] = found;
}
