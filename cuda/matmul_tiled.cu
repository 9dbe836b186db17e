// dequantizeTiled, the textbook variant: Y = X * (Wq * inv_s * scale_b)^T, one output per thread.
//
// A block of TILE x TILE threads makes TILE x TILE outputs. Step by step along in_features it puts a tile of X and a
// tile of dequantized weights into shared memory and multiplies them. Two buffers in turn: one barrier a step. The next
// tiles are read from global memory before the current ones are multiplied, so that the reads overlap the products.
#include "common.cuh"

#ifndef TILE
#error "TILE must be given: -DTILE=16"
#endif
static_assert(TILE >= 1 && TILE <= 32, "TILE is 1 to 32: a block has TILE * TILE threads, at most 1,024");

// Four products along in_features at a time, by 16-byte shared loads, where TILE allows. The padding keeps rows 16-byte
// aligned and spreads the rows that a warp reads at once over the banks.
constexpr int VECTOR = TILE % 4 == 0 ? 4 : 1;
constexpr int STRIDE = TILE + VECTOR;
// Before sm_90 each of 1,024 threads gets 32 registers, and with 784 nvcc spills some rather than take more: what is
// marked so keeps them from spilling.
constexpr bool CROWDED = (TILE == 32 && ARCHITECTURE < 900) || TILE == 28;
// So do these tiles where all their products are unrolled.
constexpr bool SPILLING = TILE % 4 == 3 && TILE >= 15;

extern "C" __global__ void __launch_bounds__(TILE * TILE) dequantizeTiled(
    const float* __restrict__ x, const signed char* __restrict__ wq, const float* __restrict__ inv_s,
    const float* __restrict__ scale_b, float* __restrict__ y, int tokens, int out_features, int in_features,
    int group_size) {
    in_turn();
    __shared__ alignas(16) float x_tile[2][TILE][STRIDE];
    __shared__ alignas(16) float w_tile[2][TILE][STRIDE];
    __shared__ float inv_s_tile[2][TILE];
    __shared__ float scale_tile[TILE];

    const int tx = threadIdx.x;
    const int ty = threadIdx.y;
    const unsigned column_blocks = (out_features + TILE - 1) / TILE;
    const int row = blockIdx.x / column_blocks * TILE + ty;
    const int first_column = blockIdx.x % column_blocks * TILE;
    const int loaded_column = first_column + ty;  // the weight row that this thread brings into shared memory
    const int groups = group_count(in_features, group_size);
    const bool one_group = CROWDED ? group_size == in_features : groups == 1;
    const bool row_there = row < tokens;
    const bool weights_there = loaded_column < out_features;
    const float* x_row = x + static_cast<Size>(row) * in_features;
    const signed char* wq_row = wq + static_cast<Size>(loaded_column) * in_features;
    const float* steps_row = scale_b + static_cast<Size>(loaded_column) * groups;

    // Outside the matrices everything reads as 0, which adds nothing.
    const auto load_x = [&](int k) { return row_there && k < in_features ? x_row[k] : 0.0f; };
    const auto load_code = [&](int k) -> int { return weights_there && k < in_features ? wq_row[k] : 0; };
    const auto load_inv_s = [&](int k) { return k < in_features ? inv_s[k] : 0.0f; };
    // A tile may straddle groups: only the step of a whole row can wait in shared memory.
    const auto step_of = [&](int k) {
        if (one_group) return scale_tile[ty];
        return weights_there && k < in_features ? steps_row[k / group_size] : 0.0f;
    };

    if (ty == 0) {
        inv_s_tile[0][tx] = load_inv_s(tx);
        const int column = first_column + tx;
        scale_tile[tx] = one_group && column < out_features ? scale_b[column] : 0.0f;
    }
    float next_x = load_x(tx);
    int next_code = load_code(tx);
    float sum = 0.0f;
    __syncthreads();

    int buffer = 0;
    const int start = CROWDED ? 0 : tx;
    for (int step = start; step - start < in_features; step += TILE) {
        const int k = step - start + tx;
        x_tile[buffer][ty][tx] = next_x;
        w_tile[buffer][ty][tx] = static_cast<float>(next_code) * inv_s_tile[buffer][tx] * step_of(k);
        if (ty == 0) inv_s_tile[1 - buffer][tx] = load_inv_s(k + TILE);
        __syncthreads();
        next_x = load_x(k + TILE);
        next_code = load_code(k + TILE);
        if constexpr (VECTOR == 4) {
#pragma unroll
            for (int i = 0; i < TILE; i += 4) {
                const float4 a = *reinterpret_cast<const float4*>(&x_tile[buffer][ty][i]);
                const float4 b = *reinterpret_cast<const float4*>(&w_tile[buffer][tx][i]);
                sum = fmaf(a.x, b.x, sum);
                sum = fmaf(a.y, b.y, sum);
                sum = fmaf(a.z, b.z, sum);
                sum = fmaf(a.w, b.w, sum);
            }
        } else if constexpr (SPILLING) {
#pragma unroll 4
            for (int i = 0; i < TILE; ++i) sum = fmaf(x_tile[buffer][ty][i], w_tile[buffer][tx][i], sum);
        } else {
#pragma unroll
            for (int i = 0; i < TILE; ++i) sum = fmaf(x_tile[buffer][ty][i], w_tile[buffer][tx][i], sum);
        }
        buffer = 1 - buffer;
    }
    const int column = first_column + tx;
    if (row_there && column < out_features) y[static_cast<Size>(row) * out_features + column] = sum;
}
