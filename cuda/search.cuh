// What every search for scales shares: the scales of a candidate, and which candidate is best. All sums have an order
// that only the shape decides.
#pragma once
#include "common.cuh"

#ifndef THREADS
#error "the threads of a block that makes or chooses candidates must be given: -DTHREADS=1024"
#endif
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");

constexpr unsigned ALL_LANES = ~0u;

struct Sum {
    __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};
struct Largest {
    __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

template <typename Combine>
__device__ __forceinline__ double over_warp(double value, Combine combine) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

// The same pair of values for every thread of a block of THREADS.
template <typename Combine>
static __device__ __forceinline__ double2 over_block(double2 values, double neutral, Combine combine) {
    __shared__ double2 of_warps[32];
    const int lane = threadIdx.x % 32;
    values = make_double2(over_warp(values.x, combine), over_warp(values.y, combine));
    __syncthreads();  // whoever still reads the last reduction's values
    if (lane == 0) of_warps[threadIdx.x / 32] = values;
    __syncthreads();
    values = lane < THREADS / 32 ? of_warps[lane] : make_double2(neutral, neutral);
    return make_double2(over_warp(values.x, combine), over_warp(values.y, combine));
}

// A block makes the scales of one candidate and their importance, as quant/search.py does. `rule` holds the floor of
// the statistic, the clamps of `mean`, the least power, and the bounds of any scale.
__device__ __forceinline__ void make_candidate(const float* abs_mean, const float* sq_mean, double exponent,
                                               const double* rule, float* s, double* importance, int in_features,
                                               bool by_mean) {
    const double floor = rule[0], lower = rule[1], upper = rule[2], least = log(rule[3]);
    const double smallest = rule[4], largest = rule[5];
    const auto power_of = [&](double statistic) { return exponent * log(fmax(statistic, floor)); };
    // Gammas are not negative, so the largest and the smallest statistic have the largest and the smallest power.
    double2 ends =
        make_double2(-INFINITY, -INFINITY);  // of those of live channels: the largest, and minus the smallest
    double dead_channels = 0.0;
    for (int k = threadIdx.x; k < in_features; k += THREADS) {
        const double statistic = abs_mean[k];
        if (statistic == 0.0)
            dead_channels = 1.0;
        else
            ends = make_double2(fmax(ends.x, statistic), fmax(ends.y, -statistic));
    }
    ends = over_block(ends, -INFINITY, Largest{});
    const bool live = ends.x > 0.0;
    if (by_mean) {
        const double highest = power_of(ends.x);
        double2 sum_and_count = make_double2(0.0, 0.0);
#pragma unroll 2
        for (int k = threadIdx.x; k < in_features; k += THREADS) {
            const double statistic = abs_mean[k];
            if (statistic == 0.0) continue;
            const double relative = exp(power_of(statistic) - highest);
            importance[k] = relative;  // for now
            sum_and_count.x += relative;
            sum_and_count.y += 1.0;
        }
        sum_and_count = over_block(sum_and_count, 0.0, Sum{});
        const double mean = sum_and_count.x / sum_and_count.y;
        const double of_dead = fmin(fmax(exp(least - highest) / mean, smallest), lower);
        for (int k = threadIdx.x; k < in_features; k += THREADS) {
            const bool dead = abs_mean[k] == 0.0f;
            const double scale = dead ? of_dead : fmin(fmax(importance[k] / mean, lower), upper);
            s[k] = exponent == 0.0 || !live ? 1.0f : static_cast<float>(scale);
        }
    } else {
        const bool any_dead = over_block(make_double2(dead_channels, 0.0), 0.0, Largest{}).x != 0.0;
        const double highest = live ? fmax(power_of(ends.x), least) : least;
        const double lowest = any_dead ? least : fmax(power_of(-ends.y), least);
        for (int k = threadIdx.x; k < in_features; k += THREADS) {
            const double statistic = abs_mean[k];
            const double power = statistic == 0.0 ? least : fmax(power_of(statistic), least);
            const double scale = fmin(fmax(exp(power - (highest + lowest) / 2), smallest), largest);
            s[k] = exponent == 0.0 ? 1.0f : static_cast<float>(scale);
        }
    }
    for (int k = threadIdx.x; k < in_features; k += THREADS) {
        const double inverse = 1.0f / s[k];
        importance[k] = sq_mean[k] * inverse * inverse;
    }
}

// Whether error `a` at gamma `x` is better than `b` at `y`: a tie goes to the smaller gamma.
__device__ __forceinline__ bool better(double a, double x, double b, double y) {
    return a < b || (a == b && x < y);
}

// For every thread of a block: which error is the lowest.
static __device__ __forceinline__ int best_of(const double* error, const double* gamma, int candidates) {
    __shared__ int chosen;
    if (threadIdx.x < 32) {
        double lowest = INFINITY, at = INFINITY;
        int best = 0;
        for (int g = threadIdx.x; g < candidates; g += 32) {
            if (better(error[g], gamma[g], lowest, at)) lowest = error[g], at = gamma[g], best = g;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
            const double other_error = __shfl_xor_sync(ALL_LANES, lowest, offset);
            const double other_gamma = __shfl_xor_sync(ALL_LANES, at, offset);
            const int other = __shfl_xor_sync(ALL_LANES, best, offset);
            if (better(other_error, other_gamma, lowest, at)) lowest = other_error, at = other_gamma, best = other;
        }
        if (threadIdx.x == 0) chosen = best;
    }
    __syncthreads();
    return chosen;
}
