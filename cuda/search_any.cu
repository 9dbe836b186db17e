// The search with objective diag for any sizes: rows of any length, groups of any size.
//
// A warp takes one row's group at a time: it reads the weights twice, first for the largest magnitude of every
// candidate of its chunk, then for the errors, which it adds up in double. Plain, and the yardstick of search_rows.cu
// and search_groups.cu, which are several times as fast where their sizes allow.
#include "search_diag.cuh"

#if !defined(CHUNK) || !defined(WARPS)
#error "candidates and warps of a block must be given: -DCHUNK=8 -DWARPS=8"
#endif
static_assert(CHUNK >= 1 && WARPS >= 1 && WARPS <= 32, "a block has WARPS warps, at most 32, for CHUNK candidates");

// Blocks: chunks of candidates fastest, so that those that read the same weights share the cache.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    diag_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
                const double* __restrict__ importance, const double* __restrict__ gamma, double* partial, double* error,
                float* __restrict__ s, float* __restrict__ inv_s, int out_features, int in_features, int group_size,
                int candidates) {
    __shared__ double sums[WARPS][CHUNK];
    const int chunks = (candidates - 1) / CHUNK + 1;
    const int first = blockIdx.x % chunks * CHUNK;
    const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Size groups = group_count(in_features, group_size);

    double errors[CHUNK] = {};
    for (Size segment = static_cast<Size>(block) * WARPS + warp; segment < out_features * groups;
         segment += static_cast<Size>(blocks) * WARPS) {
        const Size row = segment / groups;
        const int begin = static_cast<int>(segment - row * groups) * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        const float* const line = w + row * in_features;
        float largest[CHUNK] = {};
        for (int k = begin + lane; k < end; k += 32) {
            const float magnitude = fabsf(line[k]);
#pragma unroll
            for (int g = 0; g < CHUNK; ++g) {
                if (first + g < candidates)
                    largest[g] =
                        fmaxf(largest[g], magnitude * candidate_s[static_cast<Size>(first + g) * in_features + k]);
            }
        }
#pragma unroll
        for (int g = 0; g < CHUNK; ++g)
            largest[g] = step_of(__int_as_float(__reduce_max_sync(ALL_LANES, __float_as_int(largest[g]))));
        for (int k = begin + lane; k < end; k += 32) {
            const float magnitude = fabsf(line[k]);
#pragma unroll
            for (int g = 0; g < CHUNK; ++g) {
                if (first + g >= candidates) continue;
                const Size at = static_cast<Size>(first + g) * in_features + k;
                errors[g] += importance[at] * exact_error(magnitude * candidate_s[at], largest[g]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < CHUNK; ++g) {
        const double sum = over_warp(errors[g], Sum{});
        if (lane == 0) sums[warp][g] = sum;
    }
    __syncthreads();
    if (threadIdx.x < CHUNK && first + threadIdx.x < candidates) {
        double sum = 0.0;
        for (int other = 0; other < WARPS; ++other) sum += sums[other][threadIdx.x];
        partial[static_cast<Size>(first + threadIdx.x) * blocks + block] = sum;
    }
    if (last_to_come(&blocks_done, gridDim.x))
        choose_best<WARPS * 32, 8>(partial, gamma, candidate_s, error, s, inv_s, candidates, in_features, blocks);
}
