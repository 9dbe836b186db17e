// What the fast searches with objective diag share, which take symmetric integers with float steps: steps and errors,
// and the end of those whose threads own channels.
//
// Candidate g has a scale s[g][k] and an importance sq_mean[k] / s[g][k]^2 for every input channel k; its error is the
// sum over k of importance[g][k] * sum_n (step * rint(W*s / step) - W*s)^2. Threads that own channels sum the squares
// in float, without the importance, which comes in once at the end; a sum that float cannot be trusted with is made
// again in double.
#pragma once
#include "search.cuh"

#include <cuda_pipeline_primitives.h>

#ifndef QMAX
#error "the largest code must be given: -DQMAX=127"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");

constexpr float LARGEST = QMAX;
// Steps in float are at least this, so that 1 / step stays finite; smaller ones end among the sums that are made again.
constexpr float SMALLEST_NORMAL = 1.175494351e-38f;
// Squares of float errors lose bits below 2^-126: a smaller sum of them than this is made again in double.
constexpr float TRUSTED_SUM = 8.077935669e-28f;  // 2^-90

// The step of a row or group whose largest magnitude this is.
__device__ __forceinline__ float step_of(float largest) {
    return step_for(largest, LARGEST);
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

// Calls `work` with a thread's N channels of each of `rows` rows, from `column` on, and then of rows of zeros until
// there are a multiple of Turn. `slots` has Slots x Threads x N elements: all but Turn rows of that are under way while
// Turn are worked on, since a row comes from far away, and in shared memory, since a register that a loop hands on is
// waited for. A thread reads what it has copied itself, and need not wait for others.
template <int N, int Threads, int Slots, int Turn, typename Before, typename Take, typename Work>
static __device__ __forceinline__ void for_each_row(float* slots, const float* column, Size pitch, int rows,
                                                    Before before, Take take, Work work) {
    static_assert(Slots >= 2 * Turn && (Slots & (Slots - 1)) == 0, "Slots is a power of two, at least two turns");
    const auto slot = [&](int row) { return slots + (row % Slots * Threads + static_cast<int>(threadIdx.x)) * N; };
    const auto ask = [&](int row) {
#pragma unroll
        for (int i = 0; i < Turn; ++i)
            __pipeline_memcpy_async(slot(row) + i * Threads * N, column + i * pitch, N * sizeof(float),
                                    row + i < rows ? 0 : N * sizeof(float));
        __pipeline_commit();
        column += Turn * pitch;
    };
#pragma unroll
    for (int row = 0; row < Slots - Turn; row += Turn) ask(row);
    before();
#pragma unroll 1
    for (int row = 0; row < rows; row += Turn) {
        __pipeline_wait_prior(Slots / Turn - 2);
        Columns<N> now[Turn];
#pragma unroll
        for (int i = 0; i < Turn; ++i) now[i] = take(slot(row) + i * Threads * N);
        ask(row + Slots - Turn);
#pragma unroll
        for (int i = 0; i < Turn; ++i) work(now[i]);
    }
    __pipeline_wait_prior(0);
}

// 1 / value to 1 unit in the last place, 0 above 2^126.
__device__ __forceinline__ float reciprocal(float value) {
#ifdef __CUDA_ARCH__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#else
    return value > 8.507059173e37f ? 0.0f : 1.0f / value;
#endif
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
    unsigned doubtful = 0;                                     // a bit for each candidate
    constexpr int TOGETHER = Chunk * N > 40 ? 40 / N : Chunk;  // candidates whose importance is on its way
#pragma unroll
    for (int first = 0; first < Chunk; first += TOGETHER) {
        // What is not there has squares of 0: whatever is loaded in its place, without a branch, that would be waited
        // at.
        double weight[TOGETHER][N], sum[TOGETHER] = {};
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const int g = min(first_g + first + i, candidates - 1);
            const double* const of_g = importance + static_cast<Size>(g) * in_features + (inside ? k : 0);
            if constexpr (N == 1) {
                weight[i][0] = *of_g;
            } else {
#pragma unroll
                for (int j = 0; j < N; j += 2) {
                    const double2 two = *reinterpret_cast<const double2*>(of_g + j);
                    weight[i][j] = two.x, weight[i][j + 1] = two.y;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < TOGETHER && first + i < Chunk; ++i) {
            const int g = first + i;
            const bool there = inside && weights && first_g + g < candidates;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const bool trusted = squares[g][j] >= TRUSTED_SUM && squares[g][j] <= LARGEST_FLOAT;
                doubtful |= there && !trusted ? 1u << g : 0u;
                sum[i] += weight[i][j] * squares[g][j];
            }
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
            for (int i = 0; i < TOGETHER && first + i < Chunk; ++i)
                sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], offset);
#pragma unroll
        for (int i = 0; i < TOGETHER && first + i < Chunk; ++i)
            if (lane == 0) sums[warp][first + i] = sum[i];
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
