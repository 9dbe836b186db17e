// The search with objective diag where a row has one step: error[g] = sum_k importance[g][k] * sum_n (step*q - W*s)^2.
//
// What must be done for a weight and a candidate: 2 operations for the row's largest magnitude, 5 for the error. What
// must be moved: the weights twice, once for 20 candidates at a time; so it is bound by the issue of instructions.
//   row_maxima    a matrix product with max for its sum: a block holds 64 rows and TILE_G candidates, 128 channels at a
//                 time, in shared memory; a thread keeps 8 x TILE_G/4 maxima. One three-way integer maximum takes two
//                 products, since floats that are not negative order as their bits do.
//   column_errors a thread owns COLUMNS channels and the CHUNK candidates: their scales and sums of squares stay in
//                 registers while the rows stream by, and the importance is applied once at the end. No division and no
//                 conversion in the loop: t = w*s; m = t/step + MAGIC; q = m - MAGIC; d = t - q*step; sum += d*d.
// A sum of squares that float cannot be trusted with is made again in double.
#include "search_diag.cuh"

#if !defined(CHUNK) || !defined(COLUMNS) || !defined(AHEAD) || !defined(TURN) || !defined(TILE_G)
#error \
    "of a thread candidates, channels, rows ahead, rows at a time; candidates of a tile: -DCHUNK=20 -DCOLUMNS=4 \
-DAHEAD=8 -DTURN=2 -DTILE_G=20"
#endif
static_assert(CHUNK % 2 == 0 && CHUNK > 0, "CHUNK is even: the steps of two candidates are one load");
static_assert(AHEAD >= 2 * TURN && TURN >= 1, "AHEAD is at least two TURNs, and TURN at least 1");
static_assert(TILE_G % 4 == 0 && TILE_G > 0 && TILE_G <= 20, "TILE_G is a multiple of 4: four lanes share them");
static_assert(COLUMNS == 1 || COLUMNS == 2 || COLUMNS == 4, "COLUMNS is 1, 2 or 4: one load of up to 16 bytes");

// A block takes TILE_ROWS rows and TILE_G candidates, TILE_CHANNELS channels at a time; a warp takes OF_WARP of these
// channels, and a thread of it the maxima of 8 rows and OF_THREAD candidates.
constexpr int WARPS = 8, MAXIMA_THREADS = WARPS * 32;
constexpr int TILE_ROWS = 64, TILE_CHANNELS = 128, STAGES = 2;
constexpr int OF_THREAD = TILE_G / 4, OF_WARP = TILE_CHANNELS / WARPS;
constexpr int PITCH = TILE_CHANNELS + 4;             // 4 mod 32: the float4 of 8 rows lie in different banks
constexpr int STAGE = (TILE_ROWS + TILE_G) * PITCH;  // floats
constexpr int PIECES = TILE_CHANNELS / 4;            // of 16 bytes, of a line
constexpr int LINES = MAXIMA_THREADS / PIECES;       // that the threads copy at a time

// Of a multiprocessor; on sm_100 the compiler needs more registers than two leave.
constexpr int MAXIMA_BLOCKS = ARCHITECTURE >= 1000 ? 1 : 2;

// Blocks: chunks fastest, so that those that read the same weights share the cache; then parts of the channels.
extern "C" __global__ void __launch_bounds__(MAXIMA_THREADS, MAXIMA_BLOCKS)
    row_maxima(const float* __restrict__ w, const float* __restrict__ candidate_s, float* __restrict__ maxima,
               int out_features, int in_features, int candidates, int parts, int channels_of_part) {
    extern __shared__ __align__(16) float tiles[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int chunks = (candidates - 1) / TILE_G + 1;
    const int first_g = blockIdx.x % chunks * TILE_G;
    const int part = blockIdx.x / chunks % parts;
    const int first_row = blockIdx.x / chunks / parts * TILE_ROWS;
    const int begin = part * channels_of_part;
    const int end = min(begin + channels_of_part, in_features);

    // A thread copies the same piece of some lines of every tile; of what is not there, zeros.
    const int line = threadIdx.x / PIECES, piece = threadIdx.x % PIECES * 4;
    const float* const of_w = w + static_cast<Size>(first_row + line) * in_features + piece;
    const float* const of_s = candidate_s + static_cast<Size>(first_g + line) * in_features + piece;
    const Size apart = static_cast<Size>(LINES) * in_features;
    const auto fetch_weights = [&](int stage, int k) {
        float* const tile = tiles + stage * STAGE + line * PITCH + piece;
        const bool inside = k + piece < end;
#pragma unroll
        for (int i = 0; i < TILE_ROWS / LINES; ++i)
            __pipeline_memcpy_async(tile + i * LINES * PITCH, of_w + i * apart + k, 16,
                                    inside && first_row + line + i * LINES < out_features ? 0 : 16);
    };
    const auto fetch_scales = [&](int stage, int k) {
        float* const tile = tiles + stage * STAGE + line * PITCH + piece;
        const bool inside = k + piece < end;
#pragma unroll
        for (int i = 0; i * LINES < TILE_G; ++i) {
            if (line + i * LINES < TILE_G)
                __pipeline_memcpy_async(tile + (TILE_ROWS + i * LINES) * PITCH, of_s + i * apart + k, 16,
                                        inside && first_g + line + i * LINES < candidates ? 0 : 16);
        }
    };

    int largest[8][OF_THREAD] = {};  // the bits of floats
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage)
        if (begin + stage * TILE_CHANNELS < end) fetch_weights(stage, begin + stage * TILE_CHANNELS);
    in_turn();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (begin + stage * TILE_CHANNELS < end) fetch_scales(stage, begin + stage * TILE_CHANNELS);
        __pipeline_commit();
    }
    int stage = 0;
    for (int k = begin; k < end; k += TILE_CHANNELS) {
        __pipeline_wait_prior(STAGES - 2);
        __syncthreads();
        const int ahead = k + (STAGES - 1) * TILE_CHANNELS;
        if (ahead < end) {
            fetch_weights(stage == 0 ? STAGES - 1 : stage - 1, ahead);
            fetch_scales(stage == 0 ? STAGES - 1 : stage - 1, ahead);
        }
        __pipeline_commit();
        const float* const tile = tiles + stage * STAGE + warp * OF_WARP;
        const float* const of_rows = tile + lane % 8 * PITCH;
        const float* const of_g = tile + (TILE_ROWS + lane / 8) * PITCH;
#pragma unroll
        for (int step = 0; step < OF_WARP; step += 4) {
            Columns<4> weights[8];
#pragma unroll
            for (int r = 0; r < 8; ++r) weights[r] = load<4>(of_rows + r * 8 * PITCH + step);
#pragma unroll
            for (int g = 0; g < OF_THREAD; ++g) {
                const Columns<4> scale = load<4>(of_g + g * 4 * PITCH + step);
#pragma unroll
                for (int r = 0; r < 8; ++r) {
                    const auto product = [&](int j) { return __float_as_int(fabsf(weights[r].v[j]) * scale.v[j]); };
                    largest[r][g] = __vimax3_s32(largest[r][g], product(0), product(1));
                    largest[r][g] = __vimax3_s32(largest[r][g], product(2), product(3));
                }
            }
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    __pipeline_wait_prior(0);
    __syncthreads();
    // Each warp has seen other channels: their maxima meet in shared memory.
    int* const of_warps = reinterpret_cast<int*>(tiles);
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int g = 0; g < OF_THREAD; ++g)
            of_warps[(warp * TILE_ROWS + r * 8 + lane % 8) * TILE_G + g * 4 + lane / 8] = largest[r][g];
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_ROWS * TILE_G; i += MAXIMA_THREADS) {
        int best = 0;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) best = max(best, of_warps[other * TILE_ROWS * TILE_G + i]);
        const int row = first_row + i / TILE_G, g = first_g + i % TILE_G;
        if (row < out_features && g < candidates)
            maxima[(static_cast<Size>(part) * out_features + row) * candidates + g] = __int_as_float(best);
    }
}

constexpr int COLUMN_THREADS = 256;
constexpr int BLOCKS = COLUMNS * CHUNK > 40 ? 1 : 2;  // of a multiprocessor: for what a thread keeps in registers

// Blocks: chunks fastest, then channels, then rows. `partial` is (candidates, blocks of channels and rows).
extern "C" __global__ void __launch_bounds__(COLUMN_THREADS, BLOCKS)
    column_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
                  const double* __restrict__ importance, const int* __restrict__ rank, const float* __restrict__ maxima,
                  double* partial, double* error, float* __restrict__ s, float* __restrict__ inv_s, int out_features,
                  int in_features, int candidates, int parts, int rows_of_block) {
    extern __shared__ __align__(16) float slots[];  // of the rows to come; behind them the steps
    float2* const steps = reinterpret_cast<float2*>(slots + AHEAD * COLUMN_THREADS * COLUMNS);
    const int chunks = (candidates - 1) / CHUNK + 1;
    const int column_blocks = (in_features - 1) / (COLUMN_THREADS * COLUMNS) + 1;
    const int first_g = blockIdx.x % chunks * CHUNK;
    const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks;
    const int k = (block % column_blocks * COLUMN_THREADS + static_cast<int>(threadIdx.x)) * COLUMNS;
    const int first_row = block / column_blocks * rows_of_block;
    const int rows = min(rows_of_block, out_features - first_row);
    const bool inside = k < in_features;  // which is a multiple of 4

    const auto largest_of = [&](int part, int row, int g) {
        return maxima[(static_cast<Size>(part) * out_features + row) * candidates + g];
    };
    const float* const column = w + static_cast<Size>(first_row) * in_features + (inside ? k : 0);
    int any = 0;  // bits of the weights
    const float4* line = reinterpret_cast<const float4*>(steps);
    float scale[CHUNK][COLUMNS], squares[CHUNK][COLUMNS];
    // What comes from far away is asked for together: the first rows, the scales, the maxima.
    const auto before = [&] {
        in_turn();
#pragma unroll
        for (int g = 0; g < CHUNK; ++g) {
            Columns<COLUMNS> of_g = {};
            if (inside && first_g + g < candidates)
                of_g = load<COLUMNS>(candidate_s + static_cast<Size>(first_g + g) * in_features + k);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) scale[g][j] = of_g.v[j], squares[g][j] = 0.0f;
        }
        constexpr int TOGETHER = 4;
        const int count = rows * CHUNK, padded = (rows + TURN - 1) / TURN * TURN * CHUNK;
        for (int first = threadIdx.x; first < padded; first += TOGETHER * COLUMN_THREADS) {
            float largest[TOGETHER] = {};
#pragma unroll 4
            for (int part = 0; part < parts; ++part) {
#pragma unroll
                for (int u = 0; u < TOGETHER; ++u) {
                    const int i = first + u * COLUMN_THREADS, g = first_g + i % CHUNK;
                    if (i < count && g < candidates)
                        largest[u] = fmaxf(largest[u], largest_of(part, first_row + i / CHUNK, g));
                }
            }
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u) {
                const int i = first + u * COLUMN_THREADS;
                const float step = fmaxf(step_of(largest[u]), SMALLEST_NORMAL);
                if (i < padded) steps[i] = make_float2(step, 1.0f / step);
            }
        }
        __syncthreads();
    };
    // Loaded one by one, so that they may come into registers of another bank than the scales.
    const auto take = [&](const volatile float* weights) {
        Columns<COLUMNS> now;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) now.v[j] = weights[j];
        return now;
    };
    for_each_row<COLUMNS, COLUMN_THREADS, AHEAD, TURN>(
        slots, column, in_features, rows, before, take, [&](const Columns<COLUMNS>& now) {
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
        });
    const auto exact = [&](int g, int j) {
        double sum = 0.0;
        for (int row = 0; inside && row < rows; ++row) {
            float largest = 0.0f;
            for (int part = 0; part < parts; ++part)
                largest = fmaxf(largest, largest_of(part, first_row + row, first_g + g));
            sum += exact_error(column[static_cast<Size>(row) * in_features + j] *
                                   candidate_s[static_cast<Size>(first_g + g) * in_features + k + j],
                               step_of(largest));
        }
        return sum;
    };
    sum_of_block<CHUNK, COLUMNS, COLUMN_THREADS>(squares, importance, partial, first_g, candidates, k, in_features,
                                                 (any & 0x7fffffff) != 0, block, blocks, exact);
    if (last_to_come(&blocks_done, gridDim.x))
        choose_best<COLUMN_THREADS, 8>(partial, rank, candidate_s, error, s, inv_s, candidates, in_features, blocks);
}
