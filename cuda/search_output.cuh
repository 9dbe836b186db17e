// What the searches with objective output on tensor cores share: the steps of every candidate, and the operands.
//
// The error of candidate g is the mean over tokens m and rows n of Y^2, Y = sum_k x[m][k] * D[n][k]: one product with
// the difference D = d / s of the weights, d = step * q - W*s, of which nothing but the sum of its squares is kept.
// Products of int8 matrices are exact, so both operands become two digits, 256 * high + low, of one fixed point each:
//     x[m][k] = unit[k] * a[m][k],   D[n][k] * unit[k] = base[n] / SPAN * b[n][k],   |a| and |b| at most SPAN and a
//     bit, Y = base[n] / SPAN * (65536 S_hh + 256 (S_hl + S_lh) + S_ll),   S = sum of digit * digit, exact in int32.
// Every channel of the activations has a unit of its own, the same for all candidates: so a layer's activations are
// split once, and a channel that is 100 times larger takes no bits from the others. What is lost is the rounding to a
// and b:
// - `unit` is fitted after the rounding to a, so that the sum of squares of a channel is right to second order: else an
//   error whose most comes from one channel would be off by what few tokens' roundings come to.
// - A channel has room above its largest element where its elements are small beside the largest of all (see `room`).
//   Its part of b is larger by as much, and rounding b to a multiple that the largest channel sets costs it less.
// - `base` leaves out that channel of a row which has the largest weight where its d vanishes, as the row's largest
//   magnitude does by the choice of the step.
#pragma once
#include "search_diag.cuh"
#include "search_rounds.cuh"

constexpr float SPAN = 127 * 256;  // of a and b: the largest has a low digit of 0
constexpr int WARPS = 8;           // of a block, where nothing else is said

// d of one weight in double, with the very code that quantize_awq gives it.
__device__ __forceinline__ double exact_difference(float w, float s, float step) {
    const float code = fminf(fmaxf(rintf(w * s / step), -LARGEST), LARGEST);
    return static_cast<double>(code) * step - static_cast<double>(w) * s;
}

constexpr int STEP_ROWS = 8, STEP_CANDIDATES = 4;  // of a warp
static_assert(STEP_ROWS * STEP_CANDIDATES == 32, "a lane for each step");

// The steps (groups, chunk, out_features) of a round's candidates. A warp takes STEP_ROWS rows, group by group, for
// STEP_CANDIDATES candidates, whose scales the warps of a block share in the cache. Blocks: candidates fastest.
extern "C" __global__ void __launch_bounds__(WARPS * 32) row_steps(const float* __restrict__ w,
                                                                const float* __restrict__ candidate_s,
                                                                float* __restrict__ steps, int out_features,
                                                                int in_features, int group_size, int candidates,
                                                                int chunk, int round) {
    in_turn();
    const Round now(round, chunk, candidates);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int parts = up(chunk, STEP_CANDIDATES), groups = group_count(in_features, group_size);
    const int first = blockIdx.x % parts * STEP_CANDIDATES;
    const int row = (static_cast<int>(blockIdx.x / parts) * WARPS + warp) * STEP_ROWS;
    if (row >= out_features || first >= now.count) return;
    const float *line[STEP_ROWS], *s[STEP_CANDIDATES];
#pragma unroll
    for (int r = 0; r < STEP_ROWS; ++r)
        line[r] = w + static_cast<Size>(min(row + r, out_features - 1)) * in_features + lane;
#pragma unroll
    for (int g = 0; g < STEP_CANDIDATES; ++g)
        s[g] = candidate_s + static_cast<Size>(now.first + min(first + g, now.count - 1)) * in_features + lane;
    const int my_row = row + lane / STEP_CANDIDATES, mine = first + lane % STEP_CANDIDATES;
    for (int group = 0; group < groups; ++group) {
        const int begin = group * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        int largest[STEP_ROWS][STEP_CANDIDATES] = {};  // the bits of floats that are not negative: they order alike
        const auto take = [&](int k, int next) {
            float weight[STEP_ROWS][2];
#pragma unroll
            for (int r = 0; r < STEP_ROWS; ++r) weight[r][0] = fabsf(line[r][k]), weight[r][1] = fabsf(line[r][next]);
#pragma unroll
            for (int g = 0; g < STEP_CANDIDATES; ++g) {
                const float one = s[g][k], two = s[g][next];
#pragma unroll
                for (int r = 0; r < STEP_ROWS; ++r)
                    largest[r][g] = __vimax3_s32(largest[r][g], __float_as_int(weight[r][0] * one),
                                                 __float_as_int(weight[r][1] * two));
            }
        };
        int k = begin;
#pragma unroll 1
        for (; k + 64 <= end; k += 64) take(k, k + 32);
        if (k + lane < end) take(k, k + 32 + lane < end ? k + 32 : k);
        int found = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const int value = __reduce_max_sync(ALL_LANES, largest[i / STEP_CANDIDATES][i % STEP_CANDIDATES]);
            if (lane == i) found = value;
        }
        if (my_row < out_features && mine < now.count)
            steps[(static_cast<Size>(group) * chunk + mine) * out_features + my_row] = step_of(__int_as_float(found));
    }
}
