// What the searches with objective diag share: the kernels before and behind their own, and the end of those whose
// threads own channels.
//
// Candidate g has a scale s[g][k] and an importance sq_mean[k] / s[g][k]^2 for every input channel k; its error is the
// sum over k of importance[g][k] * sum_n (step * rint(W*s / step) - W*s)^2. Threads that own channels sum the squares
// in float, without the importance, which comes in once at the end; a sum that float cannot be trusted with is made
// again in double.
#pragma once
#include "search.cuh"

#ifndef QMAX
#error "the largest code must be given: -DQMAX=127"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");

constexpr float LARGEST = QMAX;
constexpr float LARGEST_FLOAT = 3.402823466e38f;
constexpr float SMALLEST_FLOAT = 1.401298464e-45f;
// Squares of float errors lose bits below 2^-126: a smaller sum of them than this is made again in double.
constexpr float TRUSTED_SUM = 8.077935669e-28f;  // 2^-90

// The step of a row or group whose largest magnitude this is; see quant/format.py.
__device__ __forceinline__ float step_of(float largest) {
    return largest == 0.0f ? 1.0f : fmaxf(largest / LARGEST, SMALLEST_FLOAT);
}

// The squared error of one scaled weight in double; infinite where W*s has overflowed.
__device__ __forceinline__ double exact_error(float scaled, float step) {
    if (!(step <= LARGEST_FLOAT)) return static_cast<double>(step) * step;
    const double wide = step;
    const double distance = rint(static_cast<double>(scaled) / wide) * wide - scaled;
    return distance * distance;
}

// One block for each candidate.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    candidates(const float* __restrict__ abs_mean, const float* __restrict__ sq_mean, const double* __restrict__ gamma,
               const double* __restrict__ rule, float* __restrict__ candidate_s, double* __restrict__ importance,
               int in_features, int by_mean) {
    const Size row = static_cast<Size>(blockIdx.x) * in_features;
    make_candidate(abs_mean, sq_mean, gamma[blockIdx.x], rule, candidate_s + row, importance + row, in_features,
                   by_mean != 0);
}

// One block: the error of each candidate from its `blocks` partial sums, infinite where it has overflowed; then the
// scales of the best.
extern "C" __global__ void __launch_bounds__(THREADS) choose(const double* __restrict__ partial,
                                                          const double* __restrict__ gamma,
                                                          const float* __restrict__ candidate_s,
                                                          double* __restrict__ error, float* __restrict__ s,
                                                          float* __restrict__ inv_s, int candidates, int in_features,
                                                          int blocks) {
    for (int g = threadIdx.x / 32; g < candidates; g += THREADS / 32) {
        double sum = 0.0;
        for (int i = threadIdx.x % 32; i < blocks; i += 32) sum += partial[static_cast<Size>(g) * blocks + i];
        sum = over_warp(sum, Sum{});
        if (threadIdx.x % 32 == 0) error[g] = sum < INFINITY ? sum : INFINITY;
    }
    __syncthreads();
    const float* const row = candidate_s + static_cast<Size>(best_of(error, gamma, candidates)) * in_features;
    for (int k = threadIdx.x; k < in_features; k += THREADS) {
        s[k] = row[k];
        inv_s[k] = 1.0f / row[k];
    }
}

// Some neighbouring channels, loaded at once.
template <int N>
struct Columns {
    static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 channels: a load of up to 16 bytes");
    float v[N];
};

template <int N>
__device__ __forceinline__ Columns<N> load(const float* from) {
    Columns<N> columns;
    if constexpr (N == 4) {
        const float4 a = *reinterpret_cast<const float4*>(from);
        columns.v[0] = a.x, columns.v[1] = a.y, columns.v[2] = a.z, columns.v[3] = a.w;
    } else if constexpr (N == 2) {
        const float2 a = *reinterpret_cast<const float2*>(from);
        columns.v[0] = a.x, columns.v[1] = a.y;
    } else {
        columns.v[0] = *from;
    }
    return columns;
}

// The squared error of a scaled weight, added to a sum.
__device__ __forceinline__ float add_square(float scaled, float step, float inverse, float sum) {
    constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    const float code = __fadd_rn(fmaf(scaled, inverse, MAGIC), -MAGIC);
    const float distance = fmaf(-code, step, scaled);
    return fmaf(distance, distance, sum);
}

// The end of a block of `Threads` threads of which each has summed the squared errors of N channels from `k` on over
// its rows, for the `Chunk` candidates from `first_g` on: weighted, and summed over the block in a fixed order.
// `exact(g, j)` gives such a sum once more, for a candidate of the chunk and a channel of the thread, in double; it is
// called by whole warps. `weights` says whether any weight of the thread's channels is not 0.
template <int Chunk, int N, int Threads, typename Exact>
static __device__ __forceinline__ void sum_of_block(const float (&squares)[Chunk][N], const double* importance,
                                                    double* partial, int first_g, int candidates, int k,
                                                    int in_features, bool weights, int block, int blocks, Exact exact) {
    __shared__ double sums[Threads / 32][Chunk];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool inside = k < in_features;
    unsigned doubtful = 0;  // a bit for each candidate
#pragma unroll
    for (int g = 0; g < Chunk; ++g) {
        double sum = 0.0;
        if (inside && first_g + g < candidates) {
            const double* const of_g = importance + static_cast<Size>(first_g + g) * in_features + k;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (weights && !(squares[g][j] >= TRUSTED_SUM && squares[g][j] <= LARGEST_FLOAT)) doubtful |= 1u << g;
                sum += of_g[j] * squares[g][j];
            }
        }
        sum = over_warp(sum, Sum{});
        if (lane == 0) sums[warp][g] = sum;
    }
    doubtful = __reduce_or_sync(ALL_LANES, doubtful);
    for (int g = 0; g < Chunk; ++g) {
        if (!(doubtful >> g & 1)) continue;
        double sum = 0.0;
        for (int j = 0; j < N; ++j) {
            const double again = exact(g, j);
            if (inside) sum += importance[static_cast<Size>(first_g + g) * in_features + k + j] * again;
        }
        sum = over_warp(sum, Sum{});
        if (lane == 0) sums[warp][g] = sum;
    }
    __syncthreads();
    if (threadIdx.x < Chunk && first_g + threadIdx.x < candidates) {
        double sum = 0.0;
        for (int other = 0; other < Threads / 32; ++other) sum += sums[other][threadIdx.x];
        partial[static_cast<Size>(first_g + threadIdx.x) * blocks + block] = sum;
    }
}
