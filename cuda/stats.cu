// accum_stats: mean of |x| and of x^2 per input channel over the tokens; find_abs_max: the largest |x|.
//
// The default sums in double, in an order that only the shape decides. A block owns a strip of 4 LANES channels, a line
// of 128 bytes in each row: LANES threads side by side read 16 bytes each, the others of a warp and the other warps the
// rows below, AHEAD of them at a time. Where the strips alone would leave most of the card idle, the tokens are split
// as well: such blocks leave partial sums, and finish_stats adds them up. accum_stats_atomic does one float atomicAdd
// of |x| and one of x^2 per element; its order, and so its last bits, change from run to run.
#include "column_peaks.cuh"
#include "common.cuh"

#if !defined(LANES) || !defined(THREADS)
#error "threads side by side and those of a block must be given: -DLANES=8 -DTHREADS=1024"
#endif
static_assert(LANES == 8, "LANES is 8: they read one 128-byte line of a row");
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
constexpr int CHANNELS = 4 * LANES;
constexpr int WARPS = THREADS / 32;
constexpr int SIDE = THREADS / LANES;         // rows at a time
constexpr int AHEAD = THREADS > 512 ? 4 : 8;  // loads of a thread in flight: as many as there are registers for

struct Sums {
    double abs[4], sq[4];

    __device__ __forceinline__ void take(float4 v) {
        const double values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            abs[i] += fabs(values[i]);
            sq[i] = fma(values[i], values[i], sq[i]);
        }
    }
};

// The sums of every SIDE-th row, the four channels from `from` on, of which `there` exist.
__device__ __forceinline__ Sums sums_of(const float* from, int rows, int in_features, int there) {
    Sums sums = {};
    const Size step = static_cast<Size>(SIDE) * in_features;
    int row = threadIdx.x / LANES;
    from += static_cast<Size>(row) * in_features;
    if (in_features % 4 == 0) {
        if (there <= 0) return sums;
        for (; row + (AHEAD - 1) * SIDE < rows; row += AHEAD * SIDE, from += AHEAD * step) {
            float4 v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) v[i] = *reinterpret_cast<const float4*>(from + i * step);
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) sums.take(v[i]);
        }
        for (; row < rows; row += SIDE, from += step) sums.take(*reinterpret_cast<const float4*>(from));
    } else {
#pragma unroll 4
        for (; row < rows; row += SIDE, from += step) {
            sums.take(make_float4(there > 0 ? from[0] : 0.0f, there > 1 ? from[1] : 0.0f, there > 2 ? from[2] : 0.0f,
                                  there > 3 ? from[3] : 0.0f));
        }
    }
    return sums;
}

extern "C" __global__ void __launch_bounds__(THREADS) accum_stats(const float* __restrict__ x,
                                                               double* __restrict__ partial,
                                                               float* __restrict__ abs_mean,
                                                               float* __restrict__ sq_mean, int tokens, int in_features,
                                                               int rows_of_block) {
    in_turn();
    __shared__ double parts[2][WARPS][CHANNELS];
    const int strips = (in_features - 1) / CHANNELS + 1;
    const int chunk = blockIdx.x / strips, first_channel = blockIdx.x % strips * CHANNELS;
    const int first_row = chunk * rows_of_block, lane = threadIdx.x % LANES, channel = first_channel + 4 * lane;
    Sums sums = sums_of(x + static_cast<Size>(first_row) * in_features + channel,
                        min(rows_of_block, tokens - first_row), in_features, in_features - channel);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2) {
            sums.abs[i] += __shfl_xor_sync(~0u, sums.abs[i], offset);
            sums.sq[i] += __shfl_xor_sync(~0u, sums.sq[i], offset);
        }
        if (threadIdx.x % 32 < LANES) {
            parts[0][threadIdx.x / 32][4 * lane + i] = sums.abs[i];
            parts[1][threadIdx.x / 32][4 * lane + i] = sums.sq[i];
        }
    }
    __syncthreads();
    if (threadIdx.x >= 2 * CHANNELS) return;
    const int which = threadIdx.x / CHANNELS, place = threadIdx.x % CHANNELS;
    if (first_channel + place >= in_features) return;
    double sum = 0.0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += parts[which][warp][place];
    if (rows_of_block >= tokens)
        (which ? sq_mean : abs_mean)[first_channel + place] = static_cast<float>(sum / tokens);
    else
        partial[(2 * static_cast<Size>(chunk) + which) * in_features + first_channel + place] = sum;
}

extern "C" __global__ void finish_stats(const double* __restrict__ partial, float* __restrict__ abs_mean,
                                        float* __restrict__ sq_mean, int tokens, int in_features, int chunks) {
    in_turn();
    for (Size i = global_thread(); i < 2 * static_cast<Size>(in_features); i += global_threads()) {
        const int which = i / in_features, channel = i % in_features;
        double sum = 0.0;
        // Unrolled so that the loads of several chunks are in flight; the order of the sums stays.
#pragma unroll 8
        for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[static_cast<Size>(chunk) * 2 * in_features + i];
        (which ? sq_mean : abs_mean)[channel] = static_cast<float>(sum / tokens);
    }
}

// Sums, for now: they must be zero at the start, and finish_stats_atomic turns them into means.
extern "C" __global__ void accum_stats_atomic(const float* __restrict__ x, float* __restrict__ abs_mean,
                                              float* __restrict__ sq_mean, Size tokens, Size in_features) {
    in_turn();
    for (Size i = global_thread(); i < tokens * in_features; i += global_threads()) {
        const float value = x[i];
        atomicAdd(&abs_mean[i % in_features], fabsf(value));
        atomicAdd(&sq_mean[i % in_features], value * value);
    }
}

extern "C" __global__ void finish_stats_atomic(float* __restrict__ abs_mean, float* __restrict__ sq_mean, Size tokens,
                                               Size in_features) {
    in_turn();
    for (Size channel = global_thread(); channel < in_features; channel += global_threads()) {
        abs_mean[channel] /= static_cast<float>(tokens);
        sq_mean[channel] /= static_cast<float>(tokens);
    }
}

extern "C" __global__ void __launch_bounds__(PEAK_THREADS) find_abs_max(const float* __restrict__ x,
                                                                     float* __restrict__ abs_max, int tokens,
                                                                     int in_features) {
    in_turn();
    find_column_peaks(x, abs_max, tokens, in_features);
}
