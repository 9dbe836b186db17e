// The operands of the search with objective output as digits, in the order in which products copy them; see
// search_output.cuh. In a tile (tiles.cuh) the high digits of all its rows lie before the low ones.
#pragma once
#include "search_output.cuh"
#include "tiles.cuh"

static_assert(DEPTH == 128, "a warp has the channels of a tile, four a lane");

constexpr int ROW_BYTES = 2 * ROWS * DEPTH, TOKEN_BYTES = 2 * TOKENS * DEPTH;

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
constexpr int BIAS = 0x8080;          // 128 in each digit: a sum with it has both digits in its low bytes, not negative

// The digits of four numbers, one byte each.
struct Digits {
    unsigned high, low;
    // From the bits of MAGIC + BIAS + number.
    __device__ __forceinline__ explicit Digits(const int (&biased)[4]) {
        const unsigned front = __byte_perm(biased[0], biased[1], 0x5410);
        const unsigned back = __byte_perm(biased[2], biased[3], 0x5410);
        high = __byte_perm(front, back, 0x7531) ^ 0x80808080;
        low = __byte_perm(front, back, 0x6420) ^ 0x80808080;
    }
    __device__ __forceinline__ void store(signed char* tile, int rows, int line, int byte) const {
        unsigned* const to = reinterpret_cast<unsigned*>(tile + line * DEPTH + swizzled(line, byte));
        to[0] = high;
        to[rows * DEPTH / 4] = low;
    }
};

__device__ __forceinline__ int biased(float number) {
    return __float_as_int(number + (MAGIC + BIAS));
}

// Four elements of a row; 0 beyond its end.
__device__ __forceinline__ Columns<4> four(const float* row, int k, int in_features, bool there) {
    Columns<4> found = {};
    if (!there) return found;
    if (in_features % 4 == 0) return k < in_features ? load<4>(row + k) : found;
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (k + j < in_features) found.v[j] = row[k + j];
    return found;
}

// What a product is given, its sizes, and where its sums go.
struct Operands {
    const signed char *x, *d;
    const double* base;
    double* partial;
};

struct Sizes {
    int tokens, out_features, in_features, row_tiles, first, count;
    // Of a sum of the block that has these tiles, WIDTH tokens wide.
    template <int WIDTH>
    __device__ __forceinline__ Size place(int row_tile, int token_tile, int warp) const {
        const Size tiles = static_cast<Size>(row_tiles) * up(tokens, WIDTH);
        return ((first + row_tile / row_tiles) * tiles + row_tile % row_tiles * up(tokens, WIDTH) + token_tile) *
                   WARPS +
               warp;
    }
    // What the square of a sum of digits of a row stands for in the mean; 0 beyond the last row.
    __device__ __forceinline__ double weight(const double* base, int row_tile, int line) const {
        const int row = row_tile % row_tiles * ROWS + line;
        if (row >= out_features) return 0.0;
        const double unit = base[static_cast<Size>(row_tile / row_tiles) * out_features + row] / SPAN;
        return unit * unit / (static_cast<double>(tokens) * out_features);
    }
};

#ifndef __CUDACC__

// What the tensor cores compute, in plain words: for where there are none.
template <int WIDTH>
void multiply_plainly(const Operands& of, const Sizes& sizes) {
    const int depths = up(sizes.in_features, DEPTH), token_parts = up(sizes.tokens, WIDTH);
    const auto digit = [&](const signed char* tile, int rows, int line, int k, int low) {
        return static_cast<int>(
            tile[k / DEPTH * 2 * rows * DEPTH + (low * rows + line) * DEPTH + swizzled(line, k % DEPTH)]);
    };
    const Size all = static_cast<Size>(sizes.row_tiles) * sizes.count * token_parts * WARPS;
    for (Size i = global_thread(); i < all; i += global_threads()) {
        const int warp = i % WARPS, token_part = i / WARPS % token_parts;
        const int row_tile = i / WARPS / token_parts;
        const signed char* const rows = of.d + static_cast<Size>(row_tile) * depths * ROW_BYTES;
        const int first = token_part * WIDTH % TOKENS;  // of the tile of activations
        const signed char* const tokens = of.x + static_cast<Size>(token_part * WIDTH / TOKENS) * depths * TOKEN_BYTES;
        double sum = 0.0;
        for (int line = 16 * warp; line < 16 * warp + 16; ++line) {
            const double weight = sizes.weight(of.base, row_tile, line);
            if (weight == 0.0) continue;
            float squares = 0.0f;
            for (int token = 0; token < WIDTH && token_part * WIDTH + token < sizes.tokens; ++token) {
                int sums[3] = {};
                for (int k = 0; k < sizes.in_features; ++k) {
                    const int high = digit(rows, ROWS, line, k, 0), low = digit(rows, ROWS, line, k, 1);
                    const int x_high = digit(tokens, TOKENS, first + token, k, 0),
                              x_low = digit(tokens, TOKENS, first + token, k, 1);
                    sums[0] += high * x_high;
                    sums[1] += high * x_low + low * x_high;
                    sums[2] += low * x_low;
                }
                const float value = combined(sums[0], sums[1], sums[2]);
                squares = fmaf(value, value, squares);
            }
            sum += weight * squares;
        }
        of.partial[sizes.place<WIDTH>(row_tile, token_part, warp)] = sum;
    }
}

#endif
