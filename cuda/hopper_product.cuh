// How a product of int8 matrices runs on Hopper: stages in shared memory between what copies and what multiplies.
//
// The blocks of a cluster share a tile of tokens, each with ROWS rows of its own, and each copies its share of the
// tokens' bytes for all of them. One warp asks for the copies; two warpgroups multiply 64 rows each. Blocks stay and
// take tile after tile.
#pragma once

#include "hopper.cuh"
#include "tiles.cuh"

#ifndef CLUSTER
#error "the table of kernels gives the macros: -DCLUSTER=2 ..."
#endif
static_assert(CLUSTER == 1 || CLUSTER == 2 || CLUSTER == 4, "the blocks of a cluster copy equal shares of a stage");
static_assert(ROWS == 128, "two warpgroups have 64 rows each");

constexpr int BAND = 8;
constexpr int MULTIPLYING_WARPS = 8;

// So many bytes further in a matrix.
__device__ constexpr Size further(int bytes) {
    return bytes / PIECE;
}

// COUNT stages, in turn, each with the block's own OWN_BYTES before the SHARED_BYTES of its cluster; behind them two
// barriers for each.
template <int COUNT, int OWN_BYTES, int SHARED_BYTES>
struct Pipeline {
    const unsigned stages;
    const int depths, token_tiles, row_tiles;  // stages of a tile, and tiles; of rows those of a whole cluster
    const unsigned rank;                       // of the block in its cluster
    int at = 0;
    unsigned phase = 0;

    __device__ __forceinline__ Pipeline(unsigned shared, int stages_of_tile, int tiles_of_tokens, int tiles_of_rows)
        : stages(shared),
          depths(stages_of_tile),
          token_tiles(tiles_of_tokens),
          row_tiles(tiles_of_rows),
          rank(CLUSTER > 1 ? cluster_rank() : 0) {}
    __device__ __forceinline__ unsigned stage() const { return stages + at * (OWN_BYTES + SHARED_BYTES); }
    __device__ __forceinline__ unsigned full() const { return stages + COUNT * (OWN_BYTES + SHARED_BYTES) + 8 * at; }
    __device__ __forceinline__ unsigned empty() const { return full() + 8 * COUNT; }
    __device__ __forceinline__ void next() {
        if (++at == COUNT) {
            at = 0;
            phase ^= 1;
        }
    }

    __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }

    // All of a block: one warp does `copy`, the warps that multiply do `multiply`.
    template <typename Copy, typename Multiply>
    __device__ __forceinline__ void run(Copy copy, Multiply multiply) {
        if (threadIdx.x == 0) {
            for (Pipeline each = *this; each.phase == 0; each.next()) {
                barrier_init(each.full(), 1);
                barrier_init(each.empty(), MULTIPLYING_WARPS * CLUSTER);
            }
            barrier_init_done();
        }
        __syncthreads();
        if (CLUSTER > 1) cluster_sync();
        in_turn();
        // Registers at launch are 168 a thread: the warps that multiply take what the one that copies does not need.
        if (threadIdx.x >= 32 * MULTIPLYING_WARPS) {
            give_registers<40>();
            if (threadIdx.x < 32 * (MULTIPLYING_WARPS + 1)) copy();
        } else {
            take_registers<232>();
            multiply();
        }
        if (CLUSTER > 1) cluster_sync();  // a block that has ended can take neither copies nor arrivals
    }

    // take(tile of tokens, the block's tile of rows) for each tile of its cluster.
    template <typename Take>
    __device__ __forceinline__ void each_tile(Take take) const {
        for (int tile = blockIdx.x / CLUSTER; tile < token_tiles * row_tiles; tile += gridDim.x / CLUSTER) {
            const Place place(tile, token_tiles, row_tiles, BAND);
            take(place.token_tile, place.row_tile * CLUSTER + rank);
        }
    }

    // By one thread: the stages of a tile, of `bytes` for the whole cluster each.
    __device__ __forceinline__ void copy(const signed char* own, const signed char* shared, int bytes) {
        const int share = bytes / CLUSTER;
        const unsigned offset = OWN_BYTES + rank * share;
        shared += rank * share;
#pragma unroll 1
        for (int depth = 0; depth < depths; ++depth, next()) {
            barrier_wait(empty(), phase ^ 1);
            barrier_expect(full(), OWN_BYTES + bytes);
            bulk_copy(stage(), own, OWN_BYTES, full());
            if (CLUSTER > 1)
                bulk_copy(stage() + offset, shared, share, full(), (1 << CLUSTER) - 1);
            else
                bulk_copy(stage() + offset, shared, share, full());
            own += OWN_BYTES;
            shared += bytes;
        }
    }

    // The two warpgroups that multiply, from here on. The matrices of a stage: the 64 rows of a warpgroup, the tokens.
    __device__ __forceinline__ Size rows() const { return matrix(stage() + threadIdx.x / 128 * 64 * DEPTH); }
    __device__ __forceinline__ Size tokens() const { return matrix(stage() + OWN_BYTES); }
    // Every warp tells every block of the cluster that it has read a stage.
    __device__ __forceinline__ void release(unsigned barrier) const {
        if (lane() < CLUSTER) barrier_arrive(barrier, lane());
    }

    // multiply(rows, tokens) for the stages of a tile; products of one run while the next is waited for.
    template <typename Multiply>
    __device__ __forceinline__ void each_stage(Multiply multiply) {
        unsigned before = 0;
#pragma unroll 1
        for (int depth = 0; depth < depths; ++depth, next()) {
            const Size of_rows = rows(), of_tokens = tokens();
            barrier_wait(full(), phase);
            wgmma_begin();
            multiply(of_rows, of_tokens);
            wgmma_commit();
            wgmma_wait<1>();  // the stage before is read
            if (depth > 0) release(before);
            before = empty();
        }
        wgmma_wait<0>();
        release(before);
    }
};
