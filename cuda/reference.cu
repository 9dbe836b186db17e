// What a run is measured against, outside the timed passes: the unquantized product, and sums of squared errors.
#include "common.cuh"

#if !defined(TILE) || !defined(MICRO) || !defined(THREADS)
#error "TILE, MICRO and THREADS must be given: -DTILE=16 -DMICRO=4 -DTHREADS=256"
#endif
static_assert(TILE >= 1 && TILE <= 32, "TILE is 1 to 32: a block of TILE * TILE threads has at most 1,024");
static_assert(MICRO >= 1, "MICRO is at least 1: a thread of the product makes MICRO * MICRO outputs");
static_assert(THREADS >= 1 && THREADS <= 1024 && (THREADS & (THREADS - 1)) == 0,
              "THREADS is a power of two up to 1,024: error_sums halves its blocks until one thread is left");

constexpr int SIDE = MICRO * TILE;  // outputs of a block along each side
constexpr int STRIDE = SIDE + 2;

// Y = X * W^T with the sums in double, rounded to float once at the end.
extern "C" __global__ void __launch_bounds__(TILE * TILE) matmul_reference(const float* __restrict__ x,
                                                                        const float* __restrict__ w,
                                                                        float* __restrict__ y, int tokens,
                                                                        int out_features, int in_features) {
    __shared__ double x_tile[TILE][STRIDE];
    __shared__ double w_tile[TILE][STRIDE];
    const int tx = threadIdx.x;
    const int ty = threadIdx.y;
    const unsigned column_blocks = (out_features + SIDE - 1) / SIDE;
    const int first_row = blockIdx.x / column_blocks * SIDE;
    const int first_column = blockIdx.x % column_blocks * SIDE;

    double sums[MICRO][MICRO] = {};
    for (int base = 0; base < in_features; base += TILE) {
        const int k = base + tx;
#pragma unroll
        for (int i = 0; i < MICRO; ++i) {
            const int row = first_row + ty + i * TILE;
            const int column = first_column + ty + i * TILE;
            x_tile[tx][ty + i * TILE] =
                row < tokens && k < in_features ? x[static_cast<Size>(row) * in_features + k] : 0.0f;
            w_tile[tx][ty + i * TILE] =
                column < out_features && k < in_features ? w[static_cast<Size>(column) * in_features + k] : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
#pragma unroll
            for (int m = 0; m < MICRO; ++m)
#pragma unroll
                for (int n = 0; n < MICRO; ++n)
                    sums[m][n] = fma(x_tile[i][ty + m * TILE], w_tile[i][tx + n * TILE], sums[m][n]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < MICRO; ++m)
#pragma unroll
        for (int n = 0; n < MICRO; ++n) {
            const int row = first_row + ty + m * TILE;
            const int column = first_column + tx + n * TILE;
            if (row < tokens && column < out_features)
                y[static_cast<Size>(row) * out_features + column] = static_cast<float>(sums[m][n]);
        }
}

// Each block leaves two partial sums: of reference^2, and of (reference - value)^2. The grid is fixed by the launcher
// and the tree by THREADS, so that the order of the sums is always the same.
extern "C" __global__ void __launch_bounds__(THREADS) error_sums(const float* __restrict__ reference,
                                                              const float* __restrict__ value,
                                                              double* __restrict__ partial, Size count) {
    __shared__ double signals[THREADS];
    __shared__ double noises[THREADS];
    double signal = 0.0;
    double noise = 0.0;
    for (Size i = global_thread(); i < count; i += global_threads()) {
        const double exact = reference[i];
        const double error = exact - value[i];
        signal += exact * exact;
        noise += error * error;
    }
    signals[threadIdx.x] = signal;
    noises[threadIdx.x] = noise;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) {
            signals[threadIdx.x] += signals[threadIdx.x + half];
            noises[threadIdx.x] += noises[threadIdx.x + half];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        partial[2 * blockIdx.x] = signals[0];
        partial[2 * blockIdx.x + 1] = noises[0];
    }
}
