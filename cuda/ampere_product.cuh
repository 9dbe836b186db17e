// How a product of int8 matrices runs on Ampere and all later: a block of eight warps makes ROWS rows by half a tile of
// tokens, a warp 32 rows by 32 tokens. While STAGES - 1 stages are copied, all warps multiply one.
#pragma once

#include "ampere.cuh"
#include "tiles.cuh"

#ifndef STAGES
#error "the table of kernels gives the macros: -DSTAGES=2 ..."
#endif
static_assert(TOKENS == 128 && ROWS == 128, "eight warps have 32 rows by 32 of 64 tokens each");
static_assert(STAGES >= 2, "one stage is multiplied while another is copied");

constexpr int MULTIPLIERS = 256;  // threads of a block
// 16 rows and 8 tokens are what an instruction makes; a thread has 4 sums of it.
constexpr int ROW_PARTS = 2, TOKEN_PARTS = 4;

__device__ __forceinline__ int lane() {
    return threadIdx.x % 32;
}
// The warp's, of the block's.
__device__ __forceinline__ int first_row() {
    return threadIdx.x / 32 % 4 * 32;
}
__device__ __forceinline__ int first_token() {
    return threadIdx.x / 128 * 32;
}
// What a thread's sums of a part are of: the upper one of two rows, the first of two tokens.
__device__ __forceinline__ int row_of(int part) {
    return first_row() + 16 * part + lane() / 4;
}
__device__ __forceinline__ int token_of(int part) {
    return first_token() + 8 * part + lane() % 4 * 2;
}

// Bytes that lie one after another, by all threads.
template <int BYTES>
__device__ __forceinline__ void copy_together(unsigned to, const signed char* from) {
#pragma unroll
    for (int i = 0; i < BYTES / PIECE / MULTIPLIERS; ++i) {
        const int byte = (i * MULTIPLIERS + threadIdx.x) * PIECE;
        copy_piece(to + byte, from + byte);
    }
}

// Of a tile's rows the warp's 16 of a part, by 32 input channels from k on.
__device__ __forceinline__ void load_rows(unsigned (&to)[4], unsigned tile, int part, int k) {
    const int line = first_row() + 16 * part + lane() % 16;
    load_matrices(to, tile + line * DEPTH + swizzled(line, k + lane() / 16 * PIECE));
}

// Of half a tile's tokens the warp's 8 of a part and of the next: to[0] and to[1], to[2] and to[3].
__device__ __forceinline__ void load_tokens(unsigned (&to)[4], unsigned tile, int part, int k) {
    const int line = first_token() + 8 * part + lane() / 16 * 8 + lane() % 8;
    load_matrices(to, tile + line * DEPTH + swizzled(line, k + lane() / 8 % 2 * PIECE));
}

// copy(to, depth) for so many stages of STAGE_BYTES, and multiply(stage, k, last) for each 32 input channels of them.
template <int STAGE_BYTES, typename Copy, typename Multiply>
__device__ __forceinline__ void each_stage(unsigned shared, int depths, Copy copy, Multiply multiply) {
    const auto copy_stage = [&](int depth) {
        if (depth < depths) copy(shared + depth % STAGES * STAGE_BYTES, depth);
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) copy_stage(i);
#pragma unroll 1
    for (int depth = 0; depth < depths; ++depth) {
        copies_wait<STAGES - 2>();
        __syncthreads();  // the stage is there, and the one before is read by all
        copy_stage(depth + STAGES - 1);
#pragma unroll 1
        for (int k = 0; k < DEPTH; k += 32)
            multiply(shared + depth % STAGES * STAGE_BYTES, k, depth == depths - 1 && k == DEPTH - 32);
    }
}
