// Memory of the operators that is allocated once and used by all calls: rounded inputs, and buffers of the threads.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace {

using namespace lanes;

// Inputs of a matmul, rounded: in 8 bits with a scale for each group, or in bf16. N tokens, K inputs, G groups.
struct Inputs {
    std::vector<int8_t> codes;  // N x K; as bf16, twice that
    std::vector<float> scales;  // N x G
    std::vector<int32_t> sums;  // N x G, of the codes
};

constexpr int MIN_SHARED_ROWS = 4;  // with fewer rows each thread prepares all inputs itself: faster than a barrier

// What all threads share, and what each thread has for itself.
struct Workspace {
    Inputs shared_inputs;
    std::vector<Inputs> inputs;                       // by thread
    std::vector<std::vector<float>> buffers, scores;  // by thread

    // Room for matmuls of N tokens with K inputs, and for attention to a sequence of `tokens` tokens.
    void reserve(int N, int K, int tokens) {
        const size_t threads = omp_get_max_threads();
        if (inputs.size() < threads) {
            inputs.resize(threads);
            buffers.resize(threads);
            scores.resize(threads);
        }
        for (size_t t = 0; t < threads; t++) {
            reserve(inputs[t], std::min(N, MIN_SHARED_ROWS), K);
            if (buffers[t].size() < (size_t)K) buffers[t].resize(K);
            if (scores[t].size() < (size_t)3 * tokens) scores[t].resize(3 * tokens);
        }
        reserve(shared_inputs, N, K);
    }
    static void reserve(Inputs& in, size_t N, size_t K) {
        if (in.codes.size() < N * K * 2) in.codes.resize(N * K * 2);
        const size_t groups = N * K / GROUP;
        if (in.scales.size() < groups) {
            in.scales.resize(groups);
            in.sums.resize(groups);
        }
    }
};
Workspace workspace;  // one is enough: the engine makes one call at a time

}  // namespace
