// What a benchmark measures arithmetic by, on registers alone, and what keeps the GPU busy while a launch is on its
// way.
//
// Each warp has eight independent chains, so that no result is waited for. Operands of the matrix units are bits that
// differ from lane to lane: on zeros they run faster, for want of power, than on data.
#include "common.cuh"

constexpr int CHAINS = 8;

// What each chain comes to is 2, whatever it began with: v = v / 2 + 1. The compiler cannot know that `steps` is no
// less than 0, so it cannot foresee the half.
template <typename Number>
__device__ __forceinline__ Number chains(int steps) {
    const Number half = steps < 0 ? 0 : Number(0.5), one = 1;
    Number value[CHAINS];
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) {
        value[i] = static_cast<Number>(threadIdx.x + i);
    }
#pragma unroll 16  // so that hardly an instruction is the loop's own
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) {
            value[i] = value[i] * half + one;
        }
    }
    Number sum = 0;
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) {
        sum += value[i];
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) bench_fp32(float* __restrict__ out, int steps) {
    out[global_thread()] = chains<float>(steps);
}

extern "C" __global__ void __launch_bounds__(256) bench_fp64(float* __restrict__ out, int steps) {
    out[global_thread()] = static_cast<float>(chains<double>(steps));
}

__device__ __forceinline__ unsigned scrambled(unsigned seed) {
    seed ^= seed << 13;
    seed ^= seed >> 17;
    return seed ^ (seed << 5);
}

// Halves from 2^-8 to 2 of either sign: their sums stay finite for many thousand steps.
__device__ __forceinline__ unsigned two_halves(unsigned seed) {
    return (scrambled(seed) & 0x9fff9fffu) | 0x1c001c00u;
}

extern "C" __global__ void __launch_bounds__(256) bench_mma_fp16(float* __restrict__ out, int steps) {
    unsigned a[4], b[2];
    float sum[CHAINS][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = two_halves(threadIdx.x * 2654435761u + i + 1);
        b[i % 2] = two_halves(threadIdx.x * 40503u + 7 * i + 1);
    }
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) {
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) {
        all += sum[i][0] + sum[i][1] + sum[i][2] + sum[i][3];
    }
    out[global_thread()] = all;
}

extern "C" __global__ void __launch_bounds__(256) bench_mma_int8(float* __restrict__ out, int steps) {
    unsigned a[4], b[2];
    int sum[CHAINS][4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i] = scrambled(threadIdx.x * 2654435761u + i + 1);
        b[i % 2] = scrambled(threadIdx.x * 40503u + 7 * i + 1);
    }
#pragma unroll 4
    for (int step = 0; step < steps; ++step) {
#pragma unroll
        for (int i = 0; i < CHAINS; ++i) {
            asm volatile(
                "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+r"(sum[i][0]), "+r"(sum[i][1]), "+r"(sum[i][2]), "+r"(sum[i][3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        }
    }
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; ++i) {
        all += static_cast<float>(sum[i][0]) + static_cast<float>(sum[i][1]) + static_cast<float>(sum[i][2]) +
               static_cast<float>(sum[i][3]);
    }
    out[global_thread()] = all;
}

// Busy for so long, touching no memory: what is launched meanwhile starts without a gap. 0 is an empty kernel.
extern "C" __global__ void bench_spin(Size nanoseconds) {
    if (nanoseconds == 0) {
        return;
    }
    Size begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
