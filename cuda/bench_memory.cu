// What a benchmark measures the memory by, and empties the cache with: kernels that read, write or copy, nothing else.
//
// 16 bytes an access, neighbouring threads side by side, four accesses of a thread in flight.
#include "common.cuh"

__device__ __forceinline__ float sum_of(float4 value) {
    return value.x + value.y + value.z + value.w;
}

constexpr float NEVER = 3e38f;  // no sum of what is read
constexpr float WRITTEN = 2.5f;

// Reads `count` floats, a multiple of 4. A thread's sum is written only where it is NEVER, so that the compiler keeps
// the loads and nothing is written. Emptying the cache by reads leaves no lines that are yet to go to memory.
extern "C" __global__ void bench_read(const float* __restrict__ data, float* __restrict__ out, Size count) {
    const float4* __restrict__ quads = reinterpret_cast<const float4*>(data);
    const Size all = count / 4, stride = global_threads();
    float sum = 0.0f;
    Size i = global_thread();
    for (; i + 3 * stride < all; i += 4 * stride) {
        const float4 a = quads[i], b = quads[i + stride], c = quads[i + 2 * stride], d = quads[i + 3 * stride];
        sum += sum_of(a) + sum_of(b) + (sum_of(c) + sum_of(d));
    }
    for (; i < all; i += stride) {
        sum += sum_of(quads[i]);
    }
    if (sum == NEVER) {
        out[0] = sum;
    }
}

extern "C" __global__ void bench_write(float* __restrict__ out, Size count) {
    float4* __restrict__ quads = reinterpret_cast<float4*>(out);
    for (Size i = global_thread(); i < count / 4; i += global_threads()) {
        quads[i] = make_float4(WRITTEN, WRITTEN, WRITTEN, WRITTEN);
    }
}

extern "C" __global__ void bench_copy(const float* __restrict__ data, float* __restrict__ out, Size count) {
    const float4* __restrict__ from = reinterpret_cast<const float4*>(data);
    float4* __restrict__ to = reinterpret_cast<float4*>(out);
    const Size all = count / 4, stride = global_threads();
    Size i = global_thread();
    for (; i + 3 * stride < all; i += 4 * stride) {
        const float4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
        to[i] = a;
        to[i + stride] = b;
        to[i + 2 * stride] = c;
        to[i + 3 * stride] = d;
    }
    for (; i < all; i += stride) {
        to[i] = from[i];
    }
}
