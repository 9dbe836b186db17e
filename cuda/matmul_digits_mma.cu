// dequantizeTiled on the tensor cores of Ampere and later, as exact as fp32: three int8 digits of the activations
// (digits.cuh), the same as in matmul_digits.cu, by the instructions that every such GPU has.
//
// A block makes ROWS rows of the weights by half a tile of tokens. While STAGES - 1 stages are copied, its eight warps
// multiply one: 32 rows by 32 tokens each, the codes in registers once for all three digits. Sums of a group, or of so
// many input channels as cannot overflow, are converted, scaled by the step and added up in fp32.
#include "common.cuh"

#if !defined(TOKENS) || !defined(ROWS) || !defined(DEPTH) || !defined(STAGES) || !defined(THREADS) || \
    !defined(SPLITTERS) || !defined(KEPT)
#error "the table of kernels gives the macros: -DTOKENS=128 -DROWS=128 -DDEPTH=128 -DSTAGES=2 -DTHREADS=256 ..."
#endif
static_assert(TOKENS == 128 && ROWS == 128 && THREADS == 256, "eight warps have 32 rows by 32 of 64 tokens each");
static_assert(DEPTH == 128, "a row of a tile is 128 bytes: eight pieces in all banks");
static_assert(STAGES >= 2, "one stage is multiplied while another is copied");
static_assert(SPLITTERS % 32 == 0 && KEPT >= 1, "SPLITTERS threads split a row, four elements each at a time");

#include "digits.cuh"
#ifdef __CUDACC__
#include "ampere.cuh"
#endif

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
    // 16 rows and 8 tokens are what an instruction makes; a thread has 4 sums of it.
    static constexpr int ROW_PARTS = 2, TOKEN_PARTS = 4;
    static constexpr int MOST = 1 << 16;  // input channels whose sums cannot overflow, and with them the digits

    const Operands& of;
    const Sizes& sizes;
    const unsigned shared;
    int row, token;  // the first of the block
    float total[ROW_PARTS][TOKEN_PARTS][4] = {}, low_total[ROW_PARTS][TOKEN_PARTS][4] = {};

    __device__ __forceinline__ Product(const Operands& operands, const Sizes& given, unsigned shared_memory)
        : of(operands), sizes(given), shared(shared_memory) {
        const int rows = up(given.out_features, ROWS), halves = up(given.tokens, HALF);
        const int band = blockIdx.x / (BAND * rows), rest = blockIdx.x % (BAND * rows);
        const int height = min(BAND, halves - band * BAND);
        token = (band * BAND + rest % height) * HALF;
        row = rest / height * ROWS;
    }

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    __device__ __forceinline__ static int first_row() { return threadIdx.x / 32 % 4 * 32; }
    __device__ __forceinline__ static int first_token() { return threadIdx.x / 128 * 32; }

    // Bytes that lie one after another, by all threads.
    template <int BYTES>
    __device__ __forceinline__ static void copy(unsigned to, const signed char* from) {
#pragma unroll
        for (int i = 0; i < BYTES / PIECE / THREADS; ++i) {
            const int byte = (i * THREADS + threadIdx.x) * PIECE;
            copy_piece(to + byte, from + byte);
        }
    }

    __device__ __forceinline__ const float* steps_of(int line) const {
        const int groups = group_count(sizes.in_features, sizes.group_size);
        return of.scale_b + static_cast<Size>(min(line, sizes.out_features - 1)) * groups;
    }

    // Over the row's base, which comes in at the end.
    __device__ __forceinline__ float step_of(int line, int group) const {
        const float* const steps = steps_of(line);
        return over_base(steps[group], steps[0]);
    }

    // Products of COUNT digits, scaled and added to the result; `from` are the digits of a half tile, `stride` further
    // those of the next stage.
    template <int COUNT>
    __device__ __forceinline__ void multiply(const signed char* from, int stride,
                                             float (&result)[ROW_PARTS][TOKEN_PARTS][4]) {
        const int depths = up(sizes.in_features, DEPTH);
        const signed char* codes = of.codes + static_cast<Size>(row / ROWS) * depths * CODE_BYTES;
        const auto copy_stage = [&](int depth) {
            if (depth < depths) {
                const unsigned to = shared + depth % STAGES * STAGE_BYTES;
                copy<CODE_BYTES>(to, codes + static_cast<Size>(depth) * CODE_BYTES);
                copy<COUNT * HALF * DEPTH>(to + CODE_BYTES, from + static_cast<Size>(depth) * stride);
            }
            copies_commit();
        };
        const bool one = sizes.group_size >= sizes.in_features;
        const int steps = (one ? MOST : sizes.group_size) / 32;
        int sums[COUNT][ROW_PARTS][TOKEN_PARTS][4] = {};
        int left = steps, group = 0;
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) copy_stage(i);
#pragma unroll 1
        for (int depth = 0; depth < depths; ++depth) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // the stage is there, and the one before is read by all
            copy_stage(depth + STAGES - 1);
            const unsigned stage = shared + depth % STAGES * STAGE_BYTES;
#pragma unroll 1
            for (int k = 0; k < DEPTH; k += 32) {
                multiply_step<COUNT>(stage, k, sums);
                if (--left == 0 || (depth == depths - 1 && k == DEPTH - 32)) {
                    take<COUNT>(sums, group, result);
                    left = steps;
                    if (!one) group = min(group + 1, group_count(sizes.in_features, sizes.group_size) - 1);
                }
            }
        }
        __syncthreads();  // all is read before another pass copies
    }

    template <int COUNT>
    __device__ __forceinline__ static void multiply_step(unsigned stage, int k,
                                                         int (&sums)[COUNT][ROW_PARTS][TOKEN_PARTS][4]) {
        unsigned a[ROW_PARTS][4];
#pragma unroll
        for (int i = 0; i < ROW_PARTS; ++i) {
            const int line = first_row() + 16 * i + lane() % 16;
            load_matrices(a[i], stage + line * DEPTH + swizzled(line, k + lane() / 16 * PIECE));
        }
#pragma unroll
        for (int d = 0; d < COUNT; ++d)
#pragma unroll
            for (int j = 0; j < TOKEN_PARTS; j += 2) {
                unsigned b[4];
                const int line = d * HALF + first_token() + 8 * j + lane() / 16 * 8 + lane() % 8;
                load_matrices(b, stage + CODE_BYTES + line * DEPTH + swizzled(line, k + lane() / 8 % 2 * PIECE));
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
            const int line = row + first_row() + 16 * i + lane() / 4;
            const float step[2] = {step_of(line, group), step_of(line + 8, group)};
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
                const int at = token + first_token() + 8 * j + 2 * (lane() % 4) + next;
                if (at >= sizes.tokens) continue;
                const float unit = of.unit[at], low_unit = of.low_unit[at];
                float* const to = of.y + static_cast<Size>(at) * sizes.out_features;
#pragma unroll
                for (int i = 0; i < ROW_PARTS; ++i)
#pragma unroll
                    for (int below = 0; below < 2; ++below) {
                        const int line = row + first_row() + 16 * i + lane() / 4 + 8 * below;
                        const float base = base_of(*steps_of(line));
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
    const Operands operands{digits, low, codes, unit, low_unit, scale_b, y, {bias, relu != 0}};
    const Sizes sizes{tokens, out_features, in_features, group_size};
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char shared[];
    Product(operands, sizes, shared_address(shared)).run();
#else
    multiply_plainly<TOKENS>(operands, sizes);
#endif
}
