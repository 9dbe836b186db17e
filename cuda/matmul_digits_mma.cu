// dequantizeTiled on the tensor cores of Ampere and later, as exact as fp32: three int8 digits of the activations
// (digits.cuh), the same as in matmul_digits.cu, by the instructions that every such GPU has.
//
// How a block copies and multiplies stands in ampere_product.cuh. A warp has its codes in registers once for all three
// digits. Sums of a group, or of so many input channels as cannot overflow, are converted, scaled by the step and added
// up in fp32.
#include "digits.cuh"
#ifdef __CUDACC__
#include "ampere_product.cuh"
#endif

#ifndef THREADS
#error "the table of kernels gives the macros: -DTHREADS=256 ..."
#endif
static_assert(THREADS == 256, "eight warps multiply");

constexpr int BAND = 16;  // halves of tiles of tokens, for the blocks that run at a time

extern "C" __global__ void __launch_bounds__(SPLITTERS) split_digits(
    const float* __restrict__ x, const signed char* __restrict__ wq, const float* __restrict__ inv_s,
    signed char* __restrict__ digits, signed char* __restrict__ low, signed char* __restrict__ codes,
    float* __restrict__ unit, float* __restrict__ low_unit, int tokens, int out_features, int in_features,
    int group_size) {
    split_operands(x, wq, inv_s, digits, low, codes, unit, low_unit, tokens, out_features, in_features, TOKENS, ROWS);
}

#ifdef __CUDACC__

struct Product {
    static constexpr int HALF = TOKENS / 2;
    static constexpr int STAGE_BYTES = CODE_BYTES + 3 * HALF * DEPTH;
    static constexpr int MOST = 1 << 16;  // input channels whose sums cannot overflow, and with them the digits

    const Operands& of;
    const Sizes& sizes;
    const unsigned shared;
    int row, token;  // the first of the block
    float total[ROW_PARTS][TOKEN_PARTS][4] = {}, low_total[ROW_PARTS][TOKEN_PARTS][4] = {};

    __device__ __forceinline__ Product(const Operands& operands, const Sizes& given, unsigned shared_memory)
        : of(operands), sizes(given), shared(shared_memory) {
        const Place at(blockIdx.x, up(given.tokens, HALF), up(given.out_features, ROWS), BAND);
        token = at.token_tile * HALF;
        row = at.row_tile * ROWS;
    }

    // Products of COUNT digits, scaled and added to the result; `from` are the digits of a half tile, `stride` further
    // those of the next stage.
    template <int COUNT>
    __device__ __forceinline__ void multiply(const signed char* from, int stride,
                                             float (&result)[ROW_PARTS][TOKEN_PARTS][4]) {
        const int depths = up(sizes.in_features, DEPTH);
        const signed char* codes = of.codes + static_cast<Size>(row / ROWS) * depths * CODE_BYTES;
        const bool one = sizes.group_size >= sizes.in_features;
        const int steps = (one ? MOST : sizes.group_size) / 32;
        int sums[COUNT][ROW_PARTS][TOKEN_PARTS][4] = {};
        int left = steps, group = 0;
        each_stage<STAGE_BYTES>(
            shared, depths,
            [&](unsigned to, int depth) {
                copy_together<CODE_BYTES>(to, codes + static_cast<Size>(depth) * CODE_BYTES);
                copy_together<COUNT * HALF * DEPTH>(to + CODE_BYTES, from + static_cast<Size>(depth) * stride);
            },
            [&](unsigned stage, int k, bool last) {
                multiply_step<COUNT>(stage, k, sums);
                if (--left == 0 || last) {
                    take<COUNT>(sums, group, result);
                    left = steps;
                    if (!one) ++group;
                }
            });
        __syncthreads();  // all is read before another pass copies
    }

    template <int COUNT>
    __device__ __forceinline__ static void multiply_step(unsigned stage, int k,
                                                         int (&sums)[COUNT][ROW_PARTS][TOKEN_PARTS][4]) {
        unsigned a[ROW_PARTS][4];
#pragma unroll
        for (int i = 0; i < ROW_PARTS; ++i) load_rows(a[i], stage, i, k);
#pragma unroll
        for (int d = 0; d < COUNT; ++d)
#pragma unroll
            for (int j = 0; j < TOKEN_PARTS; j += 2) {
                unsigned b[4];
                load_tokens(b, stage + CODE_BYTES + d * HALF * DEPTH, j, k);
#pragma unroll
                for (int i = 0; i < ROW_PARTS; ++i) {
                    multiply_add(sums[d][i][j], a[i], b[0], b[1]);
                    multiply_add(sums[d][i][j + 1], a[i], b[2], b[3]);
                }
            }
    }

    template <int COUNT>
    __device__ __forceinline__ void take(int (&sums)[COUNT][ROW_PARTS][TOKEN_PARTS][4], int group,
                                         float (&result)[ROW_PARTS][TOKEN_PARTS][4]) const {
#pragma unroll
        for (int i = 0; i < ROW_PARTS; ++i) {
            const int line = row + row_of(i);
            const float step[2] = {of.step_of(sizes, line, group), of.step_of(sizes, line + 8, group)};
#pragma unroll
            for (int j = 0; j < TOKEN_PARTS; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    float sum;
                    if constexpr (COUNT == 3)
                        sum = combined(sums[0][i][j][e], sums[1][i][j][e], sums[2][i][j][e]);
                    else
                        sum = static_cast<float>(sums[0][i][j][e]);
                    result[i][j][e] = fmaf(step[e / 2], sum, result[i][j][e]);
#pragma unroll
                    for (int d = 0; d < COUNT; ++d) sums[d][i][j][e] = 0;
                }
        }
    }

    __device__ __forceinline__ void run() {
        const int depths = up(sizes.in_features, DEPTH), half = token / HALF % 2;
        const Size tile = static_cast<Size>(token / TOKENS) * depths;
        multiply<3>(of.digits + tile * digit_bytes(TOKENS) + half * 3 * HALF * DEPTH, digit_bytes(TOKENS), total);
        const bool wide = __syncthreads_or(of.low_unit[token + threadIdx.x % HALF] != 0.0f);
        if (wide) multiply<1>(of.low + tile * TOKENS * DEPTH + half * HALF * DEPTH, TOKENS * DEPTH, low_total);
#pragma unroll
        for (int j = 0; j < TOKEN_PARTS; ++j)
#pragma unroll
            for (int next = 0; next < 2; ++next) {
                const int at = token + token_of(j) + next;
                if (at >= sizes.tokens) continue;
                const float unit = of.unit[at], low_unit = of.low_unit[at];
                float* const to = of.y + static_cast<Size>(at) * sizes.out_features;
#pragma unroll
                for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
                    for (int below = 0; below < 2; ++below) {
                        const int line = row + row_of(i) + 8 * below;
                        const float base = base_of(*of.steps_of(sizes, line));
                        const float bias = line < sizes.out_features ? of.ending.bias_of(line) : 0.0f;
                        float result = total[i][j][2 * below + next] * unit * base;
                        if (wide) result += low_total[i][j][2 * below + next] * low_unit * base;
                        if (line < sizes.out_features) to[line] = of.ending.apply(result, bias);
                    }
            }
    }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dequantizeTiled(const signed char* __restrict__ digits, const signed char* __restrict__ low,
                    const signed char* __restrict__ codes, const float* __restrict__ unit,
                    const float* __restrict__ low_unit, const float* __restrict__ scale_b,
                    const float* __restrict__ bias, float* __restrict__ y, int tokens, int out_features,
                    int in_features, int group_size, int relu) {
    in_turn();
    const Operands operands{digits, low, codes, unit, low_unit, scale_b, y, {bias, relu != 0}};
    const Sizes sizes{tokens, out_features, in_features, group_size};
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char shared[];
    Product(operands, sizes, shared_address(shared)).run();
#else
    multiply_plainly<TOKENS>(operands, sizes);
#endif
}
