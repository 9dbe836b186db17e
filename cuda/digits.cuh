// Activations as digits, codes as tiles: what the products on tensor cores share.
//
// A row of x * inv_s becomes whole numbers v of 24 bits in a unit that is a power of two, v = 65536 d0 + 256 d1 + d2
// with digits from -128 to 127, and the product is that of three int8 matrices with the codes as they are:
//     y = step * unit * (65536 S0 + 256 S1 + S2),   S = sum of digit * code, exact in int32.
// All that is lost but the last roundings to fp32 is the rounding to v, half a unit: 6e-8 to 1.2e-7 of the row's
// largest element at most. Where the row's largest element is so much larger than the rest that it would show (see
// `allowed`), a fourth digit takes up what the rounding left. Tiles that hold such a row are multiplied by it, too; it
// counts in such rows alone, so that what becomes of a row does not depend on its neighbours.
//
// Digits and codes are written as they are copied (tiles.cuh). Of the digits a tile has two halves of tokens, in each
// one digit after the other.
#pragma once

#include "relu.cuh"
#include "tiles.cuh"

#if !defined(SPLITTERS) || !defined(KEPT)
#error "the table of kernels gives the macros: -DSPLITTERS=128 -DKEPT=4 ..."
#endif
static_assert(SPLITTERS % 32 == 0 && KEPT >= 1, "SPLITTERS threads split a row, four elements each at a time");

constexpr int CODE_BYTES = ROWS * DEPTH;
constexpr int LARGEST = (127 * 256 + 127) * 256 + 127;  // of v
constexpr float LOW = 128.0f;                           // units of the fourth digit in one of v

__device__ constexpr int digit_bytes(int tile_tokens) {
    return 3 * tile_tokens * DEPTH;
}

struct Digits {
    int digit[4];
};

// A power of two from 2^-126 to 2^149 in two factors, since that of denormal rows is no float.
struct Power {
    float first, second;
};

__device__ __forceinline__ Digits split(float value, Power scale) {
    const float exact = value * scale.first * scale.second;
    int v = __float2int_rn(exact);
    Digits out;
    out.digit[3] = __float2int_rn((exact - static_cast<float>(v)) * LOW);
    out.digit[2] = (v + 128 & 255) - 128;
    v = (v - out.digit[2]) >> 8;
    out.digit[1] = (v + 128 & 255) - 128;
    out.digit[0] = (v - out.digit[1]) >> 8;
    return out;
}

// Four elements of x * inv_s; 0 beyond the end.
__device__ __forceinline__ float4 scaled(const float* __restrict__ row, const float* __restrict__ inv_s, int k,
                                         int in_features) {
    if (in_features % 4 == 0) {
        if (k >= in_features) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float4 value = *reinterpret_cast<const float4*>(row + k);
        const float4 inverse = *reinterpret_cast<const float4*>(inv_s + k);
        return make_float4(value.x * inverse.x, value.y * inverse.y, value.z * inverse.z, value.w * inverse.w);
    }
    float out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = k + i < in_features ? row[k + i] * inv_s[k + i] : 0.0f;
    return make_float4(out[0], out[1], out[2], out[3]);
}

__device__ __forceinline__ float power_of_two(int exponent) {
    return __int_as_float((exponent + 127) << 23);
}

// The power of two at or below a row's first step. Sums are multiplied by steps over it, then by the activations' unit,
// and last by it: so neither steps of 1e34 nor of 1e-38 take what lies between beyond float's range.
__device__ __forceinline__ float base_of(float step) {
    return __int_as_float(min(max(__float_as_int(step) & 0x7F800000, 1 << 23), 253 << 23));
}
__device__ __forceinline__ float over_base(float step, float first) {
    return step * __int_as_float((254 << 23) - __float_as_int(base_of(first)));
}

struct Extent {
    int largest;  // bits of the largest magnitude: their order is that of the numbers, NaN above all
    float squares;

    __device__ __forceinline__ void take(float value) {
        largest = max(largest, __float_as_int(value) & 0x7FFFFFFF);
        squares = fmaf(value, value, squares);
    }
    __device__ __forceinline__ void take(float4 v) {
        take(v.x);
        take(v.y);
        take(v.z);
        take(v.w);
    }
};

__device__ __forceinline__ void split_row(const float* __restrict__ x, const float* __restrict__ inv_s,
                                          signed char* __restrict__ digits, signed char* __restrict__ low,
                                          float* __restrict__ unit, float* __restrict__ low_unit, int token, int tokens,
                                          int in_features, int tile_tokens) {
    __shared__ Extent extents[SPLITTERS / 32];
    const int depths = up(in_features, DEPTH);
    const int stride = 4 * SPLITTERS;
    // Rows that only pad a tile read no memory and become zeros.
    const int inside = token < tokens ? in_features : 0;
    const float* const row = x + static_cast<Size>(token < tokens ? token : 0) * in_features;
    const int first = 4 * threadIdx.x;
    const auto load = [&](int k) {
        return k < inside ? scaled(row, inv_s, k, in_features) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    };

    float4 kept[KEPT];
    Extent extent = {0, 0.0f};
#pragma unroll
    for (int i = 0; i < KEPT; ++i) kept[i] = load(first + i * stride);
#pragma unroll
    for (int i = 0; i < KEPT; ++i) extent.take(kept[i]);
#pragma unroll 4
    for (int k = first + KEPT * stride; k < inside; k += stride) extent.take(load(k));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        extent.largest = max(extent.largest, __shfl_xor_sync(~0u, extent.largest, lanes));
        extent.squares += __shfl_xor_sync(~0u, extent.squares, lanes);
    }
    if (threadIdx.x % 32 == 0) extents[threadIdx.x / 32] = extent;
    __syncthreads();
    extent = extents[0];
#pragma unroll
    for (int i = 1; i < SPLITTERS / 32; ++i) {
        extent.largest = max(extent.largest, extents[i].largest);
        extent.squares += extents[i].squares;
    }

    // The largest element takes 23 bits and a sign, where its leading ones allow: half of LARGEST at least. A row that
    // holds an infinity or NaN becomes NaN all over.
    const bool finite = extent.largest < 0x7F800000;
    // Biased by 127; of a denormal number as if it were normal.
    const int exponent = extent.largest >= 1 << 23
                             ? extent.largest >> 23
                             : (__float_as_int(__int_as_float(extent.largest) * 16777216.0f) >> 23) - 24;
    int shift = min(22 + 127 - exponent, 149);  // 2^-149 is the smallest unit that is a float
    Power scale = {power_of_two(min(shift, 126)), power_of_two(max(shift - 126, 0))};
    if (__int_as_float(extent.largest) * scale.first * scale.second > LARGEST) {
        --shift;
        scale = {power_of_two(min(shift, 126)), power_of_two(max(shift - 126, 0))};
    }
    const float one =
        finite ? power_of_two(-min(shift, 126)) * power_of_two(-max(shift - 126, 0)) : __int_as_float(0x7FC00000);
    // How much larger than the root of the mean square the largest element may be, squared: rounding costs 0.29 of a
    // unit then about as much as fp32 sums of so many terms lose.
    const float allowed = fminf(fmaxf(in_features / 4.0f, 25.0f), 256.0f);
    const float largest = one * LARGEST;
    const bool wide = finite && largest * largest * in_features > allowed * extent.squares;
    // All so far comes from what the kernel before, which makes the codes, does not write.
    in_turn();
    if (threadIdx.x == 0) {
        unit[token] = one;
        low_unit[token] = wide ? one / LOW : 0.0f;
    }
    const int line = token % tile_tokens, half = tile_tokens / 2;
    const Size first_stage = static_cast<Size>(token / tile_tokens) * depths;
    digits += first_stage * digit_bytes(tile_tokens) + (line / half * 3 * half + line % half) * DEPTH;
    low += (first_stage * tile_tokens + line) * DEPTH;
    const auto store = [&](int k, float4 value) {
        const Digits d[4] = {split(value.x, scale), split(value.y, scale), split(value.z, scale),
                             split(value.w, scale)};
        const int place = swizzled(line, k % DEPTH);
        const Size rows = static_cast<Size>(k / DEPTH) * tile_tokens * DEPTH;  // of the stages before
#pragma unroll
        for (int i = 0; i < 3; ++i)
            *reinterpret_cast<char4*>(digits + 3 * rows + i * half * DEPTH + place) =
                make_char4(d[0].digit[i], d[1].digit[i], d[2].digit[i], d[3].digit[i]);
        *reinterpret_cast<char4*>(low + rows + place) =
            make_char4(d[0].digit[3], d[1].digit[3], d[2].digit[3], d[3].digit[3]);
    };
    const int padded = depths * DEPTH;
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
        if (first + i * stride < padded) store(first + i * stride, kept[i]);
#pragma unroll 2
    for (int k = first + KEPT * stride; k < padded; k += stride) store(k, load(k));
}

// Rows beyond the weights, up to a multiple of `padding`, become zeros.
__device__ __forceinline__ void place_codes(const signed char* __restrict__ wq, signed char* __restrict__ codes,
                                            Size block, int out_features, int in_features, int padding) {
    in_turn();
    const int depths = up(in_features, DEPTH);
    const int pieces = depths * (DEPTH / PIECE);  // of a row
    const Size all = static_cast<Size>(up(out_features, padding)) * padding * pieces;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        const Size piece = (block * KEPT + i) * SPLITTERS + threadIdx.x;
        if (piece >= all) break;
        const int row = piece / pieces, k = piece % pieces * PIECE;
        const signed char* const from = wq + static_cast<Size>(row) * in_features + k;
        int4 found = make_int4(0, 0, 0, 0);
        if (row < out_features && k < in_features) {
            if (in_features % PIECE == 0) {
                found = *reinterpret_cast<const int4*>(from);
            } else {
                alignas(16) signed char bytes[PIECE];
#pragma unroll
                for (int j = 0; j < PIECE; ++j) bytes[j] = k + j < in_features ? from[j] : 0;
                found = *reinterpret_cast<const int4*>(bytes);
            }
        }
        const int line = row % ROWS;
        const Size stage = static_cast<Size>(row / ROWS) * depths + k / DEPTH;
        *reinterpret_cast<int4*>(codes + stage * CODE_BYTES + line * DEPTH + swizzled(line, k % DEPTH)) = found;
    }
}

// A block for each row of the digits, then blocks for the codes.
__device__ __forceinline__ void split_operands(const float* __restrict__ x, const signed char* __restrict__ wq,
                                               const float* __restrict__ inv_s, signed char* __restrict__ digits,
                                               signed char* __restrict__ low, signed char* __restrict__ codes,
                                               float* __restrict__ unit, float* __restrict__ low_unit, int tokens,
                                               int out_features, int in_features, int tile_tokens, int padding) {
    const unsigned rows = up(tokens, tile_tokens) * tile_tokens;
    if (blockIdx.x < rows)
        split_row(x, inv_s, digits, low, unit, low_unit, blockIdx.x, tokens, in_features, tile_tokens);
    else
        place_codes(wq, codes, blockIdx.x - rows, out_features, in_features, padding);
}

struct Sizes {
    int tokens, out_features, in_features, group_size;

    __device__ __forceinline__ int groups() const { return group_count(in_features, group_size); }
};

struct Operands {
    const signed char *digits, *low, *codes;
    const float *unit, *low_unit, *scale_b;
    float* y;
    Ending ending;

    // The steps of a row; of one that only pads a tile those of the last.
    __device__ __forceinline__ const float* steps_of(const Sizes& sizes, int row) const {
        return scale_b + static_cast<Size>(min(row, sizes.out_features - 1)) * sizes.groups();
    }
    // One of them, or the last one, over the row's base, which comes in at the end.
    __device__ __forceinline__ float step_of(const Sizes& sizes, int row, int group) const {
        const float* const steps = steps_of(sizes, row);
        return over_base(steps[min(group, sizes.groups() - 1)], steps[0]);
    }
};

#ifndef __CUDACC__

// What the tensor cores compute, in plain words: for where there are none.
template <int TILE_TOKENS>
__device__ void multiply_plainly(const Operands& of, const Sizes& sizes) {
    const int depths = up(sizes.in_features, DEPTH), half_tokens = TILE_TOKENS / 2;
    const Size outputs = static_cast<Size>(sizes.tokens) * sizes.out_features;
    const int groups = sizes.groups();
    for (Size i = global_thread(); i < outputs; i += global_threads()) {
        const int token = i / sizes.out_features, row = i % sizes.out_features;
        const int line = token % TILE_TOKENS, half = line / half_tokens;
        const signed char* const digits =
            of.digits + static_cast<Size>(token / TILE_TOKENS) * depths * digit_bytes(TILE_TOKENS);
        const signed char* const low = of.low + static_cast<Size>(token / TILE_TOKENS) * depths * TILE_TOKENS * DEPTH;
        const signed char* const codes = of.codes + static_cast<Size>(row / ROWS) * depths * CODE_BYTES;
        float total = 0.0f, low_total = 0.0f;
        for (int group = 0; group < groups; ++group) {
            int sums[4] = {};
            for (int j = 0; j < sizes.group_size && group * sizes.group_size + j < sizes.in_features; ++j) {
                const int k = group * sizes.group_size + j;
                const int code = codes[k / DEPTH * CODE_BYTES + row % ROWS * DEPTH + swizzled(row % ROWS, k % DEPTH)];
                const int place = swizzled(line, k % DEPTH);
                for (int d = 0; d < 3; ++d)
                    sums[d] += code * digits[k / DEPTH * digit_bytes(TILE_TOKENS) +
                                             ((3 * half + d) * half_tokens + line % half_tokens) * DEPTH + place];
                if (of.low_unit[token] != 0.0f) sums[3] += code * low[(k / DEPTH * TILE_TOKENS + line) * DEPTH + place];
            }
            const float step = of.step_of(sizes, row, group);
            total = fmaf(step, combined(sums[0], sums[1], sums[2]), total);
            low_total = fmaf(step, static_cast<float>(sums[3]), low_total);
        }
        const float base = base_of(*of.steps_of(sizes, row));
        const float result = total * of.unit[token] * base + low_total * of.low_unit[token] * base;
        of.y[i] = of.ending.apply(result, of.ending.bias_of(row));
    }
}

#endif
