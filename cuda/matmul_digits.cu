// dequantizeTiled on Hopper's tensor cores, as exact as fp32: three int8 digits of the activations (digits.cuh).
//
// How blocks, copies and warpgroups work together stands in hopper_product.cuh. A warpgroup multiplies its rows of the
// weights by three digits of half a tile of tokens an instruction. Rows of the weights are rows of the accumulators, so
// that a thread needs two steps of a group and no more.
//
// One step a row is applied in the end, and three accumulators take all registers; where there would be too few tiles
// for all multiprocessors, tiles are half as large. With groups, the sums of each group are converted, scaled and added
// up in fp32: then a tile has fewer tokens, and the two warpgroups take turns, so that one multiplies while the other
// adds up.
#include "digits.cuh"
#ifdef __CUDACC__
#include "hopper_product.cuh"
#endif

#if !defined(STAGES) || !defined(FEW_TOKENS) || !defined(FEW_STAGES) || !defined(FEW_TILES) || \
    !defined(GROUPED_TOKENS) || !defined(GROUPED_STAGES) || !defined(CLUSTER) || !defined(THREADS)
#error "the table of kernels gives the macros: -DSTAGES=3 -DFEW_TOKENS=64 -DFEW_STAGES=5 ..."
#endif
static_assert(TOKENS == 128 && FEW_TOKENS == 64 && GROUPED_TOKENS == 96, "a wgmma has three digits of half of these");
static_assert(THREADS == 384, "two warpgroups multiply, and a third one copies");
static_assert(STAGES >= 2 && FEW_STAGES >= 2 && GROUPED_STAGES >= 3, "a stage is multiplied while others are copied");
static_assert(FEW_TILES >= 0, "with at most FEW_TILES tiles for clusters, tiles of FEW_TOKENS keep more of them busy");

// Which tiles a product takes.
struct Tiling : Sizes {
    // Whether sums are taken several times a row: of each group, or before they could overflow.
    __device__ __forceinline__ bool grouped() const { return group_size < in_features || in_features > 1 << 17; }
    // Tiles so few that most multiprocessors would have none.
    __device__ __forceinline__ bool few() const {
        return static_cast<Size>(up(tokens, TOKENS)) * up(out_features, CLUSTER * ROWS) <= FEW_TILES;
    }
};

extern "C" __global__ void __launch_bounds__(SPLITTERS) split_digits(
    const float* __restrict__ x, const signed char* __restrict__ wq, const float* __restrict__ inv_s,
    signed char* __restrict__ digits, signed char* __restrict__ low, signed char* __restrict__ codes,
    float* __restrict__ unit, float* __restrict__ low_unit, int tokens, int out_features, int in_features,
    int group_size) {
    const Tiling sizes{{tokens, out_features, in_features, group_size}};
    split_operands(x, wq, inv_s, digits, low, codes, unit, low_unit, tokens, out_features, in_features,
                   sizes.grouped() ? GROUPED_TOKENS
                   : sizes.few()   ? FEW_TOKENS
                                   : TOKENS,
                   CLUSTER * ROWS);
}

#ifdef __CUDACC__

template <int TILE_TOKENS>
__device__ __forceinline__ bool any_wide(const float* __restrict__ low_unit) {
    bool found = false;
    for (int i = threadIdx.x % 32; i < TILE_TOKENS; i += 32) found |= low_unit[i] != 0.0f;
    return __any_sync(~0u, found);
}

template <int TILE_TOKENS, int COUNT, bool GROUPED>
struct Product {
    static constexpr int HALF = TILE_TOKENS / 2;
    static constexpr int PER = HALF / 2;  // sums of a thread for a digit of half a tile
    static constexpr int DIGIT_BYTES = digit_bytes(TILE_TOKENS);
    static constexpr int LOW_BYTES = TILE_TOKENS * DEPTH;
    static constexpr int SECOND_HALF = further(3 * HALF * DEPTH);  // of a tile's tokens

    const Operands& of;
    const Sizes& sizes;
    Pipeline<COUNT, CODE_BYTES, DIGIT_BYTES> pipeline;

    __device__ __forceinline__ Product(const Operands& operands, const Sizes& given, unsigned shared)
        : of(operands),
          sizes(given),
          pipeline(shared, up(given.in_features, DEPTH), up(given.tokens, TILE_TOKENS),
                   up(given.out_features, CLUSTER * ROWS)) {}

    __device__ __forceinline__ void run() {
        pipeline.run([&] { copy(); }, [&] { multiply(); });
    }

    __device__ __forceinline__ void copy() {
        pipeline.each_tile([&](int token_tile, int row_tile) {
            const bool wide = any_wide<TILE_TOKENS>(of.low_unit + token_tile * TILE_TOKENS);
            if (lane() != 0) return;
            const Size first = static_cast<Size>(token_tile) * pipeline.depths;
            const signed char* const codes = of.codes + static_cast<Size>(row_tile) * pipeline.depths * CODE_BYTES;
            pipeline.copy(codes, of.digits + first * DIGIT_BYTES, DIGIT_BYTES);
            if (wide) pipeline.copy(codes, of.low + first * LOW_BYTES, LOW_BYTES);
        });
    }

    // The two warpgroups that multiply, from here on.
    __device__ __forceinline__ static int warpgroup() { return threadIdx.x / 128; }
    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
    // The first of a thread's two rows of the tile's weights; the second is 8 below.
    __device__ __forceinline__ static int line() { return threadIdx.x / 32 * 16 + lane() / 4; }

    __device__ __forceinline__ void multiply() {
        if (GROUPED && in_turns() && warpgroup() == 1) turn_over();
        pipeline.each_tile([&](int token_tile, int row_tile) {
            const int token = token_tile * TILE_TOKENS, row = row_tile * ROWS + line();
            if (GROUPED ? multiply_groups(token, row) : multiply_rows(token, row)) multiply_low(token, row);
        });
        if (GROUPED && in_turns() && warpgroup() == 0) take_turn();  // the last one given
    }

    __device__ __forceinline__ static float combined_at(const int (&sums)[3 * PER], int i) {
        return combined(sums[i], sums[PER + i], sums[2 * PER + i]);
    }

    // The same of at most 512 input channels: the two lower digits together fit an integer.
    __device__ __forceinline__ static float combined_few(const int (&sums)[3 * PER], int i) {
        return fmaf(static_cast<float>(sums[i]), 65536.0f, static_cast<float>(sums[PER + i] * 256 + sums[2 * PER + i]));
    }

    // One step a row. It and `multiply_groups` tell whether the fourth digit is still to come.
    __device__ __forceinline__ bool multiply_rows(int token, int row) {
        int sums[2][3 * PER] = {};
        pipeline.each_stage([&](Size codes, Size digits) {
#pragma unroll
            for (int k = 0; k < DEPTH; k += 32) {
                wgmma(sums[0], codes + further(k), digits + further(k), 1);
                wgmma(sums[1], codes + further(k), digits + further(k) + SECOND_HALF, 1);
            }
        });
        wgmma_done(sums[0]);
        wgmma_done(sums[1]);
        const float step[2] = {step_of(row, 0), step_of(row + 8, 0)};
        return store<false>(of.unit, token, row,
                            [&](int h, int i) { return step[i / 2 % 2] * combined_at(sums[h], i); });
    }

    __device__ __forceinline__ float step_of(int row, int group) const { return of.step_of(sizes, row, group); }

    // Products of 32 input channels after one another, and what is to be done with the sums of each group, the last one
    // as small as it comes, or of MOST channels of a group.
    template <int MOST, typename Multiply, typename Take>
    __device__ __forceinline__ void by_groups(int row, Multiply multiply, Take take) {
        const int depths = pipeline.depths;
        const int steps = (sizes.group_size < sizes.in_features ? sizes.group_size : depths * DEPTH) / 32;
        float step[2] = {step_of(row, 0), step_of(row + 8, 0)};
        int group = 0, of_group = steps, left = min(steps, MOST / 32);
        bool first = true;
#pragma unroll 1
        for (int depth = 0; depth < depths; ++depth, pipeline.next()) {
            const Size codes = pipeline.rows(), digits = pipeline.tokens();
            barrier_wait(pipeline.full(), pipeline.phase);
#pragma unroll 1
            for (int k = 0; k < DEPTH; k += 32) {
                multiply(codes + further(k), digits + further(k), first);
                first = false;
                --of_group;
                if (--left == 0 || (depth == depths - 1 && k == DEPTH - 32)) {
                    take(step);
                    if (of_group == 0) {
                        of_group = steps;
                        ++group;
                    }
                    left = min(of_group, MOST / 32);
                    first = true;
                    step[0] = step_of(row, group);
                    step[1] = step_of(row + 8, group);
                }
            }
            wgmma_wait<0>();
            pipeline.release(pipeline.empty());
        }
    }

    // The warpgroups take turns: a named barrier each, at which the other one arrives. Not with groups so large that
    // the one that waits would hold stages which the other needs; there adding up is rare.
    __device__ __forceinline__ bool in_turns() const {
        return sizes.group_size <= (COUNT - 2) * DEPTH && sizes.group_size < sizes.in_features;
    }
    __device__ __forceinline__ static void take_turn() { named_barrier_sync(1 + warpgroup(), 256); }
    __device__ __forceinline__ static void turn_over() { named_barrier_arrive(2 - warpgroup(), 256); }

    __device__ __forceinline__ bool multiply_groups(int token, int row) {
        float total[2][PER] = {};
        int sums[2][3 * PER] = {};
        by_groups<512>(
            row,
            [&](Size codes, Size digits, bool first) {
                if (first && in_turns()) take_turn();
                wgmma_begin();
                wgmma(sums[0], codes, digits, !first);
                wgmma(sums[1], codes, digits + SECOND_HALF, !first);
                wgmma_commit();
            },
            [&](const float (&step)[2]) {
                wgmma_wait<1>();
                if (in_turns()) turn_over();  // while the last of this one's products run
                wgmma_wait<0>();
                wgmma_done(sums[0]);
                wgmma_done(sums[1]);
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int i = 0; i < PER; ++i)
                        total[h][i] = fmaf(step[i / 2 % 2], combined_few(sums[h], i), total[h][i]);
            });
        return store<false>(of.unit, token, row, [&](int h, int i) { return total[h][i]; });
    }

    // The fourth digit, on top of what is stored.
    __device__ __forceinline__ void multiply_low(int token, int row) {
        float total[2 * PER] = {};
        int sums[2 * PER] = {};
        by_groups<1 << 16>(
            row,
            [&](Size codes, Size digits, bool first) {
                wgmma_begin();
                wgmma(sums, codes, digits, !first);
                wgmma_commit();
            },
            [&](const float (&step)[2]) {
                wgmma_wait<0>();
                wgmma_done(sums);
#pragma unroll
                for (int i = 0; i < 2 * PER; ++i)
                    total[i] = fmaf(step[i / 2 % 2], static_cast<float>(sums[i]), total[i]);
            });
        store<true>(of.low_unit, token, row, [&](int h, int i) { return total[h * PER + i]; });
    }

    // y of this thread: value(half of the tile, index) times the token's unit and the row's base, or that added to what
    // is there; at its end where nothing is to be added. Tells whether the tile has a fourth digit.
    template <bool ON_TOP, typename Value>
    __device__ __forceinline__ bool store(const float* __restrict__ units, int token, int row, Value value) const {
        const bool wide = any_wide<TILE_TOKENS>(of.low_unit + token);
        const Ending ending = ON_TOP || !wide ? of.ending : Ending{nullptr, false};
        token += 2 * (lane() % 4);
        opaque(token);  // so that addresses are worked out here, not kept through the product
        const Size width = sizes.out_features;
        const bool inside[2] = {row < sizes.out_features, row + 8 < sizes.out_features};
        const float base[2] = {base_of(*of.steps_of(sizes, row)), base_of(*of.steps_of(sizes, row + 8))};
        const float bias[2] = {inside[0] ? ending.bias_of(row) : 0.0f, inside[1] ? ending.bias_of(row + 8) : 0.0f};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float2 unit[PER / 4];
            float there[PER];
            float* const to = of.y + static_cast<Size>(token + h * HALF) * width + row;
            const int left = sizes.tokens - token - h * HALF;
            const auto at = [&](int i) { return to + (i / 4 * 8 + i % 2) * width + i / 2 % 2 * 8; };
            const auto has = [&](int i) { return i / 4 * 8 + i % 2 < left && inside[i / 2 % 2]; };
#pragma unroll
            for (int j = 0; j < PER / 4; ++j)
                unit[j] = *reinterpret_cast<const float2*>(units + token + h * HALF + 8 * j);
#pragma unroll
            for (int i = 0; i < PER; ++i) there[i] = ON_TOP && has(i) ? *at(i) : 0.0f;
#pragma unroll
            for (int i = 0; i < PER; ++i) {
                float result = value(h, i) * (i % 2 ? unit[i / 4].y : unit[i / 4].x) * base[i / 2 % 2];
                if constexpr (ON_TOP) result += there[i];
                if (has(i)) *at(i) = ending.apply(result, bias[i / 2 % 2]);
            }
        }
        return wide;
    }
};

#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) __cluster_dims__(CLUSTER, 1, 1)
    dequantizeTiled(const signed char* __restrict__ digits, const signed char* __restrict__ low,
                    const signed char* __restrict__ codes, const float* __restrict__ unit,
                    const float* __restrict__ low_unit, const float* __restrict__ scale_b,
                    const float* __restrict__ bias, float* __restrict__ y, int tokens, int out_features,
                    int in_features, int group_size, int relu) {
    const Operands operands{digits, low, codes, unit, low_unit, scale_b, y, {bias, relu != 0}};
    const Tiling sizes{{tokens, out_features, in_features, group_size}};
#ifdef __CUDACC__
    extern __shared__ __align__(1024) unsigned char shared[];
    if (sizes.grouped())
        Product<GROUPED_TOKENS, GROUPED_STAGES, true>(operands, sizes, shared_address(shared)).run();
    else if (sizes.few())
        Product<FEW_TOKENS, FEW_STAGES, false>(operands, sizes, shared_address(shared)).run();
    else
        Product<TOKENS, STAGES, false>(operands, sizes, shared_address(shared)).run();
#else
    in_turn();
    if (sizes.grouped())
        multiply_plainly<GROUPED_TOKENS>(operands, sizes);
    else if (sizes.few())
        multiply_plainly<FEW_TOKENS>(operands, sizes);
    else
        multiply_plainly<TOKENS>(operands, sizes);
#endif
}
