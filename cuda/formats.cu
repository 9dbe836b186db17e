// compute_scale_b and quantize_awq for every format: steps and zero points of the range of every group of a row, and
// codes by them.
//
// Plain: a warp takes a group at a time, then a thread a weight, by true divisions. scale_b.cu and quantize.cu are
// faster for symmetric integers with float steps.
#include "weight_peaks.cuh"

// One block.
extern "C" __global__ void __launch_bounds__(PEAK_THREADS) scale_of_tensor(const float* __restrict__ peaks,
                                                                        const float* __restrict__ s,
                                                                        const float* __restrict__ form,
                                                                        float* __restrict__ tensor_scale,
                                                                        int in_features) {
    in_turn();
    const float found = scale_of_peaks(peaks, s, form, in_features);
    if (threadIdx.x == 0) *tensor_scale = found;
}

extern "C" __global__ void compute_scale_b(const float* __restrict__ w, const float* __restrict__ s,
                                           const float* __restrict__ form, const float* __restrict__ tensor_scale,
                                           float* __restrict__ scale_b, float* __restrict__ zero_points,
                                           int out_features, int in_features, int group_size) {
    in_turn();
    const Form to(form);
    const float of_tensor = tensor_scale == nullptr ? 1.0f : *tensor_scale;
    const Size groups = group_count(in_features, group_size), all = out_features * groups;
    for (Size at = global_thread() / 32; at < all; at += global_threads() / 32) {
        const Size row = at / groups;
        const int begin = static_cast<int>(at - row * groups) * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        const Group found = fit_by_warp(to, w + row * in_features, s, begin, end, of_tensor);
        if (threadIdx.x % 32 != 0) continue;
        scale_b[at] = found.step;
        if (zero_points != nullptr) zero_points[at] = found.zero;
    }
}

// A block takes a row at a time.
extern "C" __global__ void quantize_awq(const float* __restrict__ w, const float* __restrict__ s,
                                        const float* __restrict__ form, const float* __restrict__ scale_b,
                                        const float* __restrict__ zero_points, signed char* __restrict__ wq,
                                        int out_features, int in_features, int group_size) {
    in_turn();
    const Form to(form);
    const Size groups = group_count(in_features, group_size);
    for (int row = blockIdx.x; row < out_features; row += gridDim.x) {
        const Size first = static_cast<Size>(row) * in_features, first_group = row * groups;
        for (int k = threadIdx.x; k < in_features; k += blockDim.x) {
            const Size group = first_group + k / group_size;
            const Group of = {scale_b[group], zero_points == nullptr ? 0.0f : zero_points[group]};
            wq[first + k] = static_cast<signed char>(to.code(__fmul_rn(w[first + k], s[k]), of));
        }
    }
}
