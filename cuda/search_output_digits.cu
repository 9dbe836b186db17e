// The search with objective output on Hopper's tensor cores: exact products of two int8 digits each; see
// search_output.cuh for why, search_output_digits.cuh for how the digits lie.
//
// To the product the candidates of a round are one matrix of many rows. The blocks of a cluster share a tile of tokens,
// each with ROWS rows of its own, and each copies its share of the tokens' digits for all of them. One warp asks for
// the copies; two warpgroups multiply 64 rows each, high and low digits in turn, by both digits of the tile's tokens in
// one instruction: high by high, both mixed products in one sum, low by low. Of the result they keep the sum of squares
// alone. Blocks stay and take tile after tile, in bands of BAND tiles of tokens, so that what all read at a time stays
// in the L2 cache.
#include "search_output_activations.cuh"
#include "search_output_differences.cuh"
#ifdef __CUDACC__
#include "hopper.cuh"
#endif

#if !defined(STAGES) || !defined(CLUSTER) || !defined(BLOCK)
#error "the table of kernels gives the macros: -DSTAGES=3 -DCLUSTER=2 -DBLOCK=384 ..."
#endif
static_assert(TOKENS == 128 && ROWS == 128 && BLOCK == 384, "two warpgroups have 64 rows each, and a third one copies");
static_assert(STAGES >= 2, "a stage is multiplied while others are copied");
static_assert(CLUSTER == 1 || CLUSTER == 2 || CLUSTER == 4, "the blocks of a cluster copy equal shares of a stage");

constexpr int BAND = 8;

#ifdef __CUDACC__

struct Product {
    using Stages = Ring<STAGES, ROW_BYTES + TOKEN_BYTES>;

    const Operands& of;
    const Sizes& sizes;
    Stages ring;
    const unsigned rank;
    const int depths, token_tiles, row_tiles, tiles;

    __device__ __forceinline__ Product(const Operands& operands, const Sizes& given, unsigned shared)
        : of(operands),
          sizes(given),
          ring(shared),
          rank(CLUSTER > 1 ? cluster_rank() : 0),
          depths(up(given.in_features, DEPTH)),
          token_tiles(up(given.tokens, TOKENS)),
          row_tiles(given.row_tiles * given.count / CLUSTER),
          tiles(token_tiles * row_tiles) {}

    __device__ __forceinline__ void run() {
        if (threadIdx.x == 0) {
            for (Stages each = ring; each.phase == 0; each.next()) {
                barrier_init(each.full(), 1);
                barrier_init(each.empty(), WARPS * CLUSTER);
            }
            barrier_init_done();
        }
        __syncthreads();
        if (CLUSTER > 1) cluster_sync();
        // Registers at launch are 168 a thread: the warps that multiply take what the one that copies does not need.
        if (threadIdx.x >= 32 * WARPS) {
            give_registers<40>();
            if (threadIdx.x == 32 * WARPS) copy();
        } else {
            take_registers<232>();
            multiply();
        }
        if (CLUSTER > 1) cluster_sync();  // a block that has ended can take neither copies nor arrivals
    }

    __device__ __forceinline__ void copy() {
        constexpr int SHARE = TOKEN_BYTES / CLUSTER;
        for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
            const Place at(tile, token_tiles, row_tiles, BAND);
            const signed char* tokens = of.x + static_cast<Size>(at.token_tile) * depths * TOKEN_BYTES + rank * SHARE;
            const signed char* rows = of.d + static_cast<Size>(at.row_tile * CLUSTER + rank) * depths * ROW_BYTES;
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth, ring.next()) {
                barrier_wait(ring.empty(), ring.phase ^ 1);
                barrier_expect(ring.full(), ROW_BYTES + TOKEN_BYTES);
                bulk_copy(ring.stage(), rows, ROW_BYTES, ring.full());
                const unsigned to = ring.stage() + ROW_BYTES + rank * SHARE;
                if (CLUSTER > 1)
                    bulk_copy(to, tokens, SHARE, ring.full(), (1 << CLUSTER) - 1);
                else
                    bulk_copy(to, tokens, SHARE, ring.full());
                rows += ROW_BYTES;
                tokens += TOKEN_BYTES;
            }
        }
    }

    // The two warpgroups that multiply, from here on.
    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static Size further(int k) { return k * 32 / PIECE; }

    // Every warp tells every block of the cluster that it has read a stage.
    __device__ __forceinline__ void release(unsigned empty) const {
        if (lane() < CLUSTER) barrier_arrive(empty, lane());
    }

    __device__ __forceinline__ void multiply() {
        for (int tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
            const Place at(tile, token_tiles, row_tiles, BAND);
            int sums[3][64] = {};  // high by high, mixed, low by low
            unsigned before = 0;
#pragma unroll 1
            for (int depth = 0; depth < depths; ++depth, ring.next()) {
                const Size rows = matrix(ring.stage() + threadIdx.x / 128 * 64 * DEPTH);
                const Size tokens = matrix(ring.stage() + ROW_BYTES);
                barrier_wait(ring.full(), ring.phase);
                wgmma_begin();
#pragma unroll
                for (int k = 0; k < DEPTH / 32; ++k) {
                    const Size high = rows + further(k), x_high = tokens + further(k);
                    const Size low = high + ROWS * DEPTH / PIECE, x_low = x_high + TOKENS * DEPTH / PIECE;
                    wgmma(sums[0], high, x_high, 1);
                    wgmma(sums[1], high, x_low, 1);
                    wgmma(sums[2], low, x_low, 1);
                    wgmma(sums[1], low, x_high, 1);
                }
                wgmma_commit();
                wgmma_wait<1>();  // the stage before is read
                if (depth > 0) release(before);
                before = ring.empty();
            }
            wgmma_wait<0>();
#pragma unroll
            for (int i = 0; i < 3; ++i) wgmma_done(sums[i]);
            release(before);
            keep(at, sums);
        }
    }

    // A thread has two rows, 8 apart, of which the four lanes of a quad have all tokens.
    __device__ __forceinline__ void keep(const Place& at, const int (&sums)[3][64]) const {
        float squares[2][2] = {};
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const float value = combined(sums[0][i], sums[1][i], sums[2][i]);
            float& sum = squares[i / 2 % 2][i % 2];
            sum = fmaf(value, value, sum);
        }
        const int warp = threadIdx.x / 32, row_tile = at.row_tile * CLUSTER + rank;
        double sum = 0.0;
#pragma unroll
        for (int below = 0; below < 2; ++below) {
            const double weight = sizes.weight(of.base, row_tile, warp * 16 + lane() / 4 + 8 * below);
            sum += weight * (static_cast<double>(squares[below][0]) + squares[below][1]);
        }
        sum = over_warp(sum, Sum{});
        if (lane() == 0) of.partial[sizes.place<TOKENS>(row_tile, at.token_tile, warp)] = sum;
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
    multiply_plainly<TOKENS>(operands, sizes);
#endif
}
