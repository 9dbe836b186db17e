// The search with objective diag where a row has one step and few channels: error[g] = sum_k importance[g][k] *
// sum_n (step*q - W*s)^2.
//
// A block holds whole rows, so that it knows their steps without others, and one launch makes maxima and errors. A
// thread owns four channels and the CHUNK candidates; it keeps their scales and sums of squares, and the weights of
// ROWS rows at a time, in registers. Of these rows it finds the largest w*s of its channels first, which meet in shared
// memory; then, with the steps, the squared errors, as column_errors of search_rows.cu does. The weights are read once.
// A sum of squares that float cannot be trusted with is made again in double.
#include "search_diag.cuh"

#if !defined(CHUNK) || !defined(ROWS) || !defined(MOST_ROWS)
#error "candidates of a thread, rows at a time and rows of a block: -DCHUNK=5 -DROWS=8 -DMOST_ROWS=256"
#endif
static_assert(CHUNK >= 1 && ROWS >= 1 && MOST_ROWS % ROWS == 0, "MOST_ROWS is a multiple of ROWS");

constexpr int ROW_THREADS = 256, WARPS = ROW_THREADS / 32, COLUMNS = 4;
static_assert(ROWS * CHUNK <= ROW_THREADS, "a thread for each row and candidate makes their step");

// Of a multiprocessor; on sm_100 the compiler needs more registers than two leave.
constexpr int ROW_BLOCKS = ARCHITECTURE >= 1000 && CHUNK > 6 ? 1 : 2;

// Blocks: chunks fastest, then rows. `partial` is (candidates, blocks of rows).
extern "C" __global__ void __launch_bounds__(ROW_THREADS, ROW_BLOCKS)
    row_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
               const double* __restrict__ importance, const int* __restrict__ rank, double* partial, double* error,
               float* __restrict__ s, float* __restrict__ inv_s, int out_features, int in_features, int candidates,
               int rows_of_block) {
    __shared__ int of_warps[ROWS * CHUNK][WARPS];  // the bits of floats
    __shared__ float2 steps[ROWS * CHUNK];         // and their reciprocals
    __shared__ float maxima[MOST_ROWS * CHUNK];
    const int chunks = (candidates - 1) / CHUNK + 1;
    const int first_g = blockIdx.x % chunks * CHUNK;
    const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks;
    const int k = static_cast<int>(threadIdx.x) * COLUMNS;
    const int first_row = block * rows_of_block;
    const int rows = min(rows_of_block, out_features - first_row);
    const bool inside = k < in_features;  // which is a multiple of 4

    const float* const column = w + static_cast<Size>(first_row) * in_features + (inside ? k : 0);
    float4 weights[ROWS];
    const auto fetch = [&](int from) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            weights[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (inside && from + r < rows) weights[r] = load_before(column + static_cast<Size>(from + r) * in_features);
        }
    };
    fetch(0);
    in_turn();
    float scale[CHUNK][COLUMNS], squares[CHUNK][COLUMNS];
#pragma unroll
    for (int g = 0; g < CHUNK; ++g) {
        Columns<COLUMNS> of_g = {};
        if (inside && first_g + g < candidates)
            of_g = load<COLUMNS>(candidate_s + static_cast<Size>(first_g + g) * in_features + k);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) scale[g][j] = of_g.v[j], squares[g][j] = 0.0f;
    }
    int any = 0;  // bits of the weights
#pragma unroll 1
    for (int from = 0; from < rows; from += ROWS) {
        if (from > 0) fetch(from);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float now[COLUMNS] = {weights[r].x, weights[r].y, weights[r].z, weights[r].w};
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) any |= __float_as_int(now[j]);
#pragma unroll
            for (int g = 0; g < CHUNK; ++g) {
                // Floats that are not negative order as their bits do.
                const auto product = [&](int j) { return __float_as_int(fabsf(now[j]) * scale[g][j]); };
                const int largest = max(__vimax3_s32(product(0), product(1), product(2)), product(3));
                const int of_warp = __reduce_max_sync(ALL_LANES, largest);
                if (threadIdx.x % 32 == 0) of_warps[r * CHUNK + g][threadIdx.x / 32] = of_warp;
            }
        }
        __syncthreads();
        if (threadIdx.x < ROWS * CHUNK) {
            int largest = 0;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) largest = max(largest, of_warps[threadIdx.x][warp]);
            maxima[from * CHUNK + threadIdx.x] = __int_as_float(largest);
            const float step = fmaxf(step_of(__int_as_float(largest)), SMALLEST_NORMAL);
            steps[threadIdx.x] = make_float2(step, 1.0f / step);
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float now[COLUMNS] = {weights[r].x, weights[r].y, weights[r].z, weights[r].w};
#pragma unroll
            for (int g = 0; g < CHUNK; ++g) {
                const float2 step = steps[r * CHUNK + g];  // one address for the whole warp
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j)
                    squares[g][j] = add_square(now[j] * scale[g][j], step.x, step.y, squares[g][j]);
            }
        }
    }
    const auto exact = [&](int g, int j) {
        double sum = 0.0;
        for (int row = 0; inside && row < rows; ++row)
            sum += exact_error(column[static_cast<Size>(row) * in_features + j] *
                                   candidate_s[static_cast<Size>(first_g + g) * in_features + k + j],
                               step_of(maxima[row * CHUNK + g]));
        return sum;
    };
    sum_of_block<CHUNK, COLUMNS, ROW_THREADS>(squares, importance, partial, first_g, candidates, k, in_features,
                                              (any & 0x7fffffff) != 0, block, blocks, exact);
    if (last_to_come(&blocks_done, gridDim.x))
        choose_best<ROW_THREADS, 8>(partial, rank, candidate_s, error, s, inv_s, candidates, in_features, blocks);
}
