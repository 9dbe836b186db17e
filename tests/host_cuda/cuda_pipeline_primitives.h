// Asynchronous copies to shared memory, made at once: a wait that is missing goes unseen, a barrier does not.
#pragma once

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t bytes, size_t zeros = 0) {
    if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0)
        host_cuda::fail({"__pipeline_memcpy_async", __FILE__, __LINE__}, "misaligned address");
    // Word by word, for the race detector to see.
    auto* const to = static_cast<unsigned*>(shared);
    auto* const from = static_cast<const unsigned*>(global);
    for (size_t i = 0; i < bytes / 4; ++i) to[i] = i < (bytes - zeros) / 4 ? from[i] : 0;
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {}
