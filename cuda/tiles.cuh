// The operands of products of int8 matrices as they lie, and the order in which tiles are taken: what all products on
// tensor cores share.
//
// Tiles of DEPTH input channels, a row of a tile the 128 bytes that a swizzled matrix has, whose 16-byte pieces lie
// permuted (see `swizzled`), padded with zeros: so a stage of a pipeline is one contiguous piece of each operand,
// whatever the sizes.
#pragma once

#include "common.cuh"

#if !defined(TOKENS) || !defined(ROWS) || !defined(DEPTH)
#error "the table of kernels gives the macros: -DTOKENS=128 -DROWS=128 -DDEPTH=128 ..."
#endif
static_assert(DEPTH == 128, "a row of a tile is 128 bytes: eight pieces in all banks");

constexpr int PIECE = 16;  // bytes

// Where a byte of a tile's row lies in it: so that eight rows of one piece lie in different banks.
__device__ __forceinline__ int swizzled(int line, int byte) {
    return (byte / PIECE ^ line % 8) * PIECE + byte % PIECE;
}

// Of three sums of products of digits, each worth 256 of the next.
__device__ __forceinline__ float combined(int high, int middle, int low) {
    return fmaf(static_cast<float>(high), 65536.0f, fmaf(static_cast<float>(middle), 256.0f, static_cast<float>(low)));
}

// A tile of a product: bands of so many tiles of tokens, within a band the tokens change fastest, so that what all
// blocks read at a time stays in the L2 cache.
struct Place {
    int token_tile, row_tile;

    __device__ __forceinline__ Place(int tile, int token_tiles, int row_tiles, int band_tiles) {
        const int band = tile / (band_tiles * row_tiles);
        const int height = min(band_tiles, token_tiles - band * band_tiles);
        const int rest = tile - band * band_tiles * row_tiles;
        token_tile = band * band_tiles + rest % height;
        row_tile = rest / height;
    }
};
