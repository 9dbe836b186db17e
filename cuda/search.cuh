// What every search for scales shares: the kernel that makes the scales of candidates, and the choice of the best. All
// sums have an order that only the shape decides.
#pragma once
#include "common.cuh"

#ifndef THREADS
#error "the threads of a block that makes or chooses candidates must be given: -DTHREADS=1024"
#endif
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");

constexpr unsigned ALL_LANES = ~0u;
constexpr float LARGEST_FLOAT = 3.402823466e38f;
constexpr int NO_RANK = 0x7fffffff;  // behind all that candidates have
constexpr float SMALLEST_FLOAT = 1.401298464e-45f;

// The step of symmetric integers up to `largest` in a row or group of this magnitude; see quant/format.py.
__device__ __forceinline__ float step_for(float magnitude, float largest) {
    return magnitude == 0.0f ? 1.0f : fmaxf(magnitude / largest, SMALLEST_FLOAT);
}

// The squared error of one scaled weight in double; infinite where W*s has overflowed.
__device__ __forceinline__ double exact_error(float scaled, float step) {
    if (!(step <= LARGEST_FLOAT)) return static_cast<double>(step) * step;
    const double wide = step;
    const double distance = rint(static_cast<double>(scaled) / wide) * wide - scaled;
    return distance * distance;
}

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

// For every thread of a block: whether it is the last of `blocks` that come here with one counter. It then sees what
// the others have written before. The counter, 0 at first, is 0 again.
[[maybe_unused]] static __device__ __forceinline__ bool last_to_come(unsigned* counter, unsigned blocks) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1u) == blocks - 1;
        if (last) atomicExch(counter, 0u);
        __threadfence();
    }
    __syncthreads();
    return last;
}

// What AutoAWQ adds to the power of the weights; where beta is searched they count as at least this.
constexpr double DUO_OFFSET = 1e-4;

// What the scales of one candidate are made of, as `Candidate` in quant/conventions.py has it.
struct Candidate {
    double gamma, beta;  // the latter NaN where no power of the weights is searched
    bool duo;
    const double* of_weights;  // their statistic

    __device__ __forceinline__ bool asks_weights() const { return duo || beta > 0.0; }

    // The logarithm of a channel's power.
    __device__ __forceinline__ double power(double statistic, double floor, int k) const {
        const double own = gamma * log(fmax(statistic, floor));
        if (!asks_weights()) return own;
        const double weights = of_weights[k];
        if (!duo) return own - beta * log(fmax(weights, DUO_OFFSET));
        return own - log((gamma == 1.0 ? 1.0 : exp((1.0 - gamma) * log(weights))) + DUO_OFFSET);
    }
};

// A block makes the scales of one candidate and their importance, as quant/search.py does, for every `makers`th turn of
// its threads through the channels, from turn `part` on; what follows from all channels each block works out for
// itself. `rule` holds the floor of the statistic, the clamps of `mean`, the logarithm of the least power, and the
// bounds of any scale.
__device__ __forceinline__ void make_candidate(const float* statistics, const float* sq_mean, const Candidate& of,
                                               const double* rule, float* s, double* importance, int in_features,
                                               bool by_mean, int part, int makers) {
    const double floor = rule[0], lower = rule[1], upper = rule[2], least = rule[3];
    const double smallest = rule[4], largest = rule[5];
    const bool asks_weights = of.asks_weights(), of_all = of.gamma > 0.0;  // whether dead channels have the least power
    const auto power_of = [&](double statistic, int k) { return of.power(statistic, floor, k); };
    float most = -INFINITY, fewest = INFINITY;  // of live channels; `fewest` is 0 where there are dead ones
#pragma unroll 4
    for (int k = threadIdx.x; k < in_features; k += THREADS) {
        const float statistic = statistics[k];
        if (statistic != 0.0f) most = fmaxf(most, statistic);
        fewest = fminf(fewest, statistic);
    }
    double2 ends = over_block(make_double2(most, -fewest), -INFINITY, Largest{});
    const bool live = ends.x > 0.0;
    // A scale is exp(power - centre) * factor between bounds.
    double centre, factor = 1.0, from = smallest, to = largest, to_of_dead = largest, kept = 0.0;
    if (by_mean) {
        // Near the largest power, so that nothing overflows: it cancels out. Weights cannot take it far from there.
        const double near = fmax(ends.x, floor);
        centre = of.gamma * (near < 1e38 && near > 1e-37 ? __logf(static_cast<float>(near)) : log(near));
        double2 sum_and_count = make_double2(0.0, 0.0);
        int turn = 0;
        for (int k = threadIdx.x; k < in_features; k += THREADS, ++turn) {
            const double statistic = statistics[k];
            if (statistic == 0.0) continue;
            const double relative = exp(power_of(statistic, k) - centre);
            if (turn == part) kept = relative;
            sum_and_count.x += relative;
            sum_and_count.y += 1.0;
        }
        sum_and_count = over_block(sum_and_count, 0.0, Sum{});
        factor = sum_and_count.y / sum_and_count.x;
        from = lower, to = upper, to_of_dead = lower;
    } else if (asks_weights) {
        ends = make_double2(-INFINITY, -INFINITY);
        for (int k = threadIdx.x; k < in_features; k += THREADS) {
            const double statistic = statistics[k];
            const double power = statistic == 0.0 && of_all ? least : fmax(power_of(statistic, k), least);
            ends = make_double2(fmax(ends.x, power), fmax(ends.y, -power));
        }
        ends = over_block(ends, -INFINITY, Largest{});
        centre = (ends.x - ends.y) / 2;
    } else {
        // Gammas are not negative, so the largest and the smallest statistic have the largest and the smallest power.
        const double highest = live ? fmax(power_of(ends.x, 0), least) : least;
        const double lowest = ends.y == 0.0 ? least : fmax(power_of(-ends.y, 0), least);
        centre = (highest + lowest) / 2;
    }
    const bool all_one = (of.gamma == 0.0 && !asks_weights) || (by_mean && !live);
    for (int turn = part; turn * THREADS < in_features; turn += makers) {
        const int k = turn * THREADS + static_cast<int>(threadIdx.x);
        if (k >= in_features) break;
        const double statistic = statistics[k];
        const bool nothing = statistic == 0.0 && of_all;
        double relative = kept;
        if (nothing)
            relative = exp(least - centre);
        else if (!by_mean)
            relative = exp(fmax(power_of(statistic, k), least) - centre);
        else if (turn != part || statistic == 0.0)
            relative = exp(power_of(statistic, k) - centre);
        const double scale = fmin(fmax(relative * factor, nothing ? smallest : from), nothing ? to_of_dead : to);
        const float rounded = all_one ? 1.0f : static_cast<float>(scale);
        const double inverse = 1.0f / rounded;
        s[k] = rounded;
        importance[k] = sq_mean[k] * inverse * inverse;
    }
}

// A candidate and its error; of two the better has the lower error, or else the lower rank, of which each has its own.
struct Found {
    double error, rank;  // with the rank as an int row_errors spills
    int index;
};

__device__ __forceinline__ Found better(const Found& a, const Found& b) {
    return a.error < b.error || (a.error == b.error && a.rank < b.rank) ? a : b;
}

// For every thread of a block of `Threads`: the best of what they have found.
template <int Threads>
static __device__ __forceinline__ int best_of(Found found) {
    __shared__ Found of_warps[Threads / 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        const Found other = {__shfl_xor_sync(ALL_LANES, found.error, offset),
                             __shfl_xor_sync(ALL_LANES, found.rank, offset),
                             __shfl_xor_sync(ALL_LANES, found.index, offset)};
        found = better(found, other);
    }
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = found;
    __syncthreads();
    for (int warp = 0; warp < Threads / 32; ++warp) found = better(found, of_warps[warp]);
    return found.index;
}

__device__ unsigned blocks_done;  // of the kernel of errors, whose last block chooses

// Blocks: parts of the channels fastest, then candidates.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    candidates(const float* __restrict__ statistics, const float* __restrict__ sq_mean,
               const double* __restrict__ weight_mean, const double* __restrict__ gamma,
               const double* __restrict__ beta, const signed char* __restrict__ duo, const double* __restrict__ rule,
               float* __restrict__ candidate_s, double* __restrict__ importance, int in_features, int by_mean,
               int makers) {
    in_turn();
    const int part = blockIdx.x % makers, g = blockIdx.x / makers;
    const Size row = static_cast<Size>(g) * in_features;
    make_candidate(statistics, sq_mean, {gamma[g], beta[g], duo[g] != 0, weight_mean}, rule, candidate_s + row,
                   importance + row, in_features, by_mean != 0, part, makers);
}

// A block of `Threads`, `Lanes` for each candidate: its error from its `blocks` partial sums, infinite where it has
// overflowed; then the scales of the best.
template <int Threads, int Lanes>
static __device__ __forceinline__ void choose_best(const double* partial, const int* rank, const float* candidate_s,
                                                   double* error, float* s, float* inv_s, int candidates,
                                                   int in_features, int blocks) {
    Found found = {INFINITY, NO_RANK, 0};
    for (int first = 0; first < candidates; first += Threads / Lanes) {
        const int g = first + static_cast<int>(threadIdx.x) / Lanes;
        Found one = {0.0, NO_RANK, g};
        if (g < candidates) {
            one.rank = rank[g];
#pragma unroll 8
            for (int i = threadIdx.x % Lanes; i < blocks; i += Lanes)
                one.error += partial[static_cast<Size>(g) * blocks + i];
        }
#pragma unroll
        for (int offset = Lanes / 2; offset > 0; offset /= 2)
            one.error += __shfl_xor_sync(ALL_LANES, one.error, offset);
        if (g >= candidates) continue;
        if (!(one.error < INFINITY)) one.error = INFINITY;
        if (threadIdx.x % Lanes == 0) error[g] = one.error;
        found = better(found, one);
    }
    const float* const row = candidate_s + static_cast<Size>(best_of<Threads>(found)) * in_features;
#pragma unroll 8
    for (int k = threadIdx.x; k < in_features; k += Threads) {
        const float scale = row[k];
        s[k] = scale;
        inv_s[k] = 1.0f / scale;
    }
}
