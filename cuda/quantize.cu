// quantize_awq: Wq = clip(rint(W * s / scale_b), -QMAX, QMAX), ties to even.
//
// The codes are NumPy's bit for bit: those of a true division and rintf. The division is left out where it cannot
// matter: q = rint(W*s * (1/step)) is the code unless W*s lies so near the middle of two that the rounding of the
// quotient decides, which the distance |W*s - q*step| tells, however rough the reciprocal; then it is made, for all
// four codes of a thread. Codes are rounded by adding MAGIC, and stay on top of it: the lowest byte of the sum is the
// code. A block takes a row at a time, so that no index needs a division, and asks for AHEAD times four weights a
// thread before it needs the first. scale_b has one step per group_size input channels of a row, the last group as
// small as it comes; group_size = in_features is one per row.
#include "common.cuh"

#if !defined(QMAX) || !defined(THREADS) || !defined(AHEAD) || !defined(BLOCKS)
#error "the largest code and the threads of a block must be given: -DQMAX=127 -DTHREADS=256 -DAHEAD=4 -DBLOCKS=4"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "THREADS is a multiple of 32, at most 1,024: whole warps");
static_assert(AHEAD >= 1, "a thread has AHEAD loads of four weights on their way");
static_assert(BLOCKS * THREADS <= 2048, "a multiprocessor takes BLOCKS blocks at a time");
constexpr float LARGEST = QMAX;
// A quotient up to 127 is rounded by less than 4e-6: what is this far from the middle of two codes rounds to the same.
constexpr float CLEAR = 0.49998f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
constexpr int HOP = 4 * THREADS;      // channels of a block's loads

__device__ __forceinline__ float exact_sum(float scaled, float step) {
    return __fadd_rn(rintf(scaled / step), MAGIC);
}

__device__ __forceinline__ bool decides(float scaled, float step, float sum) {
    return !(fabsf(fmaf(-__fadd_rn(sum, -MAGIC), step, scaled)) < CLEAR * step);
}

__device__ __forceinline__ signed char code_of(float sum) {
    return static_cast<signed char>(__float_as_int(fminf(fmaxf(sum, MAGIC - LARGEST), MAGIC + LARGEST)));
}

__device__ __forceinline__ char4 quantize(float4 w, float4 s, float step) {
    const float scaled[4] = {w.x * s.x, w.y * s.y, w.z * s.z, w.w * s.w};
    const float inverse = __fdividef(1.0f, step);
    float sum[4];
    bool division = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[i] = fmaf(scaled[i], inverse, MAGIC);
        division |= decides(scaled[i], step, sum[i]);
    }
    if (division) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] = exact_sum(scaled[i], step);
    }
    return make_char4(code_of(sum[0]), code_of(sum[1]), code_of(sum[2]), code_of(sum[3]));
}

// Which group a channel is in: a division, but where a hop is whole groups, or all of a row is one.
struct Groups {
    int size, mine, of_hop;
    bool divides;

    __device__ __forceinline__ Groups(int groups, int group_size)
        : size(group_size),
          mine(groups == 1 ? 0 : 4 * threadIdx.x / group_size),
          of_hop(groups == 1 ? 0 : HOP / group_size),
          divides(groups > 1 && HOP % group_size != 0) {}

    __device__ __forceinline__ int of(int k, int hops) const { return divides ? k / size : mine + hops * of_hop; }
};

// Four codes at a time: 16-byte loads, and one step for all four.
__device__ __forceinline__ void quantize_row(const float* w, const float* s, const float* steps, signed char* wq,
                                             int in_features, const Groups& groups) {
#pragma unroll 1
    for (int k = 4 * threadIdx.x, hops = 0; k < in_features; k += AHEAD * HOP, hops += AHEAD) {
        float4 weight[AHEAD], scale[AHEAD];
        float step[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (k + HOP * i < in_features) weight[i] = *reinterpret_cast<const float4*>(w + k + HOP * i);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (k + HOP * i < in_features) {
                scale[i] = *reinterpret_cast<const float4*>(s + k + HOP * i);
                step[i] = steps[groups.of(k + HOP * i, hops + i)];
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (k + HOP * i < in_features)
                *reinterpret_cast<char4*>(wq + k + HOP * i) = quantize(weight[i], scale[i], step[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    quantize_awq(const float* __restrict__ w, const float* __restrict__ s, const float* __restrict__ scale_b,
                 signed char* __restrict__ wq, int out_features, int in_features, int group_size) {
    in_turn();
    const int count = group_count(in_features, group_size);
    const Groups groups(count, group_size);
    for (int row = blockIdx.x; row < out_features; row += gridDim.x) {
        const Size first = static_cast<Size>(row) * in_features;
        const float* const steps = scale_b + static_cast<Size>(row) * count;
        if (in_features % 4 == 0 && group_size % 4 == 0) {
            quantize_row(w + first, s, steps, wq + first, in_features, groups);
        } else {
            for (int k = threadIdx.x; k < in_features; k += THREADS)
                wq[first + k] = code_of(exact_sum(w[first + k] * s[k], steps[k / group_size]));
        }
    }
}
