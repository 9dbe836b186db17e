// What every kernel shares: the type of sizes, and walking an index space of any size with any grid.
#pragma once

// Sizes and linear indices: rows x cols passes 2^31 elements long before it fills a card.
using Size = unsigned long long;

// What is compiled for, such as 900 for sm_90; 0 where it is not a GPU.
#ifdef __CUDA_ARCH__
constexpr int ARCHITECTURE = __CUDA_ARCH__;
#else
constexpr int ARCHITECTURE = 0;
#endif

// Groups of a row; a last one that is not full counts. Written so that no sum passes the type's largest number.
template <typename Count>
__device__ __forceinline__ Count group_count(Count in_features, Count group_size) {
    return (in_features - 1) / group_size + 1;
}

__device__ __forceinline__ Size global_thread() {
    return static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ Size global_threads() {
    return static_cast<Size>(gridDim.x) * blockDim.x;
}
