// relu: out = max(y + bias, 0); a null bias adds nothing, NaN stays NaN.
#include "common.cuh"
#include "relu.cuh"

extern "C" __global__ void relu(const float* __restrict__ y, const float* __restrict__ bias, float* __restrict__ out,
                                Size tokens, Size out_features) {
    in_turn();
    const Size count = tokens * out_features;
    if (bias == nullptr && count % 4 == 0) {
        for (Size i = global_thread(); i < count / 4; i += global_threads()) {
            const float4 value = reinterpret_cast<const float4*>(y)[i];
            reinterpret_cast<float4*>(out)[i] =
                make_float4(rectified(value.x), rectified(value.y), rectified(value.z), rectified(value.w));
        }
    } else {
        for (Size i = global_thread(); i < count; i += global_threads()) {
            out[i] = rectified(bias == nullptr ? y[i] : y[i] + bias[i % out_features]);
        }
    }
}
