// What the shim gives to kernels and no kernel of cuda/ takes yet, held to NumPy by tests/test_host_cuda.py.
#include <curand_kernel.h>

static_assert(sizeof(float4) == 16 && alignof(float4) == 16 && sizeof(double4) == 32 && alignof(double4) == 16);
static_assert(sizeof(float3) == 12 && alignof(float3) == 4 && sizeof(char4) == 4 && alignof(char4) == 4);
static_assert(sizeof(short2) == 4 && alignof(short2) == 4 && sizeof(double2) == 16 && alignof(double2) == 16);

// Every exchange of a warp's lanes, one after another: result k of thread i is out[k * threads + i].
extern "C" __global__ void lanes(const int* __restrict__ in, int* __restrict__ out) {
    const unsigned all = ~0u;
    const int lane = threadIdx.x % warpSize;
    const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
    const int value = in[threadIdx.x];
    const int results[] = {
        __shfl_sync(all, value, 5),
        __shfl_sync(all, value, lane + 3, 8),
        __shfl_up_sync(all, value, 3),
        __shfl_down_sync(all, value, 3, 16),
        __shfl_xor_sync(all, value, 7),
        __reduce_add_sync(all, value),
        __reduce_max_sync(all, value),
        __reduce_min_sync(all, value),
        static_cast<int>(__ballot_sync(all, value > 0)),
        __any_sync(all, value > 9),
        __all_sync(all, value > -9),
        __reduce_add_sync(half, value),
    };
    int at = threadIdx.x;
    for (const int result : results) {
        out[at] = result;
        at += blockDim.x;
    }
}

// A warp that is not full, some of whose lanes have ended: the rest is reduced.
extern "C" __global__ void partial_warp(const int* __restrict__ in, int* __restrict__ out) {
    if (threadIdx.x % 2 == 0) return;
    out[threadIdx.x] = __reduce_add_sync(~0u, in[threadIdx.x]);
}

// The sum of the warp, by a tree in a template's shared memory that needs no barrier of the whole block.
template <int THREADS>
__device__ __forceinline__ float sum_of_warp(float value) {
    __shared__ float sums[THREADS];
    sums[threadIdx.x] = value;
    __syncwarp();
    for (int half = warpSize / 2; half > 0; half /= 2) {
        if (threadIdx.x % warpSize < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncwarp();
    }
    return sums[threadIdx.x];
}

extern "C" __global__ void warp_tree(const float* __restrict__ in, float* __restrict__ out) {
    const float sum = sum_of_warp<64>(in[threadIdx.x]);
    if (threadIdx.x % warpSize == 0) out[threadIdx.x / warpSize] = sum;
}

// Each block's part of `in`, backwards.
extern "C" __global__ void reverse(const double* __restrict__ in, double* __restrict__ out) {
    extern __shared__ __align__(16) double part[];
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    part[threadIdx.x] = in[i];
    __syncthreads();
    out[i] = part[blockDim.x - 1 - threadIdx.x];
}

// What all threads of all blocks do to the same words.
extern "C" __global__ void count(const int* __restrict__ in, int* __restrict__ histogram, int* __restrict__ extremes) {
    const int value = in[blockIdx.x * blockDim.x + threadIdx.x];
    atomicAdd(&histogram[value], 1);
    atomicMax(&extremes[0], value);
    atomicMin(&extremes[1], value);
    atomicCAS(&extremes[2], 0, 1);
    atomicExch(&extremes[3], 7);
}

// The sum of all blocks' parts, by the block that comes last; `came` is 0 before.
extern "C" __global__ void last_block(const int* __restrict__ in, int* parts, int* came, int* __restrict__ out) {
    __shared__ bool last;
    if (threadIdx.x < 2) parts[2 * blockIdx.x + threadIdx.x] = in[2 * blockIdx.x + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(came, 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last || threadIdx.x != 0) return;
    int sum = 0;
    for (int i = 0; i < 2 * gridDim.x; ++i) sum += parts[i];
    *out = sum;
}

extern "C" __global__ void arithmetic(const float* __restrict__ in, int* __restrict__ rounded,
                                      float* __restrict__ out) {
    const unsigned i = threadIdx.x;
    const float value = __ldg(in + i);
    rounded[i] = __float2int_rn(value);
    out[4 * i] = __fmaf_rn(value, value, -1.0f);
    out[4 * i + 1] = __fadd_rn(__fmul_rn(value, value), -1.0f);
    out[4 * i + 2] = __fdiv_rn(1.0f, value);
    out[4 * i + 3] = __int_as_float(max(__float_as_int(value), min(__popc(0xF0), 3)));
}

extern "C" __global__ void bytes(const int* __restrict__ in, int* __restrict__ out) {
    const int low = in[2 * threadIdx.x], high = in[2 * threadIdx.x + 1];
    out[2 * threadIdx.x] = __byte_perm(low, high, 0x5410);
    out[2 * threadIdx.x + 1] = __byte_perm(low, high, 0x7362);
}

// Eight numbers in a row from one state: the counter goes on.
extern "C" __global__ void random_numbers(float* __restrict__ out, unsigned long long seed,
                                          unsigned long long subsequence, unsigned long long offset) {
    curandStatePhilox4_32_10_t state;
    curand_init(seed, subsequence, offset, &state);
    for (int i = 0; i < 2; ++i) {
        const float4 u = curand_uniform4(&state);
        out[4 * i] = u.x;
        out[4 * i + 1] = u.y;
        out[4 * i + 2] = u.z;
        out[4 * i + 3] = u.w;
    }
}
