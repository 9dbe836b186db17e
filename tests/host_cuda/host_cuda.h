// What nvcc gives a kernel, for g++: forced in front of a kernel's own text, which stays as it is.
//
// A thread of a block is a fibre, one runs at a time (blocks.cpp). Whatever waits for other threads notes where it
// stands in the source, so that a fault can name the line.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// nvcc takes alignas after __shared__, g++ takes only its own word for it there.
#define alignas(bytes) __attribute__((aligned(bytes)))
#define __align__(bytes) alignas(bytes)
// Blocks run one after another, so that one copy will do. The section makes all of it known to what fills it anew for
// every block and to the race detector.
#define __shared__ static __attribute__((section("host_shared")))

// --- vector types -----------------------------------------------------------------------------------------------

#define HOST_CUDA_VECTOR(type, name)                                        \
    struct alignas(2 * sizeof(type)) name##2 {                              \
        type x, y;                                                          \
    };                                                                      \
    struct name##3 {                                                        \
        type x, y, z;                                                       \
    };                                                                      \
    struct alignas(4 * sizeof(type) < 16 ? 4 * sizeof(type) : 16) name##4 { \
        type x, y, z, w;                                                    \
    };                                                                      \
    inline name##2 make_##name##2(type x, type y) {                         \
        return {x, y};                                                      \
    }                                                                       \
    inline name##3 make_##name##3(type x, type y, type z) {                 \
        return {x, y, z};                                                   \
    }                                                                       \
    inline name##4 make_##name##4(type x, type y, type z, type w) {         \
        return {x, y, z, w};                                                \
    }

HOST_CUDA_VECTOR(signed char, char)
HOST_CUDA_VECTOR(unsigned char, uchar)
HOST_CUDA_VECTOR(short, short)
HOST_CUDA_VECTOR(unsigned short, ushort)
HOST_CUDA_VECTOR(int, int)
HOST_CUDA_VECTOR(unsigned, uint)
HOST_CUDA_VECTOR(long long, longlong)
HOST_CUDA_VECTOR(unsigned long long, ulonglong)
HOST_CUDA_VECTOR(float, float)
HOST_CUDA_VECTOR(double, double)

extern uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// --- what the threads of a block do together ---------------------------------------------------------------------

namespace host_cuda {

struct Site {
    const char* what;
    const char* file;
    int line;
};

unsigned lane();
void wait_for_block(Site site);

struct Brought {
    uint64_t value[warpSize];
    unsigned lanes;  // those of the mask that are there and have not ended
};

// What every lane of `mask` brought, once all of them have come.
const Brought& exchange(unsigned mask, uint64_t value, Site site);
// The memory of `extern __shared__`, as large as the launch says.
void* dynamic_shared();
[[noreturn]] void fail(Site site, const char* message);
void note_atomic(const void* address, size_t bytes, const void* caller);
void note_fence();

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
T take(unsigned mask, T value, int source, Site site) {
    const Brought& brought = exchange(mask, to_bits(value), site);
    if (!(brought.lanes >> source & 1)) fail(site, "reads a lane that takes no part");
    return from_bits<T>(brought.value[source]);
}

template <class T, class Fold>
T reduce(unsigned mask, T value, Fold fold, Site site) {
    const Brought& brought = exchange(mask, to_bits(value), site);
    int source = __builtin_ctz(brought.lanes);
    T result = from_bits<T>(brought.value[source]);
    while (++source < warpSize)
        if (brought.lanes >> source & 1) result = fold(result, from_bits<T>(brought.value[source]));
    return result;
}

}  // namespace host_cuda

// The place of the call, in the signature of whatever waits.
#define HOST_CUDA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(HOST_CUDA_HERE) {
    host_cuda::wait_for_block({"__syncthreads", file, line});
}

inline void __syncwarp(unsigned mask = ~0u, HOST_CUDA_HERE) {
    host_cuda::exchange(mask, 0, {"__syncwarp", file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, HOST_CUDA_HERE) {
    const int first = host_cuda::lane() & -width;
    return host_cuda::take(mask, value, first + (source & (width - 1)), {"__shfl_sync", file, line});
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HOST_CUDA_HERE) {
    const int lane = host_cuda::lane(), source = lane - static_cast<int>(delta);
    return host_cuda::take(mask, value, source < (lane & -width) ? lane : source, {"__shfl_up_sync", file, line});
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, HOST_CUDA_HERE) {
    const int lane = host_cuda::lane(), source = lane + static_cast<int>(delta);
    const int end = (lane & -width) + width;
    return host_cuda::take(mask, value, source >= end ? lane : source, {"__shfl_down_sync", file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, HOST_CUDA_HERE) {
    const int lane = host_cuda::lane(), source = lane ^ bits;
    const int end = (lane & -width) + width;
    return host_cuda::take(mask, value, source >= end ? lane : source, {"__shfl_xor_sync", file, line});
}

// Blocks run one after another, one thread at a time: what has been written is there. Only the race detector listens.
inline void __threadfence() {
    host_cuda::note_fence();
}

inline unsigned __ballot_sync(unsigned mask, int predicate, HOST_CUDA_HERE) {
    const unsigned bit = predicate ? 1u << host_cuda::lane() : 0;
    return host_cuda::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; }, {"__ballot_sync", file, line});
}

inline int __any_sync(unsigned mask, int predicate, HOST_CUDA_HERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}

inline int __all_sync(unsigned mask, int predicate, HOST_CUDA_HERE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, HOST_CUDA_HERE) {
    return host_cuda::reduce(mask, value, [](T a, T b) { return a + b; }, {"__reduce_add_sync", file, line});
}

template <class T>
T __reduce_max_sync(unsigned mask, T value, HOST_CUDA_HERE) {
    return host_cuda::reduce(mask, value, [](T a, T b) { return a < b ? b : a; }, {"__reduce_max_sync", file, line});
}

inline unsigned __reduce_or_sync(unsigned mask, unsigned value, HOST_CUDA_HERE) {
    return host_cuda::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; },
                             {"__reduce_or_sync", file, line});
}

template <class T>
T __reduce_min_sync(unsigned mask, T value, HOST_CUDA_HERE) {
    return host_cuda::reduce(mask, value, [](T a, T b) { return b < a ? b : a; }, {"__reduce_min_sync", file, line});
}

// --- atomics: fibres change at barriers only, so that nothing comes between a read and its write -------------------

#ifdef __SANITIZE_THREAD__
#define HOST_CUDA_ATOMIC __attribute__((noinline, no_sanitize("thread")))
#define HOST_CUDA_NOTE(address) host_cuda::note_atomic(address, sizeof(*address), __builtin_return_address(0))
#else
#define HOST_CUDA_ATOMIC
#define HOST_CUDA_NOTE(address)
#endif

template <class T>
using HostCudaSame = std::enable_if_t<true, T>;  // an argument that does not choose T

#define HOST_CUDA_ATOMIC_FUNCTION(name, result)                  \
    template <class T>                                           \
    HOST_CUDA_ATOMIC T name(T* address, HostCudaSame<T> value) { \
        HOST_CUDA_NOTE(address);                                 \
        const T old = *address;                                  \
        *address = result;                                       \
        return old;                                              \
    }

HOST_CUDA_ATOMIC_FUNCTION(atomicAdd, old + value)
HOST_CUDA_ATOMIC_FUNCTION(atomicMax, old < value ? value : old)
HOST_CUDA_ATOMIC_FUNCTION(atomicMin, value < old ? value : old)
HOST_CUDA_ATOMIC_FUNCTION(atomicExch, value)

template <class T>
HOST_CUDA_ATOMIC T atomicCAS(T* address, HostCudaSame<T> expected, HostCudaSame<T> value) {
    HOST_CUDA_NOTE(address);
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

// --- arithmetic --------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
    return *address;
}

template <class T>
T min(T a, HostCudaSame<T> b) {
    return b < a ? b : a;
}

template <class T>
T max(T a, HostCudaSame<T> b) {
    return a < b ? b : a;
}

inline float __fadd_rn(float a, float b) {
    return a + b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return fmaf(a, b, c);
}
// Nearer than on the device, which may be 2 units in the last place off.
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __logf(float value) {
    return logf(value);
}
inline int __vimax3_s32(int a, int b, int c) {
    return max(max(a, b), c);
}
inline int __float_as_int(float value) {
    return host_cuda::from_bits<int>(host_cuda::to_bits(value));
}
inline float __int_as_float(int bits) {
    return host_cuda::from_bits<float>(host_cuda::to_bits(bits));
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return chosen;
}
inline int __popc(unsigned value) {
    return __builtin_popcount(value);
}

// Saturates, and makes 0 of NaN, as the hardware does.
inline int __float2int_rn(float value) {
    if (!(value > -2147483648.0f)) return value != value ? 0 : INT32_MIN;
    return value < 2147483648.0f ? static_cast<int>(rintf(value)) : INT32_MAX;
}

// --- how a kernel is called --------------------------------------------------------------------------------------

namespace host_cuda {

struct Entry {
    const char* types;  // of the arguments, in the codes of Python's struct
    void (*call)(const uint64_t* arguments);
};

template <class T>
constexpr char type_code() {
    if (std::is_pointer_v<T>) return 'P';
    if (std::is_same_v<T, float>) return 'f';
    if (std::is_same_v<T, double>) return 'd';
    if (std::is_integral_v<T> && sizeof(T) == 4) return std::is_signed_v<T> ? 'i' : 'I';
    if (std::is_integral_v<T> && sizeof(T) == 8) return std::is_signed_v<T> ? 'q' : 'Q';
    return '?';
}

template <auto kernel, class Function>
struct Call;

template <auto kernel, class... Arguments>
struct Call<kernel, void (*)(Arguments...)> {
    static constexpr char types[] = {type_code<Arguments>()..., '\0'};

    static void call(const uint64_t* arguments) { unpack(arguments, std::index_sequence_for<Arguments...>{}); }

    template <size_t... i>
    static void unpack(const uint64_t* arguments, std::index_sequence<i...>) {
        kernel(from_bits<Arguments>(arguments[i])...);
    }
};

}  // namespace host_cuda

#define HOST_CUDA_ENTRY(kernel)                                                                           \
    extern "C" __attribute__((visibility("default"))) const host_cuda::Entry host_cuda_entry_##kernel;    \
    const host_cuda::Entry host_cuda_entry_##kernel = {host_cuda::Call<kernel, decltype(&kernel)>::types, \
                                                       host_cuda::Call<kernel, decltype(&kernel)>::call};

// What of it is in the module's own section; nothing where no kernel has shared arrays.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_host_shared[], __stop_host_shared[];
#define HOST_CUDA_MODULE                                                                  \
    extern "C" __attribute__((visibility("default"))) unsigned char* host_cuda_shared[2]; \
    unsigned char* host_cuda_shared[2] = {__start_host_shared, __stop_host_shared};
