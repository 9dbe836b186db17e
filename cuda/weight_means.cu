// The weights' statistic: the mean over the rows of |w| / (max|w| + 1e-6), the maximum that of the weight's group, for
// each input channel. In double, in an order that only the shape decides.
//
// There are few operations to a weight, so memory is the limit. A warp sums a strip of channels over some rows, each
// lane one channel or four neighbouring ones. Where the groups lie within a strip its lanes find the maxima on the way,
// and the weights are read once. Else they are read twice: first by a warp for each group, which leaves what its
// weights are multiplied by.
#include "common.cuh"

#if !defined(THREADS)
#error "the threads of a block that sums must be given: -DTHREADS=512"
#endif
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
constexpr int WARPS = THREADS / 32;
constexpr int AHEAD = 4;               // loads of a lane in flight
constexpr double GROUP_OFFSET = 1e-6;  // what AutoAWQ adds to the largest magnitude of a group

// What makes shares of the largest magnitude of a group, given its bits: those of floats that are not negative order
// alike.
__device__ __forceinline__ double factor_of(int largest) {
    return 1.0 / (__int_as_float(largest) + GROUP_OFFSET);
}

// Some neighbouring channels, loaded at once.
template <int N>
struct Magnitudes {
    float of[N];

    __device__ __forceinline__ void load(const float* from) {
        if constexpr (N == 4) {
            const float4 four = *reinterpret_cast<const float4*>(from);
            of[0] = fabsf(four.x), of[1] = fabsf(four.y), of[2] = fabsf(four.z), of[3] = fabsf(four.w);
        } else {
            of[0] = fabsf(*from);
        }
    }
    __device__ __forceinline__ int largest() const {
        int bits = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) bits = max(bits, __float_as_int(of[i]));
        return bits;
    }
};

// The largest magnitude of the channels from `begin` to `end` of a row, for every lane of a warp.
template <int N>
__device__ __forceinline__ int largest_of(const float* line, int begin, int end) {
    int bits = 0;
#pragma unroll AHEAD
    for (int k = begin + static_cast<int>(threadIdx.x) % 32 * N; k < end; k += 32 * N) {
        Magnitudes<N> some;
        some.load(line + k);
        bits = max(bits, some.largest());
    }
    return __reduce_max_sync(~0u, bits);
}

// (out_features, groups): what the weights of a group are multiplied by.
extern "C" __global__ void group_factors(const float* __restrict__ w, double* __restrict__ factors, int out_features,
                                         int in_features, int group_size) {
    in_turn();
    const Size groups = group_count(in_features, group_size);
    const bool by_fours = in_features % 4 == 0 && group_size % 4 == 0;
    for (Size at = global_thread() / 32; at < out_features * groups; at += global_threads() / 32) {
        const Size row = at / groups;
        const int begin = static_cast<int>(at - row * groups) * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        const float* const line = w + row * in_features;
        const int largest = by_fours ? largest_of<4>(line, begin, end) : largest_of<1>(line, begin, end);
        if (threadIdx.x % 32 == 0) factors[at] = factor_of(largest);
    }
}

// The sums of a lane's channels over every WARPS-th of `rows` rows. `line` is the first of them, from the lane's
// channels on, of which there are none unless `inside`. `factor(row, magnitudes)` is asked by whole warps.
template <int N, typename Factor>
__device__ __forceinline__ void sum_rows(double (&sums)[N], const float* line, int rows, Size pitch, bool inside,
                                         Factor factor) {
#pragma unroll 1
    for (int first = threadIdx.x / 32; first < rows; first += AHEAD * WARPS) {
        Magnitudes<N> some[AHEAD] = {};
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (inside && first + i * WARPS < rows) some[i].load(line + (first + i * WARPS) * pitch);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const double shared = factor(min(first + i * WARPS, rows - 1), some[i]);
#pragma unroll
            for (int j = 0; j < N; ++j) sums[j] = fma(static_cast<double>(some[i].of[j]), shared, sums[j]);
        }
    }
}

// A block's strip of 32 N channels, and its rows from `first` on. `lanes` of a warp have a group; where that is 0 the
// factors are given.
template <int N>
__device__ __forceinline__ void sum_strip(const float* w, const double* factors, double* partial, int strip, int first,
                                          int rows, int in_features, int group_size, int lanes) {
    __shared__ double of_warps[WARPS][32 * N];
    const int lane = threadIdx.x % 32, k = (strip * 32 + lane) * N;
    const bool inside = k < in_features;
    const float* const line = w + static_cast<Size>(first) * in_features + k;
    double sums[N] = {};
    if (lanes > 0) {
        sum_rows(sums, line, rows, in_features, inside, [&](int, const Magnitudes<N>& some) {
            int largest = some.largest();
            for (int offset = lanes / 2; offset > 0; offset /= 2)
                largest = max(largest, __shfl_xor_sync(~0u, largest, offset));
            return factor_of(largest);
        });
    } else {
        const Size groups = group_count(in_features, group_size);
        const double* const of_rows = factors + first * groups + (inside ? k : 0) / group_size;
        sum_rows(sums, line, rows, in_features, inside,
                 [&](int row, const Magnitudes<N>&) { return of_rows[row * groups]; });
    }
#pragma unroll
    for (int j = 0; j < N; ++j) of_warps[threadIdx.x / 32][lane * N + j] = sums[j];
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * N && strip * 32 * N + i < in_features; i += THREADS) {
        double sum = 0.0;
        for (int warp = 0; warp < WARPS; ++warp) sum += of_warps[warp][i];
        partial[strip * 32 * N + i] = sum;
    }
}

// Blocks: strips of channels fastest, then chunks of rows. A strip has 32 channels, or 128 where `fours`.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    weight_sums(const float* __restrict__ w, const double* __restrict__ factors, double* __restrict__ partial,
                int out_features, int in_features, int group_size, int rows_of_block, int fours, int lanes) {
    in_turn();
    const int strips = up(in_features, fours ? 128 : 32), strip = blockIdx.x % strips, chunk = blockIdx.x / strips;
    const int first = chunk * rows_of_block, rows = min(rows_of_block, out_features - first);
    partial += static_cast<Size>(chunk) * in_features;
    if (fours)
        sum_strip<4>(w, factors, partial, strip, first, rows, in_features, group_size, lanes);
    else
        sum_strip<1>(w, factors, partial, strip, first, rows, in_features, group_size, lanes);
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
