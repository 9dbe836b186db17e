// quantize_awq: Wq = clip(rint(W * s / scale_b), -QMAX, QMAX), ties to even.
//
// The codes are NumPy's bit for bit: those of a true division and rintf. The division is left out where it cannot
// matter: q = rint(W*s * (1/step)) is the code unless W*s lies so near the middle of two that the rounding of the
// quotient decides, which the distance |W*s - q*step| tells; then, and for steps whose reciprocal overflows, it is
// made. A block takes a row at a time, so that no index needs a division. scale_b has one step per group_size input
// channels of a row, the last group as small as it comes; group_size = in_features is one per row.
#include "common.cuh"

#ifndef QMAX
#error "the largest code must be given: -DQMAX=127"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");
constexpr float LARGEST = QMAX;
// A quotient up to 127 is rounded by less than 4e-6, and 1/step is nearer than that: what is this far from the middle
// of two codes rounds to the same one.
constexpr float CLEAR = 0.49998f;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even

__device__ __forceinline__ signed char quantize(float w, float s, float step, float inverse) {
    const float scaled = w * s;
    float code = __fadd_rn(fmaf(scaled, inverse, MAGIC), -MAGIC);
    if (!(fabsf(fmaf(-code, step, scaled)) < CLEAR * step)) code = rintf(scaled / step);
    return static_cast<signed char>(fminf(fmaxf(code, -LARGEST), LARGEST));
}

extern "C" __global__ void quantize_awq(const float* __restrict__ w, const float* __restrict__ s,
                                        const float* __restrict__ scale_b, signed char* __restrict__ wq,
                                        int out_features, int in_features, int group_size) {
    const int groups = group_count(in_features, group_size);
    for (int row = blockIdx.x; row < out_features; row += gridDim.x) {
        const Size first = static_cast<Size>(row) * in_features;
        const float* const steps = scale_b + static_cast<Size>(row) * groups;
        if (in_features % 4 == 0 && group_size % 4 == 0) {
            // Four codes at a time: 16-byte loads, and one step for all four.
#pragma unroll 4
            for (int k = 4 * threadIdx.x; k < in_features; k += 4 * blockDim.x) {
                const float4 weight = *reinterpret_cast<const float4*>(w + first + k);
                const float4 scale = *reinterpret_cast<const float4*>(s + k);
                const float step = steps[groups == 1 ? 0 : k / group_size];
                const float inverse = 1.0f / step;
                *reinterpret_cast<char4*>(wq + first + k) =
                    make_char4(quantize(weight.x, scale.x, step, inverse), quantize(weight.y, scale.y, step, inverse),
                               quantize(weight.z, scale.z, step, inverse), quantize(weight.w, scale.w, step, inverse));
            }
        } else {
            for (int k = threadIdx.x; k < in_features; k += blockDim.x) {
                const float step = steps[k / group_size];
                wq[first + k] = quantize(w[first + k], s[k], step, 1.0f / step);
            }
        }
    }
}
