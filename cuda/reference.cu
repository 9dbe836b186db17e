// What a run is measured against, outside the timed passes: the unquantized product, and sums of squared errors.
#include "double_product.cuh"

#ifndef THREADS
#error "THREADS must be given: -DTHREADS=256"
#endif
static_assert(THREADS >= 1 && THREADS <= 1024 && (THREADS & (THREADS - 1)) == 0,
              "THREADS is a power of two up to 1,024: error_sums halves its blocks until one thread is left");

// Y = X * W^T with the sums in double, rounded to float once at the end.
extern "C" __global__ void __launch_bounds__(TILE * TILE) matmul_reference(const float* __restrict__ x,
                                                                        const float* __restrict__ w,
                                                                        float* __restrict__ y, int tokens,
                                                                        int out_features, int in_features) {
    in_turn();
    __shared__ DoubleTiles tiles;
    const unsigned column_blocks = up(out_features, SIDE);
    const int first_row = blockIdx.x / column_blocks * SIDE;
    const int first_column = blockIdx.x % column_blocks * SIDE;

    double sums[MICRO][MICRO] = {};
    const auto elements = [=](const float* matrix, int first, int rows, int k) {
        return [=](int row) {
            return first + row < rows && k < in_features ? matrix[static_cast<Size>(first + row) * in_features + k]
                                                         : 0.0f;
        };
    };
    add_products(
        tiles, sums, in_features, [&](int k) { return elements(x, first_row, tokens, k); },
        [&](int k) { return elements(w, first_column, out_features, k); });
#pragma unroll
    for (int m = 0; m < MICRO; ++m)
#pragma unroll
        for (int n = 0; n < MICRO; ++n) {
            const int row = first_row + threadIdx.y + m * TILE;
            const int column = first_column + threadIdx.x + n * TILE;
            if (row < tokens && column < out_features)
                y[static_cast<Size>(row) * out_features + column] = static_cast<float>(sums[m][n]);
        }
}

// Each block leaves two partial sums: of reference^2, and of (reference - value)^2. The grid is fixed by the launcher
// and the tree by THREADS, so that the order of the sums is always the same.
extern "C" __global__ void __launch_bounds__(THREADS) error_sums(const float* __restrict__ reference,
                                                              const float* __restrict__ value,
                                                              double* __restrict__ partial, Size count) {
    in_turn();
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
