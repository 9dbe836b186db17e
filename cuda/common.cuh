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

// What stands between the kernels of a graph, where the device can place the blocks of one while the one before it
// still runs (sm_90 and later). Here a kernel waits until the one before has ended, and sees what that has written;
// then the one behind may be placed. So whenever a kernel runs, all but the one before it have ended, and before it
// waits it may read what that one does not write. Every kernel waits, with all its threads.
__device__ __forceinline__ void in_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Four floats that are asked for before the kernel waits: an ordinary load may come behind it.
__device__ __forceinline__ float4 load_before(const float* from) {
#ifdef __CUDA_ARCH__
    float4 v;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
    return v;
#else
    return *reinterpret_cast<const float4*>(from);
#endif
}

// How many parts of so many items each there are; a last one that is not full counts. Written so that no sum passes the
// type's largest number.
template <typename Count>
__device__ __forceinline__ Count up(Count items, Count of_part) {
    return (items - 1) / of_part + 1;
}

// Groups of a row.
template <typename Count>
__device__ __forceinline__ Count group_count(Count in_features, Count group_size) {
    return up(in_features, group_size);
}

__device__ __forceinline__ Size global_thread() {
    return static_cast<Size>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ Size global_threads() {
    return static_cast<Size>(gridDim.x) * blockDim.x;
}
