// What all searches with objective output share: their rounds, and which candidate is best.
#pragma once
#include "search.cuh"

// A round takes `chunk` candidates, or what is left of them: the steps and digits of so many fit the scratch.
struct Round {
    int first, count;
    __device__ __forceinline__ Round(int round, int chunk, int candidates)
        : first(round * chunk), count(min(chunk, candidates - round * chunk)) {}
};

// One block: the error of each candidate from its `blocks` partial sums; then the scales of the best.
extern "C" __global__ void __launch_bounds__(THREADS) choose(const double* __restrict__ partial,
                                                          const int* __restrict__ rank,
                                                          const float* __restrict__ candidate_s,
                                                          double* __restrict__ error, float* __restrict__ s,
                                                          float* __restrict__ inv_s, int candidates, int in_features,
                                                          int blocks) {
    in_turn();
    choose_best<THREADS, 32>(partial, rank, candidate_s, error, s, inv_s, candidates, in_features, blocks);
}
