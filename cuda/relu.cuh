// max(value + bias, 0), by the kernel of that name or on the way out of a product: the same bits either way.
#pragma once

__device__ __forceinline__ float rectified(float value) {
    return value < 0.0f ? 0.0f : value;  // NaN stays NaN
}

// What becomes of a product's outputs before they are written.
struct Ending {
    const float* bias;  // a null one adds nothing
    bool relu;

    __device__ __forceinline__ float bias_of(int channel) const {
        return bias == nullptr ? -0.0f : bias[channel];  // added to -0, too, -0 changes nothing
    }

    // The sum is rounded on its own, as where the product had been written before.
    __device__ __forceinline__ float apply(float value, float bias_of_channel) const {
        value = __fadd_rn(value, bias_of_channel);
        return relu ? rectified(value) : value;
    }
};
