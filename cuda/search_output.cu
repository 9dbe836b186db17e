// The search with objective output: what it needs beside the stages of a layer, which it goes through candidate by
// candidate. The host launches them; no value comes back to it.
#include "search.cuh"

// One block: the scales of one candidate. `work` is scratch of in_features.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    candidate(const float* __restrict__ abs_mean, const float* __restrict__ sq_mean, const double* __restrict__ gamma,
              const double* __restrict__ rule, float* __restrict__ s, float* __restrict__ inv_s,
              double* __restrict__ work, int in_features, int by_mean, int index) {
    make_candidate(abs_mean, sq_mean, gamma[index], rule, s, work, in_features, by_mean != 0);
    for (int k = threadIdx.x; k < in_features; k += THREADS) inv_s[k] = 1.0f / s[k];
}

// Each block leaves a sum of (reference - value)^2; the grid is fixed, so that the order of the sums is always the
// same.
extern "C" __global__ void __launch_bounds__(THREADS) squared_errors(const float* __restrict__ reference,
                                                                  const float* __restrict__ value,
                                                                  double* __restrict__ partial, Size count) {
    double sum = 0.0;
    for (Size i = global_thread(); i < count; i += global_threads()) {
        const double error = static_cast<double>(reference[i]) - value[i];
        sum += error * error;
    }
    sum = over_block(make_double2(sum, 0.0), 0.0, Sum{}).x;
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block: the mean of those sums is the error of a candidate, infinite where it has overflowed.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    mean_error(const double* __restrict__ partial, double* __restrict__ error, Size count, int blocks, int index) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += THREADS) sum += partial[i];
    const double mean = over_block(make_double2(sum, 0.0), 0.0, Sum{}).x / static_cast<double>(count);
    if (threadIdx.x == 0) error[index] = mean < INFINITY ? mean : INFINITY;
}

// One block: the scales of the candidate with the lowest error, made once more.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    choose_output(const float* __restrict__ abs_mean, const float* __restrict__ sq_mean,
                  const double* __restrict__ gamma, const double* __restrict__ rule, const double* __restrict__ error,
                  float* __restrict__ s, float* __restrict__ inv_s, double* __restrict__ work, int in_features,
                  int by_mean, int candidates) {
    const double exponent = gamma[best_of(error, gamma, candidates)];
    make_candidate(abs_mean, sq_mean, exponent, rule, s, work, in_features, by_mean != 0);
    for (int k = threadIdx.x; k < in_features; k += THREADS) inv_s[k] = 1.0f / s[k];
}
