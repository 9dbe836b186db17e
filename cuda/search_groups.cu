// The search with objective diag where a step belongs to a group of 32, 64 or 128 channels of a row.
//
// A warp holds one group of a row, COLUMNS channels a lane, so that the largest magnitude is one reduction over the
// warp and each weight is read once and scaled once. Per weight and candidate: t = |w|*s, half a three-way maximum, and
// the 4 operations of the error as in search_rows.cu; beside them, once for COLUMNS channels, the reduction and a
// reciprocal. A thread keeps its channels' scales and sums of squares in registers while the rows stream by.
#include "search_diag.cuh"

#if !defined(CHUNK) || !defined(COLUMNS) || !defined(AHEAD) || !defined(TURN)
#error "candidates and channels of a thread, rows ahead, rows at a time: -DCHUNK=10 -DCOLUMNS=4 -DAHEAD=8 -DTURN=2"
#endif
static_assert(CHUNK >= 1 && CHUNK <= 32, "CHUNK is 1 to 32: a bit for each candidate of a thread");
static_assert(AHEAD >= 2 * TURN && TURN >= 1, "AHEAD is at least two TURNs, and TURN at least 1");
static_assert(COLUMNS == 1 || COLUMNS == 2 || COLUMNS == 4,
              "COLUMNS is 1, 2 or 4: a warp's group has 32 * COLUMNS channels");

constexpr int GROUP_THREADS = 256;
constexpr int BLOCKS = COLUMNS * CHUNK > 24 ? 1 : 2;  // of a multiprocessor: for what a thread keeps in registers
constexpr int LEAST_BITS = 0x04000000;  // 2^-119: its reciprocal is finite, so that a group of zeros has an error of 0

// Blocks: chunks fastest, then channels, then rows. `partial` is (candidates, blocks of channels and rows).
extern "C" __global__ void __launch_bounds__(GROUP_THREADS, BLOCKS)
    group_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
                 const double* __restrict__ importance, const int* __restrict__ rank, double* partial, double* error,
                 float* __restrict__ s, float* __restrict__ inv_s, int out_features, int in_features, int candidates,
                 int rows_of_block) {
    __shared__ __align__(16) float slots[AHEAD * GROUP_THREADS * COLUMNS];
    const int chunks = (candidates - 1) / CHUNK + 1;
    const int column_blocks = (in_features - 1) / (GROUP_THREADS * COLUMNS) + 1;
    const int first_g = blockIdx.x % chunks * CHUNK;
    const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks;
    const int k = (block % column_blocks * GROUP_THREADS + static_cast<int>(threadIdx.x)) * COLUMNS;
    const int first_row = block / column_blocks * rows_of_block;
    const int rows = min(rows_of_block, out_features - first_row);
    const bool inside = k < in_features;  // which is a multiple of COLUMNS

    const float* const column = w + static_cast<Size>(first_row) * in_features + (inside ? k : 0);
    int any = 0;  // bits of the weights
    float scale[CHUNK][COLUMNS], squares[CHUNK][COLUMNS];
    const auto before = [&] {
        in_turn();
#pragma unroll
        for (int g = 0; g < CHUNK; ++g) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const bool there = inside && first_g + g < candidates;
                scale[g][j] = there ? candidate_s[static_cast<Size>(first_g + g) * in_features + k + j] : 0.0f;
                squares[g][j] = 0.0f;
            }
        }
    };
    for_each_row<COLUMNS, GROUP_THREADS, AHEAD, TURN>(
        slots, column, in_features, rows, before, load<COLUMNS>, [&](const Columns<COLUMNS>& now) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) any |= __float_as_int(now.v[j]);
#pragma unroll
            for (int g = 0; g < CHUNK; ++g) {
                float scaled[COLUMNS];
                int bits = LEAST_BITS;
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) scaled[j] = fabsf(now.v[j]) * scale[g][j];
                if constexpr (COLUMNS == 1) {
                    bits = max(bits, __float_as_int(scaled[0]));
                } else {
#pragma unroll
                    for (int j = 0; j < COLUMNS; j += 2)
                        bits = __vimax3_s32(bits, __float_as_int(scaled[j]), __float_as_int(scaled[j + 1]));
                }
                const float largest = __int_as_float(__reduce_max_sync(ALL_LANES, bits));
                const float step = largest * (1.0f / LARGEST), inverse = LARGEST * reciprocal(largest);
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    squares[g][j] = add_square(scaled[j], step, inverse, squares[g][j]);
                }
            }
        });
    const auto exact = [&](int g, int j) {
        double sum = 0.0;
        const Size at = static_cast<Size>(first_g + g) * in_features + k;
        for (int row = 0; row < rows; ++row) {
            int bits = 0;
            for (int other = 0; inside && other < COLUMNS; ++other)
                bits = max(bits, __float_as_int(fabsf(column[static_cast<Size>(row) * in_features + other]) *
                                                candidate_s[at + other]));
            const float step = step_of(__int_as_float(__reduce_max_sync(ALL_LANES, bits)));
            if (inside)
                sum += exact_error(column[static_cast<Size>(row) * in_features + j] * candidate_s[at + j], step);
        }
        return sum;
    };
    sum_of_block<CHUNK, COLUMNS, GROUP_THREADS>(squares, importance, partial, first_g, candidates, k, in_features,
                                                (any & 0x7fffffff) != 0, block, blocks, exact);
    if (last_to_come(&blocks_done, gridDim.x))
        choose_best<GROUP_THREADS, 8>(partial, rank, candidate_s, error, s, inv_s, candidates, in_features, blocks);
}
