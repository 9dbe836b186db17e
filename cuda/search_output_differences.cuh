// The search with objective output: what the digits of a round's differences are; see search_output.cuh.
#pragma once
#include "search_output_digits.cuh"

// Where groups are whole tiles of channels: the largest |W*s| of every tile, (tiles, chunk, out_features), and in the
// first round, as if the units were one more candidate's scales, what `row_reaches` makes otherwise, (tiles,
// out_features). A warp takes PIECE_ROWS rows of a tile for PIECE_CANDIDATES candidates, whose scales stay in
// registers; a lane has four channels. PIECE_CANDIDATES is a third of the usual 20 candidates and the units.
constexpr int PIECE_ROWS = 8, PIECE_CANDIDATES = 7;

extern "C" __global__ void __launch_bounds__(WARPS * 32) piece_maxima(
    const float* __restrict__ w, const float* __restrict__ candidate_s, const float* __restrict__ unit,
    int* __restrict__ pieces, float* __restrict__ reaches, int out_features, int in_features, int candidates, int chunk,
    int round) {
    in_turn();
    const Round now(round, chunk, candidates);
    const int asked = now.count + (round == 0);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int parts = up(chunk + 1, PIECE_CANDIDATES), depths = up(in_features, DEPTH);
    const int first = blockIdx.x % parts * PIECE_CANDIDATES, depth = blockIdx.x / parts % depths;
    const int row = (static_cast<int>(blockIdx.x / parts / depths) * WARPS + warp) * PIECE_ROWS;
    const int k = depth * DEPTH + lane * 4;
    if (row >= out_features || first >= asked) return;
    Columns<4> weight[PIECE_ROWS], s[PIECE_CANDIDATES];
#pragma unroll
    for (int r = 0; r < PIECE_ROWS; ++r)
        weight[r] = k < in_features ? load<4>(w + static_cast<Size>(min(row + r, out_features - 1)) * in_features + k)
                                    : Columns<4>{};
#pragma unroll
    for (int g = 0; g < PIECE_CANDIDATES; ++g) {
        const float* const from =
            first + g < now.count ? candidate_s + static_cast<Size>(now.first + first + g) * in_features : unit;
        s[g] = k < in_features ? load<4>(from + k) : Columns<4>{};
    }
    static_assert(PIECE_ROWS == 8, "a lane keeps a row of one candidate in four");
#pragma unroll
    for (int begin = 0; begin < PIECE_CANDIDATES; begin += 4) {
        int found = 0;
#pragma unroll
        for (int i = 0; i < 32 && begin + i / 8 < PIECE_CANDIDATES; ++i) {
            const Columns<4>&one = weight[i % 8], &by = s[begin + i / 8];
            const int largest =
                __vimax3_s32(__float_as_int(fabsf(one.v[0]) * by.v[0]), __float_as_int(fabsf(one.v[1]) * by.v[1]),
                             __float_as_int(fabsf(one.v[2]) * by.v[2]));
            const int value = __reduce_max_sync(ALL_LANES, max(largest, __float_as_int(fabsf(one.v[3]) * by.v[3])));
            if (lane == i) found = value;
        }
        const int of_part = begin + lane / 8, candidate = first + of_part, line = row + lane % 8;
        if (line >= out_features || of_part >= PIECE_CANDIDATES) continue;
        if (candidate < now.count)
            pieces[(static_cast<Size>(depth) * chunk + candidate) * out_features + line] = found;
        else if (candidate < asked)
            reaches[static_cast<Size>(depth) * out_features + line] = __int_as_float(found);
    }
}

// The steps where there are pieces. What b = SPAN stands for in every row, and SPAN over it, 0 where float arithmetic
// cannot make the row's digits.
extern "C" __global__ void __launch_bounds__(WARPS * 32) row_bases(
    const float* __restrict__ w, const float* __restrict__ candidate_s, const int* __restrict__ pieces,
    float* __restrict__ steps, const float* __restrict__ tops, const float* __restrict__ reaches,
    double* __restrict__ base, float* __restrict__ over_base, int out_features, int in_features, int group_size,
    int candidates, int chunk, int joined, int round) {
    in_turn();
    const Round now(round, chunk, candidates);
    const int groups = group_count(in_features, group_size), depths = up(in_features, DEPTH);
    const int blocks = up(out_features, WARPS * 32);  // for a candidate
    const int candidate = blockIdx.x / blocks, row = blockIdx.x % blocks * (WARPS * 32) + threadIdx.x;
    if (candidate >= now.count || row >= out_features) return;
    const Size i = static_cast<Size>(candidate) * out_features + row, stride = static_cast<Size>(chunk) * out_features;
    const float* const line = w + static_cast<Size>(row) * in_features;
    const float* const s = candidate_s + static_cast<Size>(now.first + candidate) * in_features;
    tops += 3 * static_cast<Size>(now.first + candidate) * groups;
    double largest = 0.0;
    int plain = 1, finite = 1;
    for (int group = 0; group < groups; ++group) {
        float step, reach;
        if (joined != 0) {
            int found = 0, reached = 0;
            const int begin = group * joined, end = min(begin + joined, depths);
#pragma unroll 8
            for (int piece = begin; piece < end; ++piece) {
                found = max(found, pieces[piece * stride + i]);
                reached = max(reached, __float_as_int(reaches[static_cast<Size>(piece) * out_features + row]));
            }
            steps[group * stride + i] = step = step_of(__int_as_float(found));
            reach = __int_as_float(reached);
        } else {
            step = steps[group * stride + i];
            reach = reaches[static_cast<Size>(group) * out_features + row];
        }
        const float first = tops[3 * group], second = tops[3 * group + 1];
        const int k = __float_as_int(tops[3 * group + 2]);
        // Half a step; steps that are hardly a number are half of the smallest one off, and codes end at QMAX.
        const double half = 0.5 * step + 0.5 * (QMAX + 1) * SMALLEST_FLOAT;
        const bool ordinary = step > 1e-30f && step < 1e30f;
        // Looked up where it matters alone: it is anywhere in the row.
        const double at_first = ordinary && first > 2.0f * second
                                    ? fabsf(fmaf(rintf(__fdividef(line[k] * s[k], step)), step, -(line[k] * s[k])))
                                    : half;
        double found = fmax(half * second, at_first * first);
        // Where dead channels have the largest weights, the others' codes are 0, and d far below half a step.
        if (reach > 1e-30f) found = reach < found ? reach : found;
        largest = fmax(largest, found);
        plain &= ordinary;
        finite &= step <= LARGEST_FLOAT && first <= LARGEST_FLOAT && found < INFINITY;
    }
    if (largest == 0.0) largest = 1.0;
    base[i] = finite ? largest : INFINITY;
    over_base[i] = plain && finite && largest > 1e-25 && largest < 1e30 ? SPAN / static_cast<float>(largest) : 0.0f;
}

constexpr int AT_ONCE = 4;  // candidates of a warp

// What a row's weights are split by: a difference beyond `edge` lies so near the middle between two codes that a
// product with 1 / step could miss the code of a division, by 127 * 2^-24 for each rounding. All do where float
// arithmetic cannot make the row's digits.
struct alignas(16) Scaling {
    float step, inverse, edge, over;
};

__device__ __forceinline__ Scaling scaling(float step, float over) {
    return {step, 1.0f / step, over != 0.0f ? 0.49998f * step : -1.0f, over};
}

// b of one weight by a division, biased; in double where it must be.
static __device__ __noinline__ int exact_number(float w, float s, float factor, float step, float over, double base) {
    const float scaled = w * s;
    if (over != 0.0f) return biased(fmaf(rintf(scaled / step), step, -scaled) * over * factor);
    const double number = exact_difference(w, s, step) * factor / base * SPAN;
    return biased(fabs(number) < INFINITY ? fminf(fmaxf(static_cast<float>(rint(number)), -SPAN), SPAN) : 0.0f);
}

// The digits of D for a round's candidates. A block has a tile of rows and channels for AT_ONCE candidates, whose
// scales and factors stay in registers while the rows stream by; a lane has four channels. Its groups: ONE for the
// tile, one for FOUR channels, or any.
enum class Groups { ONE, FOUR, ANY };

template <Groups GROUPS>
struct Splitter {
    static constexpr int STEPS = GROUPS == Groups::ANY ? 4 : 1;  // of a lane
    const float *w, *candidate_s, *factors, *steps;
    const double* base;
    const float* over_base;
    signed char* digits;
    int out_features, in_features, group_size, chunk, row_tiles;
    Round now;
    int first, row_tile, depth;

    __device__ __forceinline__ int channel() const { return depth * DEPTH + threadIdx.x % 32 * 4; }
    __device__ __forceinline__ Columns<4> channels(const float* row) const {
        if constexpr (GROUPS == Groups::ANY) return four(row, channel(), in_features, true);
        return channel() < in_features ? load<4>(row + channel()) : Columns<4>{};
    }
    __device__ __forceinline__ const float* of_candidate(const float* array, int g) const {
        return array + static_cast<Size>(now.first + min(first + g, now.count - 1)) * in_features;
    }
    // Of a candidate's row; those beyond the end are taken as the last.
    __device__ __forceinline__ Size place(int line, int g) const {
        return static_cast<Size>(min(first + g, now.count - 1)) * out_features +
               min(row_tile * ROWS + line, out_features - 1);
    }
    __device__ __forceinline__ float step(Size place, int k) const {
        return steps[static_cast<Size>(min(k, in_features - 1) / group_size) * chunk * out_features + place];
    }
    __device__ __forceinline__ signed char* tile(int g) const {
        const Size depths = up(in_features, DEPTH);
        return digits + ((static_cast<Size>(first + g) * row_tiles + row_tile) * depths + depth) * ROW_BYTES;
    }

    __device__ __forceinline__ void split() const {
        __shared__ Scaling scalings[ROWS][AT_ONCE];
        constexpr int OF_WARP = ROWS / WARPS, AHEAD = 2;
        const int lane = threadIdx.x % 32, first_line = threadIdx.x / 32 * OF_WARP;
        if constexpr (GROUPS == Groups::ONE) {
            for (int i = threadIdx.x; i < ROWS * AT_ONCE; i += WARPS * 32) {
                const Size at = place(i / AT_ONCE, i % AT_ONCE);
                scalings[i / AT_ONCE][i % AT_ONCE] = scaling(step(at, depth * DEPTH), over_base[at]);
            }
            __syncthreads();
        }
        Columns<4> s[AT_ONCE], factor[AT_ONCE];
        signed char* tiles[AT_ONCE];
#pragma unroll
        for (int g = 0; g < AT_ONCE; ++g) {
            s[g] = channels(of_candidate(candidate_s, g)), factor[g] = channels(of_candidate(factors, g));
            tiles[g] = tile(g);
        }
        unsigned doubtful[AT_ONCE] = {};  // a bit for each row
        const auto weights = [&](int line) {
            const int row = row_tile * ROWS + line;
            return row < out_features ? channels(w + static_cast<Size>(row) * in_features) : Columns<4>{};
        };
        Columns<4> next[AHEAD];  // on their way while others are split; behind the last one it is loaded again
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) next[i] = weights(first_line + i);
#pragma unroll 2
        for (int i = 0; i < OF_WARP; ++i) {
            const int line = first_line + i;
            const Columns<4> weight = next[0];
#pragma unroll
            for (int j = 0; j + 1 < AHEAD; ++j) next[j] = next[j + 1];
            next[AHEAD - 1] = weights(first_line + min(i + AHEAD, OF_WARP - 1));
#pragma unroll
            for (int g = 0; g < AT_ONCE; ++g) {
                int bits[4];
                bool doubt = false;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const Scaling by = GROUPS == Groups::ONE ? scalings[line][g]
                                                             : scaling(step(place(line, g), channel() + j % STEPS),
                                                                       over_base[place(line, g)]);
                    const float scaled = weight.v[j] * s[g].v[j];
                    const float code = __fadd_rn(fmaf(scaled, by.inverse, MAGIC), -MAGIC);
                    const float difference = fmaf(code, by.step, -scaled);
                    doubt |= !(fabsf(difference) <= by.edge);
                    bits[j] = __float_as_int(fmaf(difference * by.over, factor[g].v[j], MAGIC + BIAS));
                }
                doubtful[g] |= static_cast<unsigned>(doubt) << i;
                if (first + g < now.count) Digits(bits).store(tiles[g], ROWS, line, lane * 4);
            }
        }
#pragma unroll
        for (int g = 0; g < AT_ONCE; ++g) {
            for (; doubtful[g] != 0; doubtful[g] &= doubtful[g] - 1) {
                const int line = first_line + __popc((doubtful[g] & -doubtful[g]) - 1);
                const Size at = place(line, g);
                const Columns<4> weight = channels(w + at % out_features * in_features);
                const bool there = row_tile * ROWS + line < out_features;
                int bits[4];
                for (int j = 0; j < 4; ++j)
                    bits[j] = exact_number(there ? weight.v[j] : 0.0f, s[g].v[j], factor[g].v[j],
                                           step(at, channel() + j), over_base[at], base[at]);
                if (first + g < now.count) Digits(bits).store(tiles[g], ROWS, line, lane * 4);
            }
        }
    }
};

// Blocks: candidates fastest, so that those that read the same weights share the cache; then channels.
extern "C" __global__ void __launch_bounds__(WARPS * 32) split_differences(
    const float* __restrict__ w, const float* __restrict__ candidate_s, const float* __restrict__ factor,
    const float* __restrict__ steps, const double* __restrict__ base, const float* __restrict__ over_base,
    signed char* __restrict__ d_digits, int out_features, int in_features, int group_size, int candidates, int chunk,
    int row_tiles, int round) {
    in_turn();
    const Round now(round, chunk, candidates);
    const int parts = up(chunk, AT_ONCE), depths = up(in_features, DEPTH);
    const int first = blockIdx.x % parts * AT_ONCE, tile = blockIdx.x / parts;
    if (first >= now.count) return;
    const auto split = [&](auto splitter) { splitter.split(); };
    if (in_features % 4 == 0 && (group_size % DEPTH == 0 || group_size >= in_features))
        split(Splitter<Groups::ONE>{w, candidate_s, factor, steps, base, over_base, d_digits, out_features, in_features,
                                    group_size, chunk, row_tiles, now, first, tile / depths, tile % depths});
    else if (in_features % 4 == 0 && group_size % 4 == 0)
        split(Splitter<Groups::FOUR>{w, candidate_s, factor, steps, base, over_base, d_digits, out_features,
                                     in_features, group_size, chunk, row_tiles, now, first, tile / depths,
                                     tile % depths});
    else
        split(Splitter<Groups::ANY>{w, candidate_s, factor, steps, base, over_base, d_digits, out_features, in_features,
                                    group_size, chunk, row_tiles, now, first, tile / depths, tile % depths});
}
