// The search with objective output on the tensor cores of Ampere and later: the same digits as in
// search_output_digits.cu, by the instructions that every such GPU has.
//
// How a block, which has rows of one candidate, copies and multiplies stands in ampere_product.cuh. A warp has both
// digits of both operands in registers for all four products. Of the result it keeps the sum of squares.
#include "search_output_activations.cuh"
#include "search_output_differences.cuh"
#ifdef __CUDACC__
#include "ampere_product.cuh"
#endif

#ifndef BLOCK
#error "the table of kernels gives the macros: -DBLOCK=256 ..."
#endif
static_assert(BLOCK == 256, "eight warps multiply");

constexpr int HALF = TOKENS / 2;

#ifdef __CUDACC__

struct Product {
    static constexpr int STAGE_BYTES = ROW_BYTES + TOKEN_BYTES / 2;

    const Operands& of;
    const Sizes& sizes;
    const unsigned shared;
    const int token_parts, token_part, row_tile;
    int sums[3][ROW_PARTS][TOKEN_PARTS][4] = {};  // high by high, mixed, low by low

    __device__ __forceinline__ Product(const Operands& operands, const Sizes& given, unsigned shared_memory)
        : of(operands),
          sizes(given),
          shared(shared_memory),
          token_parts(up(given.tokens, HALF)),
          token_part(blockIdx.x % token_parts),
          row_tile(blockIdx.x / token_parts) {}

    __device__ __forceinline__ void multiply_step(unsigned stage, int k) {
        unsigned a[2][ROW_PARTS][4];
#pragma unroll
        for (int low = 0; low < 2; ++low)
#pragma unroll
            for (int i = 0; i < ROW_PARTS; ++i) load_rows(a[low][i], stage + low * ROWS * DEPTH, i, k);
#pragma unroll
        for (int j = 0; j < TOKEN_PARTS; j += 2) {
            unsigned b[2][4];
#pragma unroll
            for (int low = 0; low < 2; ++low) load_tokens(b[low], stage + ROW_BYTES + low * HALF * DEPTH, j, k);
#pragma unroll
            for (int digits = 0; digits < 4; ++digits)
#pragma unroll
                for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
                    for (int next = 0; next < 2; ++next) {
                        const int of_a = digits / 2, of_b = digits % 2;
                        multiply_add(sums[of_a + of_b][i][j + next], a[of_a][i], b[of_b][2 * next],
                                     b[of_b][2 * next + 1]);
                    }
        }
    }

    __device__ __forceinline__ void run() {
        const int depths = up(sizes.in_features, DEPTH);
        const signed char* const rows = of.d + static_cast<Size>(row_tile) * depths * ROW_BYTES;
        const signed char* const tokens =
            of.x + static_cast<Size>(token_part / 2) * depths * TOKEN_BYTES + token_part % 2 * HALF * DEPTH;
        each_stage<STAGE_BYTES>(
            shared, depths,
            [&](unsigned to, int depth) {
                const signed char* const from = tokens + static_cast<Size>(depth) * TOKEN_BYTES;
                copy_together<ROW_BYTES>(to, rows + static_cast<Size>(depth) * ROW_BYTES);
                copy_together<HALF * DEPTH>(to + ROW_BYTES, from);
                copy_together<HALF * DEPTH>(to + ROW_BYTES + HALF * DEPTH, from + TOKENS * DEPTH);
            },
            [&](unsigned stage, int k, bool) { multiply_step(stage, k); });
        keep();
    }

    // A thread has four rows, of which the four lanes of a quad have all tokens of the warp.
    __device__ __forceinline__ void keep() const {
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                float squares = 0.0f;
#pragma unroll
                for (int j = 0; j < TOKEN_PARTS; ++j)
#pragma unroll
                    for (int next = 0; next < 2; ++next) {
                        const int e = 2 * below + next;
                        const float value = combined(sums[0][i][j][e], sums[1][i][j][e], sums[2][i][j][e]);
                        squares = fmaf(value, value, squares);
                    }
                sum += sizes.weight(of.base, row_tile, row_of(i) + 8 * below) * squares;
            }
        sum = over_warp(sum, Sum{});
        if (lane() == 0) of.partial[sizes.place<HALF>(row_tile, token_part, threadIdx.x / 32)] = sum;
    }
};

#endif

extern "C" __global__ void __launch_bounds__(BLOCK, 1)
    square_products(const signed char* __restrict__ x_digits, const signed char* __restrict__ d_digits,
                    const double* __restrict__ base, double* __restrict__ partial, int tokens, int out_features,
                    int in_features, int candidates, int chunk, int row_tiles, int round) {
    in_turn();
    const Round now(round, chunk, candidates);
    const Operands operands{x_digits, d_digits, base, partial};
    const Sizes sizes{tokens, out_features, in_features, row_tiles, now.first, now.count};
    if (blockIdx.x / up(tokens, HALF) >= row_tiles * now.count) return;
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char shared[];
    Product(operands, sizes, shared_address(shared)).run();
#else
    multiply_plainly<HALF>(operands, sizes);
#endif
}
