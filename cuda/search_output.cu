// The search with objective output for any sizes and any GPU: products with sums in double.
//
// A block makes SIDE rows by SIDE tokens of one candidate's Y = X * D^T, D made in double where it is read, and leaves
// the sum of its squares. Plain, and the yardstick of search_output_digits.cu, which has the tensor cores.
#include "search_output.cuh"

#if !defined(TILE) || !defined(MICRO)
#error "TILE and MICRO must be given: -DTILE=16 -DMICRO=4"
#endif
static_assert(TILE * TILE % 32 == 0 && TILE * TILE <= 1024, "a block has TILE * TILE threads: whole warps");
static_assert(MICRO >= 1, "MICRO is at least 1: a thread makes MICRO * MICRO outputs");

constexpr int SIDE = MICRO * TILE;

// Blocks: tokens fastest, then rows, then candidates. `partial` is (candidates, blocks of one candidate).
extern "C" __global__ void __launch_bounds__(TILE * TILE) output_errors(
    const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ candidate_s,
    const float* __restrict__ steps, double* __restrict__ partial, int tokens, int out_features, int in_features,
    int group_size, int candidates, int chunk, int round) {
    __shared__ double x_tile[TILE][SIDE + 2], d_tile[TILE][SIDE + 2], sums_of_warps[TILE * TILE / 32];
    const Round now(round, chunk, candidates);
    const int tx = threadIdx.x, ty = threadIdx.y, thread = ty * TILE + tx;
    const int across = up(tokens, SIDE), blocks = across * up(out_features, SIDE);
    const int candidate = blockIdx.x / blocks, block = blockIdx.x % blocks;
    if (candidate >= now.count) return;
    const int first_token = block % across * SIDE, first_row = block / across * SIDE;
    const float* const s = candidate_s + static_cast<Size>(now.first + candidate) * in_features;
    steps += static_cast<Size>(candidate) * out_features;

    double sums[MICRO][MICRO] = {};
    for (int base = 0; base < in_features; base += TILE) {
        const int k = base + tx;
        const float scale = k < in_features ? s[k] : 1.0f;
#pragma unroll
        for (int i = 0; i < MICRO; ++i) {
            const int token = first_token + ty + i * TILE, row = first_row + ty + i * TILE;
            x_tile[tx][ty + i * TILE] =
                token < tokens && k < in_features ? x[static_cast<Size>(token) * in_features + k] : 0.0f;
            d_tile[tx][ty + i * TILE] =
                row < out_features && k < in_features
                    ? exact_difference(w[static_cast<Size>(row) * in_features + k], scale,
                                       steps[static_cast<Size>(k / group_size) * chunk * out_features + row]) /
                          scale
                    : 0.0;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
#pragma unroll
            for (int m = 0; m < MICRO; ++m)
#pragma unroll
                for (int n = 0; n < MICRO; ++n)
                    sums[m][n] = fma(x_tile[i][ty + m * TILE], d_tile[i][tx + n * TILE], sums[m][n]);
        }
        __syncthreads();
    }
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
