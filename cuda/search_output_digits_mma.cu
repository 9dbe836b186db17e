// The search with objective output on the tensor cores of Ampere and later: the same digits as in
// search_output_digits.cu, by the instructions that every such GPU has.
//
// A block makes ROWS rows of one candidate by half a tile of tokens. While STAGES - 1 stages are copied, its eight
// warps multiply one: 32 rows by 32 tokens each, both digits of them in registers for all four products. Of the result
// a warp keeps the sum of squares.
#include "search_output_activations.cuh"
#include "search_output_differences.cuh"
#ifdef __CUDACC__
#include "ampere.cuh"
#endif

#if !defined(STAGES) || !defined(BLOCK)
#error "the table of kernels gives the macros: -DSTAGES=2 -DBLOCK=256 ..."
#endif
static_assert(TOKENS == 128 && ROWS == 128 && BLOCK == 256, "eight warps have 32 rows by 32 of 64 tokens each");
static_assert(STAGES >= 2, "one stage is multiplied while another is copied");

constexpr int HALF = TOKENS / 2;

#ifdef __CUDACC__

struct Product {
    static constexpr int STAGE_BYTES = ROW_BYTES + TOKEN_BYTES / 2;
    // 16 rows and 8 tokens are what an instruction makes; a thread has 4 sums of it.
    static constexpr int ROW_PARTS = 2, TOKEN_PARTS = 4;

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

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static int first_row() { return threadIdx.x / 32 % 4 * 32; }
    __device__ __forceinline__ static int first_token() { return threadIdx.x / 128 * 32; }

    // Bytes that lie one after another, by all threads.
    template <int BYTES>
    __device__ __forceinline__ static void copy(unsigned to, const signed char* from) {
#pragma unroll
        for (int i = 0; i < BYTES / PIECE / BLOCK; ++i) {
            const int byte = (i * BLOCK + threadIdx.x) * PIECE;
            copy_piece(to + byte, from + byte);
        }
    }

    __device__ __forceinline__ void multiply_step(unsigned stage, int k) {
        unsigned a[2][ROW_PARTS][4];
#pragma unroll
        for (int low = 0; low < 2; ++low)
#pragma unroll
            for (int i = 0; i < ROW_PARTS; ++i) {
                const int line = first_row() + 16 * i + lane() % 16;
                load_matrices(a[low][i], stage + (low * ROWS + line) * DEPTH + swizzled(line, k + lane() / 16 * PIECE));
            }
#pragma unroll
        for (int j = 0; j < TOKEN_PARTS; j += 2) {
            unsigned b[2][4];
            const int line = first_token() + 8 * j + lane() / 16 * 8 + lane() % 8;
#pragma unroll
            for (int low = 0; low < 2; ++low)
                load_matrices(b[low], stage + ROW_BYTES + (low * HALF + line) * DEPTH +
                                          swizzled(line, k + lane() / 8 % 2 * PIECE));
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
        const auto copy_stage = [&](int depth) {
            if (depth < depths) {
                const unsigned to = shared + depth % STAGES * STAGE_BYTES;
                const signed char* const from = tokens + static_cast<Size>(depth) * TOKEN_BYTES;
                copy<ROW_BYTES>(to, rows + static_cast<Size>(depth) * ROW_BYTES);
                copy<HALF * DEPTH>(to + ROW_BYTES, from);
                copy<HALF * DEPTH>(to + ROW_BYTES + HALF * DEPTH, from + TOKENS * DEPTH);
            }
            copies_commit();
        };
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) copy_stage(i);
#pragma unroll 1
        for (int depth = 0; depth < depths; ++depth) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // the stage is there, and the one before is read by all
            copy_stage(depth + STAGES - 1);
#pragma unroll 1
            for (int k = 0; k < DEPTH; k += 32) multiply_step(shared + depth % STAGES * STAGE_BYTES, k);
        }
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
                const int line = first_row() + 16 * i + lane() / 4 + 8 * below;
                sum += sizes.weight(of.base, row_tile, line) * squares;
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
