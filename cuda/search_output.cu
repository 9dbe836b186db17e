// The search with objective output for any sizes, every format and any GPU: products with sums in double.
//
// The error of a candidate is the mean over tokens and rows of Y^2, Y = X * D^T, where D is what quantization with its
// scales takes from the weights. A warp makes the step and the zero point of a group; then a block makes SIDE rows by
// SIDE tokens of one candidate's Y, D made in double where it is read, and leaves the sum of its squares. Plain, and
// the yardstick of search_output_digits.cu, which has the tensor cores.
#include "double_product.cuh"
#include "search_formats.cuh"
#include "search_rounds.cuh"

static_assert(TILE * TILE % 32 == 0, "a block has TILE * TILE threads: whole warps");

// The steps and zero points (candidates of the round, out_features, groups).
extern "C" __global__ void candidate_groups(const float* __restrict__ w, const float* __restrict__ candidate_s,
                                            const float* __restrict__ form, const float* __restrict__ tensor_scales,
                                            float* __restrict__ steps, float* __restrict__ zeros, int out_features,
                                            int in_features, int group_size, int candidates, int chunk, int round) {
    in_turn();
    const Form to(form);
    const Round now(round, chunk, candidates);
    const Size groups = group_count(in_features, group_size), of_one = out_features * groups;
    for (Size at = global_thread() / 32; at < now.count * of_one; at += global_threads() / 32) {
        const Size candidate = now.first + at / of_one, row = at % of_one / groups;
        const int begin = static_cast<int>(at % groups) * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        const Group found = fit_by_warp(to, w + row * in_features, candidate_s + candidate * in_features, begin, end,
                                        to.top > 0.0f ? tensor_scales[candidate] : 1.0f);
        if (threadIdx.x % 32 != 0) continue;
        steps[at] = found.step;
        if (to.zeros != 0) zeros[at] = found.zero;
    }
}

// Of a multiprocessor; on sm_80 the compiler needs more registers than three leave.
constexpr int ERROR_BLOCKS = ARCHITECTURE >= 900 ? 3 : 2;

// Blocks: tokens fastest, then rows, then candidates. `partial` is (candidates, blocks of one candidate).
extern "C" __global__ void __launch_bounds__(TILE* TILE, ERROR_BLOCKS)
    output_errors(const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ candidate_s,
                  const float* __restrict__ form, const float* __restrict__ steps, const float* __restrict__ zeros,
                  double* __restrict__ partial, int tokens, int out_features, int in_features, int group_size,
                  int candidates, int chunk, int round) {
    in_turn();
    __shared__ DoubleTiles tiles;
    __shared__ double sums_of_warps[TILE * TILE / 32];
    const Form to(form);
    const Round now(round, chunk, candidates);
    const int thread = threadIdx.y * TILE + threadIdx.x;
    const int across = up(tokens, SIDE), blocks = across * up(out_features, SIDE);
    const int candidate = blockIdx.x / blocks, block = blockIdx.x % blocks;
    if (candidate >= now.count) return;
    const int first_token = block % across * SIDE, first_row = block / across * SIDE;
    const float* const s = candidate_s + static_cast<Size>(now.first + candidate) * in_features;
    const Size groups = group_count(in_features, group_size), before = candidate * out_features * groups;

    double sums[MICRO][MICRO] = {};
    const auto activations = [=](int k) {
        return [=](int token) {
            token += first_token;
            return token < tokens && k < in_features ? x[static_cast<Size>(token) * in_features + k] : 0.0f;
        };
    };
    // What quantization takes from a weight, with the very code that quantize_awq gives it.
    const auto differences = [=, &to](int k) {
        const bool inside = k < in_features;
        const float scale = inside ? s[k] : 1.0f;
        const double inverse = 1.0 / scale;
        const Size groups_before = before + (inside ? k / group_size : 0);
        return [=, &to](int row) {
            row += first_row;
            if (row >= out_features || !inside) return 0.0;
            const float weight = w[static_cast<Size>(row) * in_features + k];
            const Size group = groups_before + row * groups;
            const Group of = {steps[group], to.zeros == 0 ? 0.0f : zeros[group]};
            return fma(to.value(to.code(__fmul_rn(weight, scale), of), of), inverse, -static_cast<double>(weight));
        };
    };
    add_products(tiles, sums, in_features, activations, differences);
    double sum = 0.0;
#pragma unroll
    for (int m = 0; m < MICRO; ++m)
#pragma unroll
        for (int n = 0; n < MICRO; ++n) sum = fma(sums[m][n], sums[m][n], sum);
    sum = over_warp(sum, Sum{});
    if (thread % 32 == 0) sums_of_warps[thread / 32] = sum;
    __syncthreads();
    if (thread == 0) {
        sum = 0.0;
        for (int warp = 0; warp < TILE * TILE / 32; ++warp) sum += sums_of_warps[warp];
        partial[static_cast<Size>(now.first + candidate) * blocks + block] =
            sum / (static_cast<double>(tokens) * out_features);
    }
}
