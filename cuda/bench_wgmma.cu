// The rate of the matrix units by wgmma (sm_90a): two warpgroups a block multiply what lies in shared memory, over and
// over.
//
// mma.sync reaches about two thirds of it. Operands are bits that differ all over, as in bench_rates.cu; both operands
// come from shared memory in the 128-byte swizzle, of which only the addresses matter here.
#include "common.cuh"

constexpr int SHARED = 49152;  // bytes: A of each warpgroup, 64 rows of 128 bytes, and B, 256 rows
constexpr int A_BYTES = 64 * 128;
constexpr int THREADS = 256;

// A wgmma descriptor: start, and 1,024 bytes from one group of eight rows to the next, in units of 16; 128-byte
// swizzle.
__device__ __forceinline__ Size descriptor(const void* place) {
    const Size address = __cvta_generic_to_shared(place);
    return ((address & 0x3ffff) >> 4) | (Size(1) << 16) | (Size(64) << 32) | (Size(1) << 62);
}

__device__ __forceinline__ void fill(unsigned char* shared, unsigned mask, unsigned bits) {
    unsigned seed = threadIdx.x * 2654435761u + blockIdx.x * 97u + 1u;
    for (int i = threadIdx.x; i < SHARED / 4; i += THREADS) {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        reinterpret_cast<unsigned*>(shared)[i] = (seed & mask) | bits;
    }
    asm volatile("fence.proxy.async.shared::cta;");
    __syncthreads();
}

#define EIGHT(X, i) X(i), X(i + 1), X(i + 2), X(i + 3), X(i + 4), X(i + 5), X(i + 6), X(i + 7)
#define ALL(X)                                                                                                    \
    EIGHT(X, 0), EIGHT(X, 8), EIGHT(X, 16), EIGHT(X, 24), EIGHT(X, 32), EIGHT(X, 40), EIGHT(X, 48), EIGHT(X, 56), \
        EIGHT(X, 64), EIGHT(X, 72), EIGHT(X, 80), EIGHT(X, 88), EIGHT(X, 96), EIGHT(X, 104), EIGHT(X, 112),       \
        EIGHT(X, 120)
#define FLOAT(i) "+f"(sum[i])
#define INT(i) "+r"(sum[i])
// The 128 sums of a thread.
#define SUMS                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                       \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "             \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "             \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "             \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

extern "C" __global__ void __launch_bounds__(256, 1) bench_wgmma_fp16(float* __restrict__ out, int steps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    fill(shared, 0x9fff9fffu, 0x1c001c00u);  // halves from 2^-8 to 2
    const Size a = descriptor(shared + threadIdx.x / 128 * A_BYTES), b = descriptor(shared + 2 * A_BYTES);
    float sum[128] = {};
    for (int step = 0; step < steps; ++step) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" SUMS "}, %128, %129, 1, 1, 1, 0, 0;"
                         : ALL(FLOAT)
                         : "l"(a + 2 * k), "l"(b + 2 * k));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; ++i) {
        all += sum[i];
    }
    out[global_thread()] = all;
}

extern "C" __global__ void __launch_bounds__(256, 1) bench_wgmma_int8(float* __restrict__ out, int steps) {
    extern __shared__ __align__(1024) unsigned char shared[];
    fill(shared, 0xffffffffu, 0);
    const Size a = descriptor(shared + threadIdx.x / 128 * A_BYTES), b = descriptor(shared + 2 * A_BYTES);
    int sum[128] = {};
    for (int step = 0; step < steps; ++step) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            asm volatile("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" SUMS "}, %128, %129, 1;"
                         : ALL(INT)
                         : "l"(a + 2 * k), "l"(b + 2 * k));
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < 128; ++i) {
        all += static_cast<float>(sum[i]);
    }
    out[global_thread()] = all;
}
