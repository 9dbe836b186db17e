// accum_stats: mean of |x| and of x^2 per input channel over the tokens.
//
// The default sums in double, in an order that only the shape decides: blocks of ROWS_PER_BLOCK tokens leave partial
// sums, finish_stats adds them up. accum_stats_atomic does one float atomicAdd of |x| and one of x^2 per element; its
// order, and so its last bits, change from run to run.
#include "common.cuh"

#if !defined(CHANNELS) || !defined(WARPS) || !defined(ROWS_PER_BLOCK)
#error "channels, rows in flight and rows of a block must be given: -DCHANNELS=32 -DWARPS=8 -DROWS_PER_BLOCK=64"
#endif
static_assert(CHANNELS == 32, "CHANNELS is 32: a warp reads one 128-byte line of a row");
static_assert(WARPS >= 1 && WARPS <= 32, "WARPS is 1 to 32: a block has CHANNELS * WARPS threads, at most 1,024");
static_assert(ROWS_PER_BLOCK % WARPS == 0, "ROWS_PER_BLOCK is a multiple of WARPS: each warp takes as many rows");

extern "C" __global__ void __launch_bounds__(CHANNELS * WARPS) accum_stats(const float* __restrict__ x,
                                                                        double* __restrict__ partial_abs,
                                                                        double* __restrict__ partial_sq, Size tokens,
                                                                        Size in_features) {
    __shared__ double abs_sums[WARPS][CHANNELS];
    __shared__ double sq_sums[WARPS][CHANNELS];
    const Size channel_blocks = (in_features + CHANNELS - 1) / CHANNELS;
    const Size chunk = blockIdx.x / channel_blocks;
    const Size channel = blockIdx.x % channel_blocks * CHANNELS + threadIdx.x;
    const Size first = chunk * ROWS_PER_BLOCK + threadIdx.y;

    double abs_sum = 0.0;
    double sq_sum = 0.0;
    if (channel < in_features) {
#pragma unroll
        for (int step = 0; step < ROWS_PER_BLOCK / WARPS; ++step) {
            const Size row = first + step * WARPS;
            // A missing row adds 0, so that all loads of the loop can be in flight at once.
            const double value = row < tokens ? static_cast<double>(x[row * in_features + channel]) : 0.0;
            abs_sum += fabs(value);
            sq_sum += value * value;
        }
    }
    abs_sums[threadIdx.y][threadIdx.x] = abs_sum;
    sq_sums[threadIdx.y][threadIdx.x] = sq_sum;
    __syncthreads();
    if (threadIdx.y == 0 && channel < in_features) {
        for (int warp = 1; warp < WARPS; ++warp) {
            abs_sum += abs_sums[warp][threadIdx.x];
            sq_sum += sq_sums[warp][threadIdx.x];
        }
        partial_abs[chunk * in_features + channel] = abs_sum;
        partial_sq[chunk * in_features + channel] = sq_sum;
    }
}

extern "C" __global__ void finish_stats(const double* __restrict__ partial_abs, const double* __restrict__ partial_sq,
                                        float* __restrict__ abs_mean, float* __restrict__ sq_mean, Size tokens,
                                        Size in_features) {
    const Size chunks = (tokens + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
    for (Size channel = global_thread(); channel < in_features; channel += global_threads()) {
        double abs_sum = 0.0;
        double sq_sum = 0.0;
        // Unrolled so that the loads of several chunks are in flight; the order of the sums stays.
#pragma unroll 8
        for (Size chunk = 0; chunk < chunks; ++chunk) {
            abs_sum += partial_abs[chunk * in_features + channel];
            sq_sum += partial_sq[chunk * in_features + channel];
        }
        abs_mean[channel] = static_cast<float>(abs_sum / static_cast<double>(tokens));
        sq_mean[channel] = static_cast<float>(sq_sum / static_cast<double>(tokens));
    }
}

// Sums, for now: they must be zero at the start, and finish_stats_atomic turns them into means.
extern "C" __global__ void accum_stats_atomic(const float* __restrict__ x, float* __restrict__ abs_mean,
                                              float* __restrict__ sq_mean, Size tokens, Size in_features) {
    for (Size i = global_thread(); i < tokens * in_features; i += global_threads()) {
        const float value = x[i];
        atomicAdd(&abs_mean[i % in_features], fabsf(value));
        atomicAdd(&sq_mean[i % in_features], value * value);
    }
}

extern "C" __global__ void finish_stats_atomic(float* __restrict__ abs_mean, float* __restrict__ sq_mean, Size tokens,
                                               Size in_features) {
    for (Size channel = global_thread(); channel < in_features; channel += global_threads()) {
        abs_mean[channel] /= static_cast<float>(tokens);
        sq_mean[channel] /= static_cast<float>(tokens);
    }
}
