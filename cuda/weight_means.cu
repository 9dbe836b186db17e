// The weights' statistic: the mean over the rows of |w| / (max|w| + 1e-6), the maximum that of the weight's group, for
// each input channel. In double, in an order that only the shape decides.
//
// The weights are read twice: by a warp for each group, which leaves what its weights are multiplied by; then strips of
// 32 channels, a lane for each, are summed over the rows, some at a time. Two bytes to four of a weight are moved for
// each of its operations, so memory is the limit.
#include "common.cuh"

#if !defined(THREADS)
#error "the threads of a block that sums must be given: -DTHREADS=512"
#endif
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
constexpr int WARPS = THREADS / 32;
constexpr double GROUP_OFFSET = 1e-6;  // what AutoAWQ adds to the largest magnitude of a group

// (out_features, groups): what makes shares of the largest magnitude of the weights of a group.
extern "C" __global__ void group_factors(const float* __restrict__ w, double* __restrict__ factors, int out_features,
                                         int in_features, int group_size) {
    in_turn();
    const int lane = threadIdx.x % 32;
    const Size groups = group_count(in_features, group_size);
    for (Size at = global_thread() / 32; at < out_features * groups; at += global_threads() / 32) {
        const Size row = at / groups;
        const int begin = static_cast<int>(at - row * groups) * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        const float* const line = w + row * in_features;
        int largest = 0;  // the bits of floats that are not negative: they order alike
#pragma unroll 8
        for (int k = begin + lane; k < end; k += 32) largest = max(largest, __float_as_int(fabsf(line[k])));
        largest = __reduce_max_sync(~0u, largest);
        if (lane == 0) factors[at] = 1.0 / (__int_as_float(largest) + GROUP_OFFSET);
    }
}

// A block has a strip of 32 channels, each warp every WARPS-th of its rows. Blocks: strips fastest, then chunks of
// rows.
extern "C" __global__ void __launch_bounds__(THREADS) weight_sums(const float* __restrict__ w,
                                                               const double* __restrict__ factors,
                                                               double* __restrict__ partial, int out_features,
                                                               int in_features, int group_size, int rows_of_block) {
    in_turn();
    __shared__ double of_warps[WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int strips = up(in_features, 32), chunk = blockIdx.x / strips, k = blockIdx.x % strips * 32 + lane;
    const Size groups = group_count(in_features, group_size);
    double sum = 0.0;
    if (k < in_features) {
        const int first = chunk * rows_of_block, end = first + min(rows_of_block, out_features - first);
        const double* const of_group = factors + k / group_size;
#pragma unroll 8
        for (int row = first + warp; row < end; row += WARPS)
            sum = fma(static_cast<double>(fabsf(w[static_cast<Size>(row) * in_features + k])), of_group[row * groups],
                      sum);
    }
    of_warps[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || k >= in_features) return;
    for (int other = 1; other < WARPS; ++other) sum += of_warps[other][lane];
    partial[static_cast<Size>(chunk) * in_features + k] = sum;
}

extern "C" __global__ void finish_weight_means(const double* __restrict__ partial, double* __restrict__ weight_mean,
                                               int out_features, int in_features, int chunks) {
    in_turn();
    for (Size k = global_thread(); k < in_features; k += global_threads()) {
        double sum = 0.0;
#pragma unroll 8
        for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[static_cast<Size>(chunk) * in_features + k];
        weight_mean[k] = sum / out_features;
    }
}
