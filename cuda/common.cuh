// What every kernel shares: the type of sizes, and walking an index space of any size with any grid.
#pragma once

// Sizes and linear indices: rows x cols passes 2^31 elements long before it fills a card.
using Size = unsigned long long;

__device__ __forceinline__ Size global_thread() {
    return static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ Size global_threads() {
    return static_cast<Size>(gridDim.x) * blockDim.x;
}
