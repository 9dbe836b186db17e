// quantize_awq: Wq = clip(rint(W * s / scale_b), -QMAX, QMAX), ties to even.
//
// A true division (no reciprocal) and rintf, so that the codes are NumPy's bit for bit. scale_b has one step per
// group_size input channels of a row, the last group as small as it comes; group_size = in_features is one per row.
#include "common.cuh"

#ifndef QMAX
#error "the largest code must be given: -DQMAX=127"
#endif
static_assert(QMAX >= 1 && QMAX <= 127, "QMAX is 1 to 127: -128 is never used, so that W and -W quantize alike");
constexpr float LARGEST = QMAX;

__device__ __forceinline__ signed char quantize(float w, float s, float step) {
    return static_cast<signed char>(fminf(fmaxf(rintf(w * s / step), -LARGEST), LARGEST));
}

extern "C" __global__ void quantize_awq(const float* __restrict__ w, const float* __restrict__ s,
                                        const float* __restrict__ scale_b, signed char* __restrict__ wq,
                                        Size out_features, Size in_features, Size group_size) {
    const Size groups = group_count(in_features, group_size);
    if (in_features % 4 == 0 && group_size % 4 == 0) {
        // Four codes at a time: 16-byte loads, and one step for all four.
        const Size quads = in_features / 4;
        for (Size i = global_thread(); i < out_features * quads; i += global_threads()) {
            const Size row = i / quads;
            const Size quad = i - row * quads;
            const float4 weight = reinterpret_cast<const float4*>(w)[i];
            const float4 scale = reinterpret_cast<const float4*>(s)[quad];
            const float step = scale_b[row * groups + 4 * quad / group_size];
            reinterpret_cast<char4*>(wq)[i] =
                make_char4(quantize(weight.x, scale.x, step), quantize(weight.y, scale.y, step),
                           quantize(weight.z, scale.z, step), quantize(weight.w, scale.w, step));
        }
    } else {
        for (Size i = global_thread(); i < out_features * in_features; i += global_threads()) {
            const Size row = i / in_features;
            const Size channel = i - row * in_features;
            wq[i] = quantize(w[i], s[channel], scale_b[row * groups + channel / group_size]);
        }
    }
}
