// The part of cuRAND's device API that kernels use: Philox4x32-10 and its uniform numbers.
//
// From Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11) and the documented layout: the
// key is the seed, the low half of the counter the offset / 4, its high half the subsequence.
#pragma once

struct curandStatePhilox4_32_10_t {
    unsigned counter[4];
    unsigned key[2];
};

inline void curand_init(unsigned long long seed, unsigned long long subsequence, unsigned long long offset,
                        curandStatePhilox4_32_10_t* state) {
    if (offset % 4 != 0)
        host_cuda::fail({"curand_init", "curand_kernel.h", __LINE__}, "takes offsets that are multiples of 4 only");
    const unsigned long long block = offset / 4;
    *state = {{static_cast<unsigned>(block), static_cast<unsigned>(block >> 32), static_cast<unsigned>(subsequence),
               static_cast<unsigned>(subsequence >> 32)},
              {static_cast<unsigned>(seed), static_cast<unsigned>(seed >> 32)}};
}

inline uint4 curand4(curandStatePhilox4_32_10_t* state) {
    unsigned word[4];
    memcpy(word, state->counter, sizeof word);
    unsigned key[2] = {state->key[0], state->key[1]};
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = uint64_t{0xD2511F53} * word[0], second = uint64_t{0xCD9E8D57} * word[2];
        word[0] = static_cast<unsigned>(second >> 32) ^ word[1] ^ key[0];
        word[1] = static_cast<unsigned>(second);
        word[2] = static_cast<unsigned>(first >> 32) ^ word[3] ^ key[1];
        word[3] = static_cast<unsigned>(first);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
    for (unsigned& part : state->counter)
        if (++part != 0) break;
    return {word[0], word[1], word[2], word[3]};
}

// In (0, 1]: the middle of each of the 2^32 steps, rounded.
inline float4 curand_uniform4(curandStatePhilox4_32_10_t* state) {
    const uint4 word = curand4(state);
    const auto uniform = [](unsigned bits) { return static_cast<float>(bits) * 0x1p-32f + 0x1p-33f; };
    return {uniform(word.x), uniform(word.y), uniform(word.z), uniform(word.w)};
}
