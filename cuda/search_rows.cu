// The search with objective diag where a row has one step: error[g] = sum_k importance[g][k] * sum_n (step*q - W*s)^2.
//
// What must be done for a weight and a candidate: 2 operations for the row's largest magnitude, 5 for the error. What
// must be moved: the weights twice, once for 20 candidates at a time; so it is bound by the issue of instructions.
//   row_maxima    a matrix product with max for its sum: a block holds 64 rows and CHUNK candidates, 128 channels at a
//                 time, in shared memory; a thread keeps 8 x CHUNK/4 maxima. One three-way integer maximum takes two
//                 products, since floats that are not negative order as their bits do.
//   column_errors a thread owns COLUMNS channels and the CHUNK candidates: their scales and sums of squares stay in
//                 registers while the rows stream by, and the importance is applied once at the end. No division and no
//                 conversion in the loop: t = w*s; m = t/step + MAGIC; q = m - MAGIC; d = t - q*step; sum += d*d.
// A sum of squares that float cannot be trusted with is made again in double.
#include "search_diag.cuh"

#include <cuda_pipeline_primitives.h>

#if !defined(CHUNK) || !defined(COLUMNS) || !defined(ROWS) || !defined(AHEAD)
#error "candidates and channels of a thread, rows, rows ahead: -DCHUNK=20 -DCOLUMNS=4 -DROWS=128 -DAHEAD=2"
#endif
static_assert(CHUNK % 4 == 0 && CHUNK > 0, "CHUNK is a multiple of 4: four threads share the candidates of a row");
static_assert(ROWS >= 1 && AHEAD >= 1, "ROWS and AHEAD are at least 1");
static_assert(COLUMNS == 1 || COLUMNS == 2 || COLUMNS == 4, "COLUMNS is 1, 2 or 4: one load of up to 16 bytes");

constexpr int WARPS = 8;
constexpr int TILE_ROWS = 64, TILE_CHANNELS = 128;
constexpr int PITCH = TILE_CHANNELS + 4;  // 4 mod 32: the float4 of 8 rows lie in different banks
constexpr int ROWS_OF_THREAD = TILE_ROWS / 8, CANDIDATES_OF_THREAD = CHUNK / 4;
constexpr int STAGE = (TILE_ROWS + CHUNK) * PITCH;  // floats
constexpr int OF_WARP = TILE_CHANNELS / WARPS;      // channels of a tile that a warp takes

// Of a multiprocessor; on sm_100 the compiler needs more registers than two leave.
constexpr int MAXIMA_BLOCKS = ARCHITECTURE >= 1000 ? 1 : 2;

// Blocks: chunks fastest, so that those that read the same weights share the cache; then parts of the channels.
extern "C" __global__ void __launch_bounds__(WARPS * 32, MAXIMA_BLOCKS)
    row_maxima(const float* __restrict__ w, const float* __restrict__ candidate_s, float* __restrict__ maxima,
               int out_features, int in_features, int candidates, int parts, int channels_of_part) {
    extern __shared__ __align__(16) float tiles[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunks = (candidates - 1) / CHUNK + 1;
    const int first_g = blockIdx.x % chunks * CHUNK;
    const int part = blockIdx.x / chunks % parts;
    const int first_row = blockIdx.x / chunks / parts * TILE_ROWS;
    const int begin = part * channels_of_part;
    const int end = min(begin + channels_of_part, in_features);

    const auto fetch = [&](int stage, int first_k) {
        float* const tile = tiles + stage * STAGE;
#pragma unroll 4
        for (int i = threadIdx.x; i < (TILE_ROWS + CHUNK) * (TILE_CHANNELS / 4); i += WARPS * 32) {
            const int line = i / (TILE_CHANNELS / 4), offset = i % (TILE_CHANNELS / 4) * 4;
            const bool of_w = line < TILE_ROWS;
            const int index = of_w ? first_row + line : first_g + line - TILE_ROWS;
            const bool there = first_k + offset < end && index < (of_w ? out_features : candidates);
            const float* const from =
                (of_w ? w : candidate_s) + (there ? static_cast<Size>(index) * in_features + first_k + offset : 0);
            __pipeline_memcpy_async(tile + line * PITCH + offset, from, 16, there ? 0 : 16);  // what is missing is 0
        }
        __pipeline_commit();
    };

    int largest[ROWS_OF_THREAD][CANDIDATES_OF_THREAD] = {};  // the bits of floats
    fetch(0, begin);
    int stage = 0;
    for (int k = begin; k < end; k += TILE_CHANNELS) {
        if (k + TILE_CHANNELS < end) {
            fetch(1 - stage, k + TILE_CHANNELS);
            __pipeline_wait_prior(1);
        } else {
            __pipeline_wait_prior(0);
        }
        __syncthreads();
        const float* const tile = tiles + stage * STAGE + warp * OF_WARP;
#pragma unroll
        for (int step = 0; step < OF_WARP; step += 4) {
            float4 weights[ROWS_OF_THREAD];
#pragma unroll
            for (int r = 0; r < ROWS_OF_THREAD; ++r)
                weights[r] = *reinterpret_cast<const float4*>(tile + (r * 8 + lane % 8) * PITCH + step);
#pragma unroll
            for (int g = 0; g < CANDIDATES_OF_THREAD; ++g) {
                const float4 scale =
                    *reinterpret_cast<const float4*>(tile + (TILE_ROWS + g * 4 + lane / 8) * PITCH + step);
#pragma unroll
                for (int r = 0; r < ROWS_OF_THREAD; ++r) {
                    const float4 v = weights[r];
                    int best = largest[r][g];
                    best =
                        __vimax3_s32(best, __float_as_int(fabsf(v.x) * scale.x), __float_as_int(fabsf(v.y) * scale.y));
                    best =
                        __vimax3_s32(best, __float_as_int(fabsf(v.z) * scale.z), __float_as_int(fabsf(v.w) * scale.w));
                    largest[r][g] = best;
                }
            }
        }
        stage = 1 - stage;
        __syncthreads();
    }
    // Each warp has seen other channels: their maxima meet in shared memory.
    int* const of_warps = reinterpret_cast<int*>(tiles);
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
        for (int g = 0; g < CANDIDATES_OF_THREAD; ++g)
            of_warps[(warp * TILE_ROWS + r * 8 + lane % 8) * CHUNK + g * 4 + lane / 8] = largest[r][g];
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_ROWS * CHUNK; i += WARPS * 32) {
        int best = 0;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) best = max(best, of_warps[other * TILE_ROWS * CHUNK + i]);
        const int row = first_row + i / CHUNK, g = first_g + i % CHUNK;
        if (row < out_features && g < candidates)
            maxima[(static_cast<Size>(part) * out_features + row) * candidates + g] = __int_as_float(best);
    }
}

constexpr int COLUMN_THREADS = 256;
constexpr int BLOCKS = COLUMNS == 4 ? 1 : 2;  // of a multiprocessor: what a thread keeps in registers allows no more
constexpr float SMALLEST_NORMAL = 1.175494351e-38f;

// Blocks: chunks fastest, then channels, then rows. `partial` is (candidates, blocks of channels and rows).
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, BLOCKS)
    column_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
                  const double* __restrict__ importance, const float* __restrict__ maxima, double* __restrict__ partial,
                  int out_features, int in_features, int candidates, int parts, int rows_of_block) {
    __shared__ __align__(16) float2 steps[ROWS][CHUNK];  // of a row and a candidate: the step, and 1 / step
    const int chunks = (candidates - 1) / CHUNK + 1;
    const int column_blocks = (in_features - 1) / (COLUMN_THREADS * COLUMNS) + 1;
    const int first_g = blockIdx.x % chunks * CHUNK;
    const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks;
    const int k = (block % column_blocks * COLUMN_THREADS + static_cast<int>(threadIdx.x)) * COLUMNS;
    const int first_row = block / column_blocks * rows_of_block;
    const int rows = min(rows_of_block, out_features - first_row);
    const bool inside = k < in_features;  // which is a multiple of 4

    const auto largest_of = [&](int row, int g) {
        float largest = 0.0f;
        for (int part = 0; part < parts; ++part)
            largest = fmaxf(largest, maxima[(static_cast<Size>(part) * out_features + row) * candidates + g]);
        return largest;
    };
    for (int i = threadIdx.x; i < rows * CHUNK; i += COLUMN_THREADS) {
        const int g = first_g + i % CHUNK;
        // A normal number, so that 1 / step stays finite; smaller ones end among the sums that are made again.
        const float step =
            g < candidates ? fmaxf(step_of(largest_of(first_row + i / CHUNK, g)), SMALLEST_NORMAL) : 1.0f;
        steps[i / CHUNK][i % CHUNK] = make_float2(step, 1.0f / step);
    }
    float scale[CHUNK][COLUMNS], squares[CHUNK][COLUMNS];
#pragma unroll
    for (int g = 0; g < CHUNK; ++g) {
        Columns<COLUMNS> of_g = {};
        if (inside && first_g + g < candidates)
            of_g = load<COLUMNS>(candidate_s + static_cast<Size>(first_g + g) * in_features + k);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) scale[g][j] = of_g.v[j], squares[g][j] = 0.0f;
    }
    __syncthreads();

    const float* const column = w + static_cast<Size>(first_row) * in_features + (inside ? k : 0);
    int any = 0;  // bits of the weights
    // AHEAD rows are on their way while one is worked on; behind the last one it is loaded again.
    const float* ahead = column;
    const float* const last = column + static_cast<Size>(rows - 1) * in_features;
    Columns<COLUMNS> next[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
        next[u] = load<COLUMNS>(ahead);
        if (ahead != last) ahead += in_features;
    }
    const float4* line = reinterpret_cast<const float4*>(steps[0]);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
        const Columns<COLUMNS> now = next[0];
#pragma unroll
        for (int u = 0; u + 1 < AHEAD; ++u) next[u] = next[u + 1];
        next[AHEAD - 1] = load<COLUMNS>(ahead);
        if (ahead != last) ahead += in_features;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) any |= __float_as_int(now.v[j]);
#pragma unroll
        for (int pair = 0; pair < CHUNK / 2; ++pair) {
            const float4 two = *line++;  // one address for the whole warp
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int g = 2 * pair;
                squares[g][j] = add_square(now.v[j] * scale[g][j], two.x, two.y, squares[g][j]);
                squares[g + 1][j] = add_square(now.v[j] * scale[g + 1][j], two.z, two.w, squares[g + 1][j]);
            }
        }
    }
    const auto exact = [&](int g, int j) {
        double sum = 0.0;
        for (int row = 0; inside && row < rows; ++row)
            sum += exact_error(column[static_cast<Size>(row) * in_features + j] *
                                   candidate_s[static_cast<Size>(first_g + g) * in_features + k + j],
                               step_of(largest_of(first_row + row, first_g + g)));
        return sum;
    };
    sum_of_block<CHUNK, COLUMNS, COLUMN_THREADS>(squares, importance, partial, first_g, candidates, k, in_features,
                                                 (any & 0x7fffffff) != 0, block, blocks, exact);
}
