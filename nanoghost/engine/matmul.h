// Matmul with quantized weights: inputs are normalized or gated, rounded, and multiplied tile by tile. quantization.py
// describes the layout of the weights.
//
// N tokens, K inputs, M outputs, G groups of 32 inputs.

#pragma once

#include <algorithm>
#include <cmath>

#include "workspace.h"

namespace {

using namespace lanes;

// ---- inputs: what comes before the matmul ----

// x -> x / rms(x) * weight
void rms_norm(const float* x, const float* weight, float eps, int K, float* y) {
    Floats square = zeros();
    for (int k = 0; k < K; k += LANES) square = fma(load(x + k), load(x + k), square);
    const Floats scale = broadcast(1.0f / std::sqrt(reduce_add(square) / K + eps));
    for (int k = 0; k < K; k += LANES) store(y + k, mul(mul(load(x + k), scale), load(weight + k)));
}

// (gate, up) -> silu(gate) * up
void swiglu(const float* x, int K, float* y) {
    for (int k = 0; k < K; k += LANES) {
        const Floats g = load(x + k), e = exp(min(sub(zeros(), g), broadcast(87.0f)));
        store(y + k, mul(div(g, add(broadcast(1.0f), e)), load(x + K + k)));
    }
}

// To 8-bit integers, with a scale and the sum of the integers for each group.
void quantize(const float* x, int K, int8_t* codes, float* scales, int32_t* sums) {
    for (int g = 0; g < K / GROUP; g++, x += GROUP, codes += GROUP) {
        const Floats a = load(x), b = load(x + LANES);
        const float high = reduce_max(max(abs(a), abs(b)));
        const Floats inverse = broadcast(high > 0 ? 127.0f / high : 0.0f);
        scales[g] = high / 127.0f;
        sums[g] = store_int8(codes, mul(a, inverse)) + store_int8(codes + LANES, mul(b, inverse));
    }
}

void to_bf16(const float* x, int K, int8_t* codes) {
    for (int k = 0; k < K; k += LANES) store_bf16(codes + 2 * k, load(x + k));
}

// ---- R rows of inputs with a tile of weights (16 outputs) ----

// y[r] = the 16 outputs for row r. R and BITS are compile-time constants, so that the sums stay in registers.
template <int BITS, int R>
void multiply_tile(const uint8_t* w, const uint16_t* scales, const uint16_t* mins, const int8_t* x,
                   const float* x_scales, const int32_t* x_sums, int K, Floats* y) {
    const int G = K / GROUP;
    Floats sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[r] = zeros();
    for (int g = 0; g < G; g++, w += 64 * BITS) {
        if constexpr (BITS == 16) {
#pragma GCC unroll 16
            for (int j = 0; j < GROUP / 2; j++) {
                const Bf16Weights v(w + 64 * j);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sum[r] = v.dot(x + 2 * (r * K + g * GROUP) + 4 * j, sum[r]);
            }
        } else {
            const IntegerWeights<BITS> v(w);
            const Floats scale = load_fp16(scales + g * LANES);
            Floats lowest;
            if constexpr (BITS == 4) lowest = load_fp16(mins + g * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const float x_scale = x_scales[r * G + g];
                const int x_sum = x_sums[r * G + g];
                sum[r] = fma(mul(v.dot(x + r * K + g * GROUP, x_sum), broadcast(x_scale)), scale, sum[r]);
                if constexpr (BITS == 4) sum[r] = fma(broadcast(x_sum * x_scale), lowest, sum[r]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) y[r] = sum[r];
}

struct Weights {
    const uint8_t* codes;
    const uint16_t *scales, *mins;
    const float* bias;
    int K, M, bits;
};

// Rows first ... first + R - 1 of the inputs with one tile, into `out` (N, M).
template <int BITS, int R>
void tile_rows(const Weights& w, const Inputs& x, int tile, int first, bool add_to, float* out) {
    const int K = w.K, G = K / GROUP, outputs = std::min(LANES, w.M - tile * LANES);
    const int64_t group = (int64_t)tile * G;
    Floats y[R];
    multiply_tile<BITS, R>(w.codes + group * 64 * BITS, w.scales + group * LANES, w.mins + group * LANES,
                           x.codes.data() + (int64_t)first * K * (BITS == 16 ? 2 : 1), x.scales.data() + first * G,
                           x.sums.data() + first * G, K, y);
    for (int r = 0; r < R; r++) {
        float* target = out + (int64_t)(first + r) * w.M + tile * LANES;
        if (w.bias) y[r] = add(y[r], load(w.bias + tile * LANES, outputs));
        if (add_to) y[r] = add(y[r], load(target, outputs));
        store(target, y[r], outputs);
    }
}

// All rows with one tile: as many rows as possible in each pass over its weights.
template <int BITS>
void tile_outputs(const Weights& w, const Inputs& x, int tile, int N, bool add, float* out) {
    int n = 0;
    for (; n + MAX_ROWS <= N; n += MAX_ROWS) tile_rows<BITS, MAX_ROWS>(w, x, tile, n, add, out);
    if (MAX_ROWS > 8 && n + 8 <= N) {
        tile_rows<BITS, 8>(w, x, tile, n, add, out);
        n += 8;
    }
    if (n + 4 <= N) {
        tile_rows<BITS, 4>(w, x, tile, n, add, out);
        n += 4;
    }
    if (n + 2 <= N) {
        tile_rows<BITS, 2>(w, x, tile, n, add, out);
        n += 2;
    }
    if (n < N) tile_rows<BITS, 1>(w, x, tile, n, add, out);
}

// Row n of x as the weights need it: RMSNorm if there is a norm, SwiGLU if x is twice as wide as K, then rounded.
void prepare_input(const float* x, int width, const Weights& w, const float* norm, float eps, int n, float* buffer,
                   Inputs& in) {
    const int K = w.K, G = K / GROUP;
    const float* row = x + (int64_t)n * width;
    if (norm) {
        rms_norm(row, norm, eps, K, buffer);
        row = buffer;
    } else if (width == 2 * K) {
        swiglu(row, K, buffer);
        row = buffer;
    }
    if (w.bits == 16) {
        to_bf16(row, K, in.codes.data() + (size_t)n * K * 2);
    } else {
        quantize(row, K, in.codes.data() + (size_t)n * K, in.scales.data() + (size_t)n * G,
                 in.sums.data() + (size_t)n * G);
    }
}

// ---- all rows, all tiles ----

// out (N, M) = f(x) W^T + bias, or with `add` out += f(x) W^T + bias; f is in prepare_input.
// Every thread of a parallel region calls this, and it ends with a barrier.
void matmul(const float* x, int width, const Weights& w, const float* norm, float eps, int N, float* out, bool add) {
    const int thread = omp_get_thread_num(), tiles = (w.M + LANES - 1) / LANES;
    float* buffer = workspace.buffers[thread].data();
    Inputs& in = N < MIN_SHARED_ROWS ? workspace.inputs[thread] : workspace.shared_inputs;
    if (N < MIN_SHARED_ROWS) {
        for (int n = 0; n < N; n++) prepare_input(x, width, w, norm, eps, n, buffer, in);
    } else {
#pragma omp for schedule(static)
        for (int n = 0; n < N; n++) prepare_input(x, width, w, norm, eps, n, buffer, in);
    }
#pragma omp for schedule(static)
    for (int tile = 0; tile < tiles; tile++) {
        if (w.bits == 4) tile_outputs<4>(w, in, tile, N, add, out);
        else if (w.bits == 8) tile_outputs<8>(w, in, tile, N, add, out);
        else tile_outputs<16>(w, in, tile, N, add, out);
    }
}

}  // namespace
