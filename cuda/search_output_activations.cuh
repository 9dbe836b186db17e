// The search with objective output: what the digits of the activations are, for all candidates alike, and what of W
// follows from their units; see search_output.cuh.
#pragma once
#include "column_peaks.cuh"
#include "search_output_digits.cuh"

constexpr int WIDE_WARPS = 32;  // of a block that has all tokens of its channels

// The largest magnitude of every channel. A block has 32 channels.
extern "C" __global__ void __launch_bounds__(PEAK_THREADS) column_peaks(const float* __restrict__ x,
                                                                     float* __restrict__ peak, int tokens,
                                                                     int in_features) {
    in_turn();
    find_column_peaks(x, peak, tokens, in_features);
}

// What a = SPAN stands for: the largest magnitude of the channel, or more where that lies far below the largest of all,
// up to 16 times the root of the mean square, so that a keeps 11 bits.
__device__ __forceinline__ float room(float peak, float sq_mean, float largest) {
    const float root = sqrtf(sq_mean);
    return fmaxf(peak, fminf(sqrtf(root) * sqrtf(largest), 16.0f * root));
}

// The digits of the activations, their units, and factor[g][k] = unit[k] / s[g][k]. A block has DEPTH channels.
extern "C" __global__ void __launch_bounds__(WIDE_WARPS * 32) split_activations(
    const float* __restrict__ x, const float* __restrict__ sq_mean, const float* __restrict__ peak,
    const float* __restrict__ candidate_s, signed char* __restrict__ x_digits, float* __restrict__ unit,
    float* __restrict__ factor, int tokens, int in_features, int candidates) {
    in_turn();
    __shared__ int of_warps[WIDE_WARPS];
    __shared__ double sums[WIDE_WARPS][DEPTH];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int depth = blockIdx.x, depths = gridDim.x;
    const int k = depth * DEPTH + lane * 4;
    int largest = 0;
    for (int i = threadIdx.x; i < in_features; i += WIDE_WARPS * 32) largest = max(largest, __float_as_int(peak[i]));
    largest = __reduce_max_sync(ALL_LANES, largest);
    if (lane == 0) of_warps[warp] = largest;
    __syncthreads();
    largest = __reduce_max_sync(ALL_LANES, of_warps[lane]);

    float whole[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
        whole[j] = k + j < in_features ? room(peak[k + j], sq_mean[k + j], __int_as_float(largest)) : 0.0f;
    double products[4] = {}, squares[4] = {};
    const int padded = up(tokens, TOKENS) * TOKENS;
#pragma unroll 2
    for (int token = warp; token < padded; token += WIDE_WARPS) {
        const Columns<4> value = four(x + static_cast<Size>(token) * in_features, k, in_features, token < tokens);
        int bits[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float part = whole[j] > 0.0f && whole[j] <= LARGEST_FLOAT ? value.v[j] / whole[j] : 0.0f;
            bits[j] = biased(part * SPAN);
            const double a = bits[j] - __float_as_int(MAGIC) - BIAS;
            products[j] += a * part;
            squares[j] += a * a;
        }
        signed char* const tile = x_digits + (static_cast<Size>(token / TOKENS) * depths + depth) * TOKEN_BYTES;
        Digits(bits).store(tile, TOKENS, token % TOKENS, lane * 4);
    }
    double product = 0.0, square = 0.0;  // of the channel of this thread, in the first DEPTH threads
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][lane * 4 + j] = products[j];
    __syncthreads();
    if (threadIdx.x < DEPTH)
        for (int other = 0; other < WIDE_WARPS; ++other) product += sums[other][threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[warp][lane * 4 + j] = squares[j];
    __syncthreads();
    const int mine = depth * DEPTH + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= DEPTH || mine >= in_features) return;
    for (int other = 0; other < WIDE_WARPS; ++other) square += sums[other][threadIdx.x];
    const float of_mine = room(peak[mine], sq_mean[mine], __int_as_float(largest));
    // Not a number where the activations are none: so is the error then.
    const double fitted = square > 0.0 ? of_mine * (product / square) : of_mine * 0.0f;
    unit[mine] = static_cast<float>(fitted);
    for (int g = 0; g < candidates; ++g) {
        const Size at = static_cast<Size>(g) * in_features + mine;
        factor[at] = static_cast<float>(fitted / candidate_s[at]);
    }
}

// One more factor beside the largest so far, whose it is, and the largest of the others.
__device__ __forceinline__ void take(float& first, float& second, int& channel, float value, int k) {
    // Not a number counts as the largest.
    if (value > first || (value == first && k < channel) || value != value) {
        second = first;
        first = value;
        channel = k;
    } else {
        second = fmaxf(second, value);
    }
}

// Of every candidate's group, (candidates, groups, 3): the largest factor, that of the others, and whose it is. A warp
// has a group.
extern "C" __global__ void __launch_bounds__(WARPS * 32) top_factors(const float* __restrict__ factor,
                                                                  float* __restrict__ tops, int in_features,
                                                                  int group_size, int candidates) {
    in_turn();
    const int lane = threadIdx.x % 32;
    const int groups = group_count(in_features, group_size);
    const Size at = static_cast<Size>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (at >= static_cast<Size>(candidates) * groups) return;
    const int begin = static_cast<int>(at % groups) * group_size;
    const int end = group_size < in_features - begin ? begin + group_size : in_features;
    const float* const row = factor + at / groups * in_features;
    float first = -1.0f, second = 0.0f;
    int channel = begin;
#pragma unroll 8
    for (int k = begin + lane; k < end; k += 32) take(first, second, channel, row[k], k);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const float other_first = __shfl_xor_sync(ALL_LANES, first, offset);
        const float other_second = __shfl_xor_sync(ALL_LANES, second, offset);
        const int other = __shfl_xor_sync(ALL_LANES, channel, offset);
        take(first, second, channel, other_first, other);
        second = fmaxf(second, other_second);
    }
    if (lane == 0) {
        tops[3 * at] = first;
        tops[3 * at + 1] = fmaxf(second, 0.0f);
        tops[3 * at + 2] = __int_as_float(channel);
    }
}

// The largest |w * unit| of every group, (groups, out_features): d is never larger than W*s, so neither D * unit than
// this. A warp has a row. Where groups are whole tiles, `piece_maxima` makes it.
extern "C" __global__ void __launch_bounds__(WARPS * 32) row_reaches(const float* __restrict__ w,
                                                                  const float* __restrict__ unit,
                                                                  float* __restrict__ reaches, int out_features,
                                                                  int in_features, int group_size) {
    in_turn();
    const int lane = threadIdx.x % 32, groups = group_count(in_features, group_size);
    const Size row = static_cast<Size>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (row >= out_features) return;
    const float* const line = w + row * in_features;
    for (int group = 0; group < groups; ++group) {
        const int begin = group * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        float largest = 0.0f;
#pragma unroll 8
        for (int k = begin + lane; k < end; k += 32) largest = fmaxf(largest, fabsf(line[k] * unit[k]));
        largest = __int_as_float(__reduce_max_sync(ALL_LANES, __float_as_int(largest)));
        if (lane == 0) reaches[static_cast<Size>(group) * out_features + row] = largest;
    }
}
