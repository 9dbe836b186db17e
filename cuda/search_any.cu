// The search with objective diag for any sizes and every format: rows of any length, groups of any size.
//
// A warp takes one row's group at a time: it reads the weights twice, first for the range of every candidate of its
// chunk, then for the errors of their codes, which it adds up in double. Plain, and the
// yardstick of search_rows.cu and search_groups.cu, which are several times as fast where sizes and format allow.
#include "search.cuh"
#include "search_formats.cuh"

#if !defined(CHUNK) || !defined(WARPS)
#error "candidates and warps of a block must be given: -DCHUNK=8 -DWARPS=8"
#endif
static_assert(CHUNK >= 1 && WARPS >= 1 && WARPS <= 32, "a block has WARPS warps, at most 32, for CHUNK candidates");

// Symmetric integers with float steps: the largest magnitude tells the step, and rounding alone the code.
struct Plain {
    float largest;
    using Ends = float;
    using Fitted = float;

    __device__ __forceinline__ explicit Plain(const Form& form) : largest(form.largest) {}
    __device__ __forceinline__ void take(float& magnitude, float scaled) const {
        magnitude = fmaxf(magnitude, fabsf(scaled));
    }
    __device__ __forceinline__ float fit(float magnitude, float) const {
        const int of_warp = __reduce_max_sync(ALL_LANES, __float_as_int(magnitude));
        return step_for(__int_as_float(of_warp), largest);
    }
    __device__ __forceinline__ double error(float scaled, float step) const { return exact_error(scaled, step); }
};

struct Any {
    Form form;
    using Ends = Range;
    using Fitted = Group;

    __device__ __forceinline__ explicit Any(const Form& form) : form(form) {}
    __device__ __forceinline__ void take(Range& range, float scaled) const { range.take(scaled); }
    __device__ __forceinline__ Group fit(Range range, float of_tensor) const {
        return form.fit(form.zeros == 0 ? magnitude_over_lanes(range) : over_lanes(range), of_tensor);
    }
    __device__ __forceinline__ double error(float scaled, Group of) const {
        const double difference = form.value(form.code(scaled, of), of) - scaled;
        return difference * difference;
    }
};

struct Operands {
    const float *w, *candidate_s, *tensor_scales;  // the last is null where steps are not scaled together
    const double* importance;
    const int* rank;  // of candidates
    double *partial, *error;
    float *s, *inv_s;
    int out_features, in_features, group_size, candidates;
};

// Blocks: chunks of candidates fastest, so that those that read the same weights share the cache.
template <typename Kind>
static __device__ __forceinline__ void search(const Kind& kind, const Operands& of) {
    __shared__ double sums[WARPS][CHUNK];
    const int in_features = of.in_features, group_size = of.group_size;
    const int chunks = up(of.candidates, CHUNK);
    const int first = blockIdx.x % chunks * CHUNK, count = of.candidates - first;
    const int block = blockIdx.x / chunks, blocks = gridDim.x / chunks;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Size groups = group_count(in_features, group_size), before = static_cast<Size>(first) * in_features;
    const float* const __restrict__ scales = of.candidate_s + before;
    const double* const __restrict__ importance = of.importance + before;

    double errors[CHUNK] = {};
    for (Size segment = static_cast<Size>(block) * WARPS + warp; segment < of.out_features * groups;
         segment += static_cast<Size>(blocks) * WARPS) {
        const Size row = segment / groups;
        const int begin = static_cast<int>(segment - row * groups) * group_size;
        const int end = group_size < in_features - begin ? begin + group_size : in_features;
        const float* const __restrict__ line = of.w + row * in_features;
        typename Kind::Ends ends[CHUNK] = {};
        for (int k = begin + lane; k < end; k += 32) {
            const float weight = line[k];
#pragma unroll
            for (int g = 0; g < CHUNK; ++g)
                if (g < count) kind.take(ends[g], weight * scales[static_cast<Size>(g) * in_features + k]);
        }
        typename Kind::Fitted fitted[CHUNK];
#pragma unroll
        for (int g = 0; g < CHUNK; ++g) {
            const bool scaled = of.tensor_scales != nullptr && g < count;
            fitted[g] = kind.fit(ends[g], scaled ? of.tensor_scales[first + g] : 1.0f);
        }
        for (int k = begin + lane; k < end; k += 32) {
            const float weight = line[k];
#pragma unroll
            for (int g = 0; g < CHUNK; ++g) {
                if (g >= count) continue;
                const Size at = static_cast<Size>(g) * in_features + k;
                errors[g] += importance[at] * kind.error(__fmul_rn(weight, scales[at]), fitted[g]);
            }
        }
    }
#pragma unroll
    for (int g = 0; g < CHUNK; ++g) {
        const double sum = over_warp(errors[g], Sum{});
        if (lane == 0) sums[warp][g] = sum;
    }
    __syncthreads();
    if (threadIdx.x < CHUNK && static_cast<int>(threadIdx.x) < count) {
        double sum = 0.0;
        for (int other = 0; other < WARPS; ++other) sum += sums[other][threadIdx.x];
        of.partial[static_cast<Size>(first + threadIdx.x) * blocks + block] = sum;
    }
    if (last_to_come(&blocks_done, gridDim.x))
        choose_best<WARPS * 32, 8>(of.partial, of.rank, of.candidate_s, of.error, of.s, of.inv_s, of.candidates,
                                   in_features, blocks);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    diag_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
                const double* __restrict__ importance, const int* __restrict__ rank, const float* __restrict__ form,
                double* partial, double* error, float* __restrict__ s, float* __restrict__ inv_s, int out_features,
                int in_features, int group_size, int candidates) {
    in_turn();
    search(Plain(Form(form)), {w, candidate_s, nullptr, importance, rank, partial, error, s, inv_s, out_features,
                               in_features, group_size, candidates});
}

// The same for formats that are not plain.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    format_errors(const float* __restrict__ w, const float* __restrict__ candidate_s,
                  const double* __restrict__ importance, const int* __restrict__ rank, const float* __restrict__ form,
                  const float* __restrict__ tensor_scales, double* partial, double* error, float* __restrict__ s,
                  float* __restrict__ inv_s, int out_features, int in_features, int group_size, int candidates) {
    in_turn();
    const Any kind{Form(form)};
    search(kind, {w, candidate_s, kind.form.top > 0.0f ? tensor_scales : nullptr, importance, rank, partial, error, s,
                  inv_s, out_features, in_features, group_size, candidates});
}
