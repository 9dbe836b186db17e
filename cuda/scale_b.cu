// compute_scale_b: the step of every row, or of every group of a row: max |W * s| / QMAX, by a true division.
//
// One read of the weights, a block to a row, so that no index needs a division. Loads are asked for AHEAD at a time. A
// row that is one group is the whole block's. Groups of 16, 32, 64 and 128 channels lie in `lanes` neighbouring lanes,
// four channels each, and AHEAD of them are reduced together: with the first exchanges a lane keeps half of what it
// has, so that it ends with one of them, and one division is left of AHEAD. Of groups of any other size each has as
// many lanes as have 4 channels, one group after the other.
#include "common.cuh"

#if !defined(QMAX) || !defined(THREADS) || !defined(AHEAD)
#error "the largest code and the threads of a block must be given: -DQMAX=127 -DTHREADS=256 -DAHEAD=4"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
static_assert(AHEAD == 4, "AHEAD is 4: two exchanges leave a lane one of so many");
constexpr float LARGEST = QMAX;
constexpr float SMALLEST_FLOAT = 1.401298464e-45f;
constexpr int HOP = 4 * THREADS;  // channels of a block's loads

__device__ __forceinline__ float step_of(float largest) {
    return largest == 0.0f ? 1.0f : fmaxf(largest / LARGEST, SMALLEST_FLOAT);
}

// The largest |w * s| of 4 channels.
__device__ __forceinline__ float largest_of(float4 weight, float4 scale) {
    const float first = fmaxf(fabsf(weight.x) * scale.x, fabsf(weight.y) * scale.y);
    const float second = fmaxf(fabsf(weight.z) * scale.z, fabsf(weight.w) * scale.w);
    return fmaxf(first, second);
}

// The same of the channels k, k + HOP, ...; 0 beyond the end.
__device__ __forceinline__ void load_largest(float (&largest)[AHEAD], const float* w, const float* s, int k, int end) {
    const float4 nothing = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 weight[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        weight[i] = k + HOP * i < end ? *reinterpret_cast<const float4*>(w + k + HOP * i) : nothing;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
        largest[i] =
            largest_of(weight[i], k + HOP * i < end ? *reinterpret_cast<const float4*>(s + k + HOP * i) : nothing);
}

// The largest of the channels from `k` on with a stride of so many: 4 at a time, or one by one.
__device__ __forceinline__ float largest_of(const float* w, const float* s, int k, int end, int stride, bool vectors) {
    float largest = 0.0f;
    if (vectors) {
#pragma unroll 2
        for (k *= 4; k < end; k += 4 * stride)
            largest = fmaxf(
                largest, largest_of(*reinterpret_cast<const float4*>(w + k), *reinterpret_cast<const float4*>(s + k)));
    } else {
#pragma unroll 4
        for (; k < end; k += stride) largest = fmaxf(largest, fabsf(w[k]) * s[k]);
    }
    return largest;
}

__device__ __forceinline__ float across(float largest, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
    return largest;
}

// The step of a row by the whole block.
__device__ __forceinline__ void row_step(const float* line, const float* s, float* step, int in_features) {
    __shared__ float of_warps[THREADS / 32];
    float largest = 0.0f;
    if (in_features % 4 == 0) {
#pragma unroll 1
        for (int k = 4 * threadIdx.x; k < in_features; k += AHEAD * HOP) {
            float found[AHEAD];
            load_largest(found, line, s, k, in_features);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) largest = fmaxf(largest, found[i]);
        }
    } else {
        largest = largest_of(line, s, threadIdx.x, in_features, THREADS, false);
    }
    largest = across(largest, 32);
    __syncthreads();  // whoever still reads those of the last row
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < THREADS / 32; ++warp) largest = fmaxf(largest, of_warps[warp]);
    *step = step_of(largest);
}

// The steps of a row whose groups are 4 channels of each of `lanes` lanes, at least 4. Whole warps go on together.
__device__ __forceinline__ void group_steps(const float* line, const float* s, float* steps, int in_features,
                                            int lanes) {
    const int half = lanes / 2, quarter = lanes / 4;
    const bool second_half = threadIdx.x & half, second_quarter = threadIdx.x & quarter;
    const int mine = 2 * second_half + second_quarter;  // of AHEAD
    const int group = (threadIdx.x + mine * THREADS) / lanes;
#pragma unroll 1
    for (int start = 0; start < in_features; start += AHEAD * HOP) {
        float found[AHEAD];
        load_largest(found, line, s, start + 4 * threadIdx.x, in_features);
        float kept[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float given = __shfl_xor_sync(~0u, second_half ? found[i] : found[2 + i], half);
            kept[i] = fmaxf(second_half ? found[2 + i] : found[i], given);
        }
        const float given = __shfl_xor_sync(~0u, second_quarter ? kept[0] : kept[1], quarter);
        const float largest = across(fmaxf(second_quarter ? kept[1] : kept[0], given), quarter);
        // The lane that has a group may lie beyond the end of the row, the group's first channel does not.
        const int first = start + 4 * lanes * group;
        if (threadIdx.x % quarter == 0 && first < in_features) steps[first / (4 * lanes)] = step_of(largest);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) compute_scale_b(const float* __restrict__ w,
                                                                   const float* __restrict__ s,
                                                                   float* __restrict__ scale_b, int out_features,
                                                                   int in_features, int group_size, int lanes) {
    in_turn();
    const int groups = group_count(in_features, group_size);
    const bool vectors = in_features % 4 == 0 && group_size % 4 == 0;
    for (int row = blockIdx.x; row < out_features; row += gridDim.x) {
        const float* const line = w + static_cast<Size>(row) * in_features;
        float* const steps = scale_b + static_cast<Size>(row) * groups;
        if (groups == 1) {
            row_step(line, s, steps, in_features);
            continue;
        }
        if (vectors && group_size == 4 * lanes && lanes >= 4) {
            group_steps(line, s, steps, in_features, lanes);
            continue;
        }
#pragma unroll 1
        for (int first = 0; first < groups; first += THREADS / lanes) {
            const int group = first + threadIdx.x / lanes;
            const int begin = group < groups ? group * group_size : in_features;
            const int end = group_size < in_features - begin ? begin + group_size : in_features;
            const int lane = threadIdx.x % lanes;
            const float largest = across(largest_of(line + begin, s + begin, lane, end - begin, lanes, vectors), lanes);
            if (group < groups && lane == 0) steps[group] = step_of(largest);
        }
    }
}
