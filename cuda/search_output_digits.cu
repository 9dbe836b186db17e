// The search with objective output on Hopper's tensor cores: exact products of two int8 digits each; see
// search_output.cuh for why, search_output_digits.cuh for how the digits lie.
//
// To the product the candidates of a round are one matrix of many rows. How blocks, copies and warpgroups work together
// stands in hopper_product.cuh. A warpgroup multiplies high and low digits of its rows in turn by those of the tile's
// tokens: high by high, both mixed products in one sum, low by low. Of the result it keeps the sum of squares alone.
#include "search_output_activations.cuh"
#include "search_output_differences.cuh"
#ifdef __CUDACC__
#include "hopper_product.cuh"
#endif

#if !defined(STAGES) || !defined(CLUSTER) || !defined(BLOCK)
#error "the table of kernels gives the macros: -DSTAGES=3 -DCLUSTER=2 -DBLOCK=384 ..."
#endif
static_assert(TOKENS == 128, "a wgmma has one digit of these");
static_assert(STAGES >= 2, "a stage is multiplied while others are copied");
static_assert(BLOCK == 384, "two warpgroups multiply, and a third one copies");

#ifdef __CUDACC__

struct Product {
    const Operands& of;
    const Sizes& sizes;
    Pipeline<STAGES, ROW_BYTES, TOKEN_BYTES> pipeline;

    __device__ __forceinline__ Product(const Operands& operands, const Sizes& given, unsigned shared)
        : of(operands),
          sizes(given),
          pipeline(shared, up(given.in_features, DEPTH), up(given.tokens, TOKENS),
                   given.row_tiles * given.count / CLUSTER) {}

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

    __device__ __forceinline__ void run() {
        pipeline.run([&] { copy(); }, [&] { multiply(); });
    }

    __device__ __forceinline__ void copy() {
        if (lane() != 0) return;
        pipeline.each_tile([&](int token_tile, int row_tile) {
            pipeline.copy(of.d + static_cast<Size>(row_tile) * pipeline.depths * ROW_BYTES,
                          of.x + static_cast<Size>(token_tile) * pipeline.depths * TOKEN_BYTES, TOKEN_BYTES);
        });
    }

    // The two warpgroups that multiply, from here on.
    __device__ __forceinline__ void multiply() {
        pipeline.each_tile([&](int token_tile, int row_tile) {
            int sums[3][64] = {};  // high by high, mixed, low by low
            pipeline.each_stage([&](Size rows, Size tokens) {
#pragma unroll
                for (int k = 0; k < DEPTH; k += 32) {
                    const Size high = rows + further(k), x_high = tokens + further(k);
                    const Size low = high + further(ROWS * DEPTH), x_low = x_high + further(TOKENS * DEPTH);
                    wgmma(sums[0], high, x_high, 1);
                    wgmma(sums[1], high, x_low, 1);
                    wgmma(sums[2], low, x_low, 1);
                    wgmma(sums[1], low, x_high, 1);
                }
            });
#pragma unroll
            for (int i = 0; i < 3; ++i) wgmma_done(sums[i]);
            keep(token_tile, row_tile, sums);
        });
    }

    // A thread has two rows, 8 apart, of which the four lanes of a quad have all tokens.
    __device__ __forceinline__ void keep(int token_tile, int row_tile, const int (&sums)[3][64]) const {
        float squares[2][2] = {};
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const float value = combined(sums[0][i], sums[1][i], sums[2][i]);
            float& sum = squares[i / 2 % 2][i % 2];
            sum = fmaf(value, value, sum);
        }
        const int warp = threadIdx.x / 32;
        double sum = 0.0;
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const double weight = sizes.weight(of.base, row_tile, warp * 16 + lane() / 4 + 8 * below);
            sum += weight * (static_cast<double>(squares[below][0]) + squares[below][1]);
        }
        sum = over_warp(sum, Sum{});
        if (lane() == 0) of.partial[sizes.place<TOKENS>(row_tile, token_tile, warp)] = sum;
    }
};

#endif

extern "C" __global__ void __launch_bounds__(BLOCK, 1) __cluster_dims__(CLUSTER, 1, 1)
    square_products(const signed char* __restrict__ x_digits, const signed char* __restrict__ d_digits,
                    const double* __restrict__ base, double* __restrict__ partial, int tokens, int out_features,
                    int in_features, int candidates, int chunk, int row_tiles, int round) {
    const Round now(round, chunk, candidates);
    const Operands operands{x_digits, d_digits, base, partial};
    const Sizes sizes{tokens, out_features, in_features, row_tiles, now.first, now.count};
#ifdef __CUDACC__
    extern __shared__ __align__(1024) unsigned char shared[];
    Product(operands, sizes, shared_address(shared)).run();
#else
    in_turn();
    multiply_plainly<TOKENS>(operands, sizes);
#endif
}
