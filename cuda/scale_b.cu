// compute_scale_b: the step of every row, or of every group of a row: max |W * s| / QMAX, by a true division.
//
// One read of the weights, a block to a row, so that no index needs a division. Where a row is one group, the whole
// block looks for its maximum. Else `lanes` neighbouring lanes of a warp share a group, as many as have 4 channels
// each, and several groups are on their way at a time.
#include "common.cuh"

#if !defined(QMAX) || !defined(THREADS)
#error "the largest code and the threads of a block must be given: -DQMAX=127 -DTHREADS=256"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
constexpr float LARGEST = QMAX;
constexpr float SMALLEST_FLOAT = 1.401298464e-45f;

__device__ __forceinline__ float step_of(float largest) {
    return largest == 0.0f ? 1.0f : fmaxf(largest / LARGEST, SMALLEST_FLOAT);
}

// The largest |w * s| of the channels from `k` on, 4 at a time or one by one, with a stride of so many channels.
__device__ __forceinline__ float largest_of(const float* w, const float* s, int k, int end, int stride, bool vectors) {
    float largest = 0.0f;
    if (vectors) {
#pragma unroll 4
        for (k *= 4; k < end; k += 4 * stride) {
            const float4 weight = *reinterpret_cast<const float4*>(w + k);
            const float4 scale = *reinterpret_cast<const float4*>(s + k);
            const float first = fmaxf(fabsf(weight.x) * scale.x, fabsf(weight.y) * scale.y);
            const float second = fmaxf(fabsf(weight.z) * scale.z, fabsf(weight.w) * scale.w);
            largest = fmaxf(largest, fmaxf(first, second));
        }
    } else {
#pragma unroll 4
        for (; k < end; k += stride) largest = fmaxf(largest, fabsf(w[k]) * s[k]);
    }
    return largest;
}

extern "C" __global__ void __launch_bounds__(THREADS) compute_scale_b(const float* __restrict__ w,
                                                                   const float* __restrict__ s,
                                                                   float* __restrict__ scale_b, int out_features,
                                                                   int in_features, int group_size, int lanes) {
    __shared__ float of_warps[THREADS / 32];
    const int groups = group_count(in_features, group_size);
    const bool vectors = in_features % 4 == 0 && group_size % 4 == 0;
    const int lane = threadIdx.x % lanes;
    for (int row = blockIdx.x; row < out_features; row += gridDim.x) {
        const float* const line = w + static_cast<Size>(row) * in_features;
        float* const steps = scale_b + static_cast<Size>(row) * groups;
        if (groups == 1) {
            float largest = largest_of(line, s, threadIdx.x, in_features, THREADS, vectors);
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
            __syncthreads();  // whoever still reads those of the last row
            if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
            __syncthreads();
            if (threadIdx.x == 0) {
                for (int warp = 1; warp < THREADS / 32; ++warp) largest = fmaxf(largest, of_warps[warp]);
                steps[0] = step_of(largest);
            }
            continue;
        }
        // Whole warps go on together, since the lanes of several groups meet in the reduction.
#pragma unroll 4
        for (int first = 0; first < groups; first += THREADS / lanes) {
            const int group = first + threadIdx.x / lanes;
            const int begin = group < groups ? group * group_size : in_features;
            const int end = group_size < in_features - begin ? begin + group_size : in_features;
            float largest = largest_of(line + begin, s + begin, lane, end - begin, lanes, vectors);
            for (int offset = lanes / 2; offset > 0; offset /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
            if (group < groups && lane == 0) steps[group] = step_of(largest);
        }
    }
}
