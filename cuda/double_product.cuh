// Products of fp32 matrices with sums in double: a block of TILE * TILE threads makes SIDE rows of one matrix by SIDE
// of the other, a thread MICRO * MICRO outputs, TILE apart.
#pragma once

#include "common.cuh"

#if !defined(TILE) || !defined(MICRO)
#error "TILE and MICRO must be given: -DTILE=16 -DMICRO=4"
#endif
static_assert(TILE >= 1 && TILE <= 32, "TILE is 1 to 32: a block of TILE * TILE threads has at most 1,024");
static_assert(MICRO >= 1, "MICRO is at least 1: a thread makes MICRO * MICRO outputs");

constexpr int SIDE = MICRO * TILE;  // outputs of a block along each side

// In shared memory: SIDE rows of both matrices by TILE columns of theirs.
struct DoubleTiles {
    double a[TILE][SIDE + 2], b[TILE][SIDE + 2];
};

// a(k)(row) and b(k)(row) are asked for all rows of the block, and beyond the end: they are 0 there. sums[m][n] is of
// the rows threadIdx.y + m * TILE of a and threadIdx.x + n * TILE of b.
template <typename A, typename B>
__device__ __forceinline__ void add_products(DoubleTiles& tiles, double (&sums)[MICRO][MICRO], int in_features, A a,
                                             B b) {
    const int tx = threadIdx.x, ty = threadIdx.y;
    for (int base = 0; base < in_features; base += TILE) {
        const auto of_a = a(base + tx);
        const auto of_b = b(base + tx);
#pragma unroll
        for (int i = 0; i < MICRO; ++i) {
            const int row = ty + i * TILE;
            tiles.a[tx][row] = of_a(row);
            tiles.b[tx][row] = of_b(row);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
#pragma unroll
            for (int m = 0; m < MICRO; ++m)
#pragma unroll
                for (int n = 0; n < MICRO; ++n)
                    sums[m][n] = fma(tiles.a[i][ty + m * TILE], tiles.b[i][tx + n * TILE], sums[m][n]);
        }
        __syncthreads();
    }
}
