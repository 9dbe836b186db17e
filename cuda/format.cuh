// What a weight may become, as quant/format.py has it: the step and the zero point of a group from the range of its
// weights, the code of a weight, and what a code stands for.
//
// In float, operation by operation as NumPy does them, so that steps, zero points and codes are the same bits. What a
// format is made of comes in as numbers, not as macros: one compilation serves them all.
#pragma once
#include "common.cuh"

constexpr int ROUND_FIRST = 1, SHIFT_FIRST = 2, FLOAT_ZEROS = 3;  // kinds of zero points; 0 is none
constexpr int TO_FLOAT = 1, TO_POWER = 2, TO_POWER_OR_NEXT = 3;   // how steps are rounded; 0 is not at all
constexpr float LEAST_NORMAL = 1.175494351e-38f;

// The ends of a group's scaled weights.
struct Range {
    float low = INFINITY, high = -INFINITY;

    __device__ __forceinline__ void take(float scaled) {
        low = fminf(low, scaled);
        high = fmaxf(high, scaled);
    }
    __device__ __forceinline__ float magnitude() const { return fmaxf(high, -low); }
};

struct Group {
    float step, zero;  // 0 where there are no zero points
};

// 2^exponent, from -149 to 127.
__device__ __forceinline__ float two_to(int exponent) {
    return __int_as_float(exponent < -126 ? 1 << (exponent + 149) : (exponent + 127) << 23);
}

// The members are what `numbers` in quant/for_kernels.py lists, in its order.
struct Form {
    float least, largest, middle, divisor;
    bool e2m1;
    int zeros;
    bool include_zero;
    int rounding, mantissa, least_exponent;
    float most, under;  // the largest number that a step may be, and what becomes of one that underflows
    bool one_of_nothing;
    float least_range, least_step, top;  // what the largest step of a matrix times 6 is scaled to, where there is that

    __device__ __forceinline__ explicit Form(const float* __restrict__ numbers)
        : least(numbers[0]),
          largest(numbers[1]),
          middle(numbers[2]),
          divisor(numbers[3]),
          e2m1(numbers[4] != 0.0f),
          zeros(static_cast<int>(numbers[5])),
          include_zero(numbers[6] != 0.0f),
          rounding(static_cast<int>(numbers[7])),
          mantissa(static_cast<int>(numbers[8])),
          least_exponent(static_cast<int>(numbers[9])),
          most(numbers[10]),
          under(numbers[11]),
          one_of_nothing(numbers[12] != 0.0f),
          least_range(numbers[13]),
          least_step(numbers[14]),
          top(numbers[15]) {}

    // What steps are multiplied by before they are rounded, by the largest magnitude of all scaled weights.
    __device__ __forceinline__ float tensor_scale(float peak) const {
        const float scale = top / fmaxf(peak, LEAST_NORMAL);
        return scale > 0.0f && scale < INFINITY ? scale : 1.0f;
    }

    __device__ __forceinline__ Group fit(Range range, float of_tensor) const {
        if (zeros == 0) return {step(range.magnitude(), of_tensor), 0.0f};
        const float low = include_zero ? fminf(range.low, 0.0f) : range.low;
        const float high = include_zero ? fmaxf(range.high, 0.0f) : range.high;
        const float found = step(high - low, of_tensor);
        if (zeros == FLOAT_ZEROS) {
            const float zero = __fadd_rn(low, __fmul_rn(found, middle));
            return {found, zero < 0.0f ? -rounded(-zero) : rounded(zero)};
        }
        if (zeros == SHIFT_FIRST) return {found, rintf(fminf(fmaxf(least - low / found, least), largest))};
        return {found, fminf(fmaxf(-rintf(low / found), 0.0f), largest - least) + least};
    }

    __device__ __forceinline__ float code(float scaled, Group of) const {
        if (zeros == FLOAT_ZEROS) scaled -= __fadd_rn(of.zero, -__fmul_rn(of.step, middle));
        float level = scaled / of.step;
        if (e2m1) {
            const float magnitude = fabsf(level);
            const float quantum = magnitude < 4.0f ? 1.0f : magnitude < 8.0f ? 2.0f : 4.0f;
            const float inverse = magnitude < 4.0f ? 1.0f : magnitude < 8.0f ? 0.5f : 0.25f;
            level = rintf(level * inverse) * quantum;
        } else if (zeros == SHIFT_FIRST) {
            level = rintf(level + of.zero);
        } else {
            level = rintf(level) + (zeros == FLOAT_ZEROS ? least : of.zero);
        }
        return fminf(fmaxf(level, least), largest);
    }

    // Exact but for its last rounding.
    __device__ __forceinline__ double value(float code, Group of) const {
        const double step = of.step;
        return zeros == FLOAT_ZEROS ? fma(static_cast<double>(code), step, static_cast<double>(of.zero))
                                    : (code - of.zero) * step;
    }

private:
    __device__ __forceinline__ float step(float range, float of_tensor) const {
        const bool nothing = range == 0.0f;
        range = fmaxf(range, least_range);
        float found;
        if (rounding >= TO_POWER) {
            found = power(range);
        } else {
            found = range / divisor;
            if (top > 0.0f) found *= of_tensor;
            found = rounded(found);
        }
        if (found == 0.0f) found = under;
        if (nothing && one_of_nothing) found = 1.0f;
        found = fmaxf(found, least_step);
        if (top > 0.0f) found /= of_tensor;
        return e2m1 ? found / 2.0f : found;
    }

    // A number from 0 on as the nearest of the steps' type, ties to even.
    __device__ __forceinline__ float rounded(float value) const {
        if (rounding != TO_FLOAT) return value;
        value = fminf(value, most);
        const int exponent = max((__float_as_int(value) >> 23) - 127, least_exponent);
        const float quantum = two_to(exponent - mantissa);
        return fminf(rintf(value / quantum) * quantum, most);
    }

    // A power of two that brings the largest magnitude to 4 and above, or to under 8 by the next.
    __device__ __forceinline__ float power(float peak) const {
        const int bits = __float_as_int(peak), fraction = bits & 0x7FFFFF;
        const int exponent = (bits >> 23) - 129 + (rounding == TO_POWER_OR_NEXT && fraction >= 0x600000);
        return fminf(two_to(max(exponent, least_exponent)), most);
    }
};

// The same for every lane: all of a warp's ranges as one.
__device__ __forceinline__ Range over_lanes(Range range) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        range.low = fminf(range.low, __shfl_xor_sync(~0u, range.low, offset));
        range.high = fmaxf(range.high, __shfl_xor_sync(~0u, range.high, offset));
    }
    return range;
}

// The same where the largest magnitude alone counts.
__device__ __forceinline__ Range magnitude_over_lanes(Range range) {
    // Bits of floats that are not negative order alike; those of a lane without any are.
    const int largest = __reduce_max_sync(~0u, max(__float_as_int(range.magnitude()), 0));
    Range all;
    all.take(__int_as_float(largest));
    return all;
}

// The group of the channels from `begin` to `end` of a row under these scales, for every lane of the warp.
__device__ __forceinline__ Group fit_by_warp(const Form& form, const float* line, const float* s, int begin, int end,
                                             float of_tensor) {
    Range range;
    for (int k = begin + static_cast<int>(threadIdx.x) % 32; k < end; k += 32) range.take(line[k] * s[k]);
    return form.fit(over_lanes(range), of_tensor);
}
