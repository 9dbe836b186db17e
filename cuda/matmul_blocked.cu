// dequantizeTiled, the register-blocked variant: Y = X * (Wq * inv_s * scale_b)^T, 4 x 4 outputs per thread.
//
// A block of TILE x TILE threads makes 4 TILE x 4 TILE outputs, TILE input channels at a time. Each value that a thread
// reads from shared memory serves four products instead of one. Tiles lie transposed, so that the four rows and the
// four columns of a thread are one 16-byte load each. On the way out it may do what the kernel relu does. With ZEROS it
// knows zero points: weights are (code - zero) * inv_s * step, or with float ones (code * step + zero) * inv_s.
#include "common.cuh"
#include "relu.cuh"

#if !defined(TILE) || !defined(MICRO) || !defined(ZEROS)
#error "TILE, MICRO and ZEROS must be given: -DTILE=16 -DMICRO=4 -DZEROS=0"
#endif
static_assert(TILE >= 1 && TILE <= 32, "TILE is 1 to 32: a block has TILE * TILE threads, at most 1,024");
static_assert(MICRO == 4, "MICRO is 4: the outputs of a thread along each side are one 16-byte load");
static_assert(ZEROS == 0 || ZEROS == 1, "ZEROS is 0 or 1: whether there are zero points");

constexpr int SIDE = MICRO * TILE;  // outputs of a block along each side
constexpr int STRIDE = SIDE + 4;    // padded against bank conflicts of the transposed stores, 16-byte aligned
// With 1,024 threads a block each has 64 registers, and of some tiles nvcc spills registers rather than take more: what
// is marked so keeps them from spilling.
constexpr bool CROWDED =
    TILE == 4 || (ZEROS && TILE == 8) || TILE == 12 || (TILE == 17 && !ZEROS) || (TILE >= 25 && TILE != 30);
// Input channels whose products are unrolled: where all of them load more values ahead than there are registers, two.
constexpr int UNROLL = TILE >= 25 && TILE <= 28 ? 2 : TILE;

__device__ __forceinline__ float weight_of(int code, float zero, bool float_zeros, float inverse, float step) {
    const float value = static_cast<float>(code);
    if constexpr (ZEROS == 0) return value * inverse * step;
    return float_zeros ? fmaf(value, step, zero) * inverse : (value - zero) * inverse * step;
}

extern "C" __global__ void __launch_bounds__(TILE * TILE) dequantizeTiled(
    const float* __restrict__ x, const signed char* __restrict__ wq, const float* __restrict__ inv_s,
    const float* __restrict__ scale_b, const float* __restrict__ zero_points, const float* __restrict__ bias,
    float* __restrict__ y, int tokens, int out_features, int in_features, int group_size, int float_zeros, int relu) {
    in_turn();
    __shared__ alignas(16) float x_tile[TILE][STRIDE];
    __shared__ alignas(16) float w_tile[TILE][STRIDE];
    __shared__ float inv_s_tile[2][TILE];
    __shared__ float scale_tile[SIDE];
    __shared__ float zero_tile[ZEROS ? SIDE : 1];

    const int tx = threadIdx.x;
    const int ty = threadIdx.y;
    const unsigned column_blocks = (out_features + SIDE - 1) / SIDE;
    const int first_row = blockIdx.x / column_blocks * SIDE;
    const int first_column = blockIdx.x % column_blocks * SIDE;
    const unsigned size = group_size;  // unsigned quotients take fewer registers
    const unsigned groups = group_count(static_cast<unsigned>(in_features), size);
    const bool one_group = CROWDED ? group_size == in_features : groups == 1;

    float next_x[MICRO];
    int next_code[MICRO];
    // Outside the matrices everything reads as 0, which adds nothing.
    const auto load_next = [&](int k) {
#pragma unroll
        for (int i = 0; i < MICRO; ++i) {
            const int row = first_row + ty + i * TILE;
            const int column = first_column + ty + i * TILE;
            next_x[i] = row < tokens && k < in_features ? x[static_cast<Size>(row) * in_features + k] : 0.0f;
            next_code[i] =
                column < out_features && k < in_features ? wq[static_cast<Size>(column) * in_features + k] : 0;
        }
    };
    const auto load_inv_s = [&](int k) { return k < in_features ? inv_s[k] : 0.0f; };

    if (ty == 0) {
        inv_s_tile[0][tx] = load_inv_s(tx);
        for (int i = tx; i < SIDE; i += TILE) {
            const int column = first_column + i;
            const bool of_row = one_group && column < out_features;
            scale_tile[i] = of_row ? scale_b[column] : 0.0f;
            if constexpr (ZEROS) zero_tile[i] = of_row ? zero_points[column] : 0.0f;
        }
    }
    load_next(tx);
    float sums[MICRO][MICRO] = {};
    __syncthreads();

    int buffer = 0;
    const int start = CROWDED ? 0 : tx;
    for (int step = start; step - start < in_features; step += TILE) {
        const int k = step - start + tx;
        const float inverse = inv_s_tile[buffer][tx];
#pragma unroll
        for (int i = 0; i < MICRO; ++i) {
            const int line = ty + i * TILE;
            const int column = first_column + line;
            float scale = scale_tile[line], zero = 0.0f;
            if constexpr (ZEROS) zero = zero_tile[line];
            // A tile may straddle groups: only the step of a whole row can wait in shared memory.
            if (!one_group && column < out_features && k < in_features) {
                const Size group = static_cast<Size>(column) * groups + k / size;
                scale = scale_b[group];
                if constexpr (ZEROS) zero = zero_points[group];
            }
            x_tile[tx][line] = next_x[i];
            w_tile[tx][line] = weight_of(next_code[i], zero, float_zeros != 0, inverse, scale);
        }
        buffer = 1 - buffer;
        if (ty == 0) inv_s_tile[buffer][tx] = load_inv_s(k + TILE);
        __syncthreads();
        load_next(k + TILE);
#pragma unroll UNROLL
        for (int i = 0; i < TILE; ++i) {
            const float4 rows = *reinterpret_cast<const float4*>(&x_tile[i][MICRO * ty]);
            const float4 columns = *reinterpret_cast<const float4*>(&w_tile[i][MICRO * tx]);
            const float a[MICRO] = {rows.x, rows.y, rows.z, rows.w};
            const float b[MICRO] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
            for (int m = 0; m < MICRO; ++m)
#pragma unroll
                for (int n = 0; n < MICRO; ++n) sums[m][n] = fmaf(a[m], b[n], sums[m][n]);
        }
        __syncthreads();
    }
    const Ending ending{bias, relu != 0};
#pragma unroll
    for (int m = 0; m < MICRO; ++m)
#pragma unroll
        for (int n = 0; n < MICRO; ++n) {
            const int row = first_row + MICRO * ty + m;
            const int column = first_column + MICRO * tx + n;
            if (row < tokens && column < out_features)
                y[static_cast<Size>(row) * out_features + column] = ending.apply(sums[m][n], ending.bias_of(column));
        }
}
