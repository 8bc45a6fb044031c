// Three operators that let a Llama speak as fast as the memory delivers its weights: a product with packed weights,
// attention over pages of keys and values, and all layers made of the two. For x86 with AVX-512 or AVX2 (lanes.h). packed.py
// tells the layouts, and tests/test_engine.py holds both to the same in plain PyTorch.
//
// N tokens, K inputs, M outputs, G groups of 32 inputs, H heads, D width of a head.
//
// What a token gets does not depend on which others are computed beside it, to the last bit: every output is summed
// in one order, however many rows share a pass over the weights.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

using namespace lanes;
using at::Tensor;

// ---- inputs: normed or gated, then in 8 bits with a scale for each group ----

struct Inputs {
    std::vector<int8_t> codes;    // N x K; as bf16, twice that
    std::vector<float> scales;    // N x G
    std::vector<int32_t> totals;  // N x G, of the codes
};

// x -> x / rms(x) * weight
void rms_norm(const float* x, const float* weight, float eps, int K, float* y) {
    Floats square = zeros();
    for (int k = 0; k < K; k += LANES) square = fma(load(x + k), load(x + k), square);
    const Floats scale = all(1.0f / std::sqrt(sum(square) / K + eps));
    for (int k = 0; k < K; k += LANES) store(y + k, mul(mul(load(x + k), scale), load(weight + k)));
}

// (gate, up) -> silu(gate) * up
void gate(const float* x, int K, float* y) {
    for (int k = 0; k < K; k += LANES) {
        const Floats g = load(x + k), e = exp(least(sub(zeros(), g), all(87.0f)));
        store(y + k, mul(div(g, add(all(1.0f), e)), load(x + K + k)));
    }
}

void quantise(const float* x, int K, int8_t* codes, float* scales, int32_t* totals) {
    for (int g = 0; g < K / GROUP; g++, x += GROUP, codes += GROUP) {
        const Floats a = load(x), b = load(x + LANES);
        const float high = largest(most(abs(a), abs(b)));
        const Floats inverse = all(high > 0 ? 127.0f / high : 0.0f);
        scales[g] = high / 127.0f;
        totals[g] = store_bytes(codes, mul(a, inverse)) + store_bytes(codes + LANES, mul(b, inverse));
    }
}

void to_bf16(const float* x, int K, int8_t* codes) {
    for (int k = 0; k < K; k += LANES) store_bf16(codes + 2 * k, load(x + k));
}

// ---- products: R rows of inputs with 16 rows of weights ----

template <int BITS, int R>
void tile(const uint8_t* w, const uint16_t* scales, const uint16_t* lows, const int8_t* x, const float* x_scales,
          const int32_t* x_totals, int K, Floats* y) {
    const int G = K / GROUP;
    Floats sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[r] = zeros();
    for (int g = 0; g < G; g++, w += 64 * BITS) {
        if constexpr (BITS == 16) {
#pragma GCC unroll 16
            for (int j = 0; j < GROUP / 2; j++) {
                const Pairs v(w + 64 * j);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) sum[r] = v.dot(x + 2 * (r * K + g * GROUP) + 4 * j, sum[r]);
            }
        } else {
            const Codes<BITS> v(w);
            const Floats scale = load_half(scales + g * LANES);
            Floats lowest;
            if constexpr (BITS == 4) lowest = load_half(lows + g * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const float x_scale = x_scales[r * G + g];
                const int total = x_totals[r * G + g];
                sum[r] = fma(mul(v.dot(x + r * K + g * GROUP, total), all(x_scale)), scale, sum[r]);
                if constexpr (BITS == 4) sum[r] = fma(all(total * x_scale), lowest, sum[r]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) y[r] = sum[r];
}

struct Weights {
    const uint8_t* codes;
    const uint16_t *scales, *lows;
    const float* bias;
    int K, M, bits;
};

template <int BITS, int R>
void rows(const Weights& w, const Inputs& x, int block, int first, bool add_to, float* out) {
    const int K = w.K, G = K / GROUP, here = std::min(LANES, w.M - block * LANES);
    const int64_t at = (int64_t)block * G;
    Floats y[R];
    tile<BITS, R>(w.codes + at * 64 * BITS, w.scales + at * LANES, w.lows + at * LANES,
                  x.codes.data() + (int64_t)first * K * (BITS == 16 ? 2 : 1), x.scales.data() + first * G,
                  x.totals.data() + first * G, K, y);
    for (int r = 0; r < R; r++) {
        float* to = out + (int64_t)(first + r) * w.M + block * LANES;
        if (w.bias) y[r] = add(y[r], load(w.bias + block * LANES, here));
        if (add_to) y[r] = add(y[r], load(to, here));
        store(to, y[r], here);
    }
}

template <int BITS>
void block_of_outputs(const Weights& w, const Inputs& x, int block, int N, bool add, float* out) {
    int n = 0;
    for (; n + ROWS <= N; n += ROWS) rows<BITS, ROWS>(w, x, block, n, add, out);
    if (ROWS > 8 && n + 8 <= N) rows<BITS, 8>(w, x, block, n, add, out), n += 8;
    if (n + 4 <= N) rows<BITS, 4>(w, x, block, n, add, out), n += 4;
    if (n + 2 <= N) rows<BITS, 2>(w, x, block, n, add, out), n += 2;
    if (n < N) rows<BITS, 1>(w, x, block, n, add, out);
}

// The rows of x, normed if there is a norm, else gated if x is twice as wide as W, in the form that W multiplies.
void prepare(const float* x, int width, const Weights& w, const float* norm, float eps, int n, float* wide, Inputs& in) {
    const int K = w.K, G = K / GROUP;
    const float* row = x + (int64_t)n * width;
    if (norm) rms_norm(row, norm, eps, K, wide), row = wide;
    else if (width == 2 * K) gate(row, K, wide), row = wide;
    if (w.bits == 16) to_bf16(row, K, in.codes.data() + (size_t)n * K * 2);
    else quantise(row, K, in.codes.data() + (size_t)n * K, in.scales.data() + (size_t)n * G, in.totals.data() + (size_t)n * G);
}

constexpr int FEW = 4;  // rows below which each thread prepares them all for itself, rather than wait for the others

// What the threads of a call share, and what each has of its own.
struct Workspace {
    Inputs shared;
    std::vector<Inputs> own;
    std::vector<std::vector<float>> wide, scores;

    void fit(int N, int K, int tokens) {  // the most inputs of a product, the most tokens of a sequence
        const size_t threads = omp_get_max_threads();
        if (own.size() < threads) own.resize(threads), wide.resize(threads), scores.resize(threads);
        for (size_t t = 0; t < threads; t++) {
            fit(own[t], std::min(N, FEW), K);
            if (wide[t].size() < (size_t)K) wide[t].resize(K);
            if (scores[t].size() < (size_t)3 * tokens) scores[t].resize(3 * tokens);
        }
        fit(shared, N, K);
    }
    static void fit(Inputs& in, size_t N, size_t K) {
        if (in.codes.size() < N * K * 2) in.codes.resize(N * K * 2);
        const size_t groups = N * K / GROUP;
        if (in.scales.size() < groups) in.scales.resize(groups), in.totals.resize(groups);
    }
};
Workspace work;  // one call at a time

// out (N, M) = f(x) W^T + bias, or += that. Every thread of a parallel region calls this; all leave it together.
void multiply(const float* x, int width, const Weights& w, const float* norm, float eps, int N, float* out, bool add) {
    const int thread = omp_get_thread_num(), blocks = (w.M + LANES - 1) / LANES;
    float* wide = work.wide[thread].data();
    Inputs& in = N < FEW ? work.own[thread] : work.shared;
    if (N < FEW) for (int n = 0; n < N; n++) prepare(x, width, w, norm, eps, n, wide, in);
    else {
#pragma omp for schedule(static)
        for (int n = 0; n < N; n++) prepare(x, width, w, norm, eps, n, wide, in);
    }
#pragma omp for schedule(static)
    for (int b = 0; b < blocks; b++) {
        if (w.bits == 4) block_of_outputs<4>(w, in, b, N, add, out);
        else if (w.bits == 8) block_of_outputs<8>(w, in, b, N, add, out);
        else block_of_outputs<16>(w, in, b, N, add, out);
    }
}

const float* floats(const Tensor& t) { return t.defined() && t.numel() ? t.const_data_ptr<float>() : nullptr; }

Weights weights(const Tensor& codes, const Tensor& scales, const Tensor& lows, const Tensor& bias, int bits, int M) {
    return {codes.const_data_ptr<uint8_t>(), (const uint16_t*)scales.const_data_ptr(), (const uint16_t*)lows.const_data_ptr(),
            floats(bias), (int)codes.size(1) * GROUP, M, bits};
}

// One product alone; an empty tensor stands for no bias or no norm.
void linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& lows, int64_t bits, const Tensor& bias,
            const Tensor& norm, double eps, Tensor out, bool add) {
    const Weights w = weights(codes, scales, lows, bias, bits, out.size(1));
    work.fit(x.size(0), w.K, 0);
    const float *from = x.const_data_ptr<float>(), *norm_weight = floats(norm);
    float* to = out.mutable_data_ptr<float>();
#pragma omp parallel
    multiply(from, x.size(1), w, norm_weight, eps, x.size(0), to, add);
}

// ---- attention over pages: keys as D x 16 tokens, values as 16 tokens x D, both fp16 ----

// Q heads that share their keys and values; sees positions first ... last of the sequence whose pages are listed.
template <int D, int Q>
void attend_heads(const float* q, const uint16_t* cache, int64_t page_size, const int* pages, int first, int last,
                  float scale, float* scores, float* out) {
    const int from = first / LANES, to = last / LANES, S = (to - from + 1) * LANES;
    Floats top[Q];
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++) top[h] = all(-INFINITY);
    for (int p = from; p <= to; p++) {
        const uint16_t* keys = cache + pages[p] * page_size;
        const int begin = p == from ? first % LANES : 0, end = p == to ? last % LANES : LANES - 1;
        Floats s[Q], odd[Q];  // two sums each: an addition waits four cycles for the one before
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) s[h] = odd[h] = zeros();
#pragma GCC unroll 4
        for (int d = 0; d < D; d += 2) {
            const Floats k = load_half(keys + d * LANES), l = load_half(keys + (d + 1) * LANES);
#pragma GCC unroll 8
            for (int h = 0; h < Q; h++) {
                s[h] = fma(all(q[h * D + d]), k, s[h]);
                odd[h] = fma(all(q[h * D + d + 1]), l, odd[h]);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) {
            s[h] = mul(add(s[h], odd[h]), all(scale));
            if (begin > 0 || end < LANES - 1) s[h] = within(s[h], begin, end);  // what lies behind was never written
            store(scores + h * S + (p - from) * LANES, s[h]);
            top[h] = most(top[h], s[h]);
        }
    }
    Floats y[Q][D / LANES];
    float total[Q];
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++) {
        const Floats highest = all(largest(top[h]));
        Floats added = zeros();
        for (int i = 0; i < S; i += LANES) {
            const Floats s = load(scores + h * S + i), e = where_finite(s, exp(sub(s, highest)));
            store(scores + h * S + i, e);
            added = add(added, e);
        }
        total[h] = sum(added);
#pragma GCC unroll 8
        for (int d = 0; d < D / LANES; d++) y[h][d] = zeros();
    }
    for (int p = from; p <= to; p++) {
        const uint16_t* values = cache + pages[p] * page_size + D * LANES;
        const int begin = p == from ? first % LANES : 0, end = p == to ? last % LANES + 1 : LANES;
        for (int t = begin; t < end; t++) {
#pragma GCC unroll 8
            for (int d = 0; d < D / LANES; d++) {
                const Floats v = load_half(values + t * D + d * LANES);
#pragma GCC unroll 8
                for (int h = 0; h < Q; h++) y[h][d] = fma(all(scores[h * S + (p - from) * LANES + t]), v, y[h][d]);
            }
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++)
#pragma GCC unroll 8
        for (int d = 0; d < D / LANES; d++) store(out + h * D + d * LANES, mul(y[h][d], all(1.0f / total[h])));
}

template <int D>
void attend_group(const float* q, int heads, const uint16_t* cache, int64_t page_size, const int* pages, int first,
                  int last, float scale, float* scores, float* out) {
    int h = 0;
    for (; h + 3 <= heads; h += 3) attend_heads<D, 3>(q + h * D, cache, page_size, pages, first, last, scale, scores, out + h * D);
    if (heads - h == 2) attend_heads<D, 2>(q + h * D, cache, page_size, pages, first, last, scale, scores, out + h * D);
    if (heads - h == 1) attend_heads<D, 1>(q + h * D, cache, page_size, pages, first, last, scale, scores, out + h * D);
}

// Pairs (i, i + D / 2) turned by the angle of the position.
void rotate(float* x, const float* cos, const float* sin, int D) {
    for (int i = 0; i < D / 2; i++) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

// What attention needs beside the tokens' queries, keys and values.
struct Attention {
    const float *cos, *sin;           // (context, D / 2), null where heads are not rotated
    const float *q_norm, *k_norm;     // (D), or null
    uint16_t* pages;                  // (pages, J, 2, 16 D) fp16
    const int *table, *row, *at;      // (sequences, most pages); whose token each of the N is, and where it stands
    int64_t page_size;
    int H, J, D, most_pages, window;
    float scale, eps;
};

// qkv (N, (H + 2 J) D), changed in place, to out (N, H D); the tokens' keys and values are written into the pages.
// Every thread of a parallel region calls this; all leave it together.
void attend_all(float* qkv, const Attention& a, int N, float* out) {
    const int H = a.H, J = a.J, D = a.D, width = (H + 2 * J) * D, together = H / J;
    auto remember = [&](int n) {
        float* q = qkv + (int64_t)n * width;
        for (int h = 0; h < H + J; h++) {
            const float* norm = h < H ? a.q_norm : a.k_norm;
            if (norm) rms_norm(q + h * D, norm, a.eps, D, q + h * D);
            if (a.cos) rotate(q + h * D, a.cos + (int64_t)a.at[n] * (D / 2), a.sin + (int64_t)a.at[n] * (D / 2), D);
        }
        uint16_t* page = a.pages + a.table[a.row[n] * a.most_pages + a.at[n] / LANES] * a.page_size;
        const int lane = a.at[n] % LANES;
        for (int j = 0; j < J; j++, page += 2 * LANES * D) {
            const float *k = q + (H + j) * D, *v = q + (H + J + j) * D;
            for (int d = 0; d < D; d++) page[d * LANES + lane] = _cvtss_sh(k[d], 0);
            for (int d = 0; d < D; d += LANES) store_half(page + D * LANES + lane * D + d, load(v + d));
        }
    };
#pragma omp for schedule(static)
    for (int n = 0; n < N; n++) remember(n);
    float* own = work.scores[omp_get_thread_num()].data();
    const int chunk = std::clamp(N * J / (8 * omp_get_num_threads()), 1, 4);
#pragma omp for schedule(dynamic, chunk)
    for (int i = 0; i < N * J; i++) {
        const int n = i / J, j = i % J, first = a.window ? std::max(0, a.at[n] - a.window + 1) : 0;
        const float* q = qkv + (int64_t)n * width + j * together * D;
        auto run = D == 64 ? attend_group<64> : attend_group<128>;
        run(q, together, a.pages + (int64_t)j * 2 * LANES * D, a.page_size, a.table + a.row[n] * a.most_pages, first, a.at[n],
            a.scale, own, out + ((int64_t)n * H + j * together) * D);
    }
}

Attention attention(int heads, const Tensor& cos, const Tensor& sin, const Tensor& q_norm, const Tensor& k_norm, Tensor cache,
                    const Tensor& table, const Tensor& rows, const Tensor& positions, double scale, int64_t window, double eps) {
    return {floats(cos), floats(sin), floats(q_norm), floats(k_norm), (uint16_t*)cache.mutable_data_ptr(),
            table.const_data_ptr<int>(), rows.const_data_ptr<int>(), positions.const_data_ptr<int>(), cache.stride(0),
            heads, (int)cache.size(1), (int)cache.size(3) / LANES, (int)table.size(1), (int)window, (float)scale, (float)eps};
}

// Attention alone; an empty tensor stands for heads that are not rotated, or not normed.
Tensor attend(Tensor qkv, const Tensor& cos, const Tensor& sin, Tensor cache, const Tensor& table, const Tensor& rows,
              const Tensor& positions, double scale, int64_t window, const Tensor& q_norm, const Tensor& k_norm, double eps) {
    const int N = qkv.size(0), J = cache.size(1), D = cache.size(3) / LANES, H = qkv.size(1) / D - 2 * J;
    const Attention a = attention(H, cos, sin, q_norm, k_norm, cache, table, rows, positions, scale, window, eps);
    Tensor out = at::empty({N, H * D}, qkv.options());
    work.fit(1, GROUP, a.most_pages * LANES);
    float *from = qkv.mutable_data_ptr<float>(), *to = out.mutable_data_ptr<float>();
#pragma omp parallel
    attend_all(from, a, N, to);
    return out;
}

// x (N, width) through all layers, changed in place: one call and one parallel region instead of five a layer.
// parts: a layer's tensors, in packed.py's order; bits: of its four matrices; turned and windows: one number a layer.
void layers(Tensor x, at::TensorList parts, at::IntArrayRef bits, at::IntArrayRef turned, at::IntArrayRef windows,
            const Tensor& cos, const Tensor& sin, Tensor cache, const Tensor& table, const Tensor& rows,
            const Tensor& positions, double scale, double eps) {
    struct Layer {
        const float *norm, *mlp_norm;
        Weights qkv, out, gate_up, down;
        Attention attention;
    };
    constexpr int PARTS = 18;
    const int N = x.size(0), width = x.size(1), depth = turned.size(), D = cache.size(4) / LANES, J = cache.size(2);
    const Tensor none, first = cache.select(0, 0);
    std::vector<Layer> all;
    int widest = 0, mlp = 0, H = 0;
    for (int l = 0; l < depth; l++) {
        const at::TensorList p = parts.slice(l * PARTS, PARTS);
        const int64_t* b = bits.data() + 4 * l;
        mlp = p[15].size(1) * GROUP, H = p[7].size(1) * GROUP / D;
        widest = std::max({widest, mlp, H * D, width});
        all.push_back({floats(p[0]), floats(p[11]), weights(p[1], p[2], p[3], p[4], b[0], (H + 2 * J) * D),
                       weights(p[7], p[8], p[9], p[10], b[1], width), weights(p[12], p[13], p[14], none, b[2], 2 * mlp),
                       weights(p[15], p[16], p[17], none, b[3], width),
                       attention(H, turned[l] ? cos : none, turned[l] ? sin : none, p[5], p[6], first, table, rows, positions,
                                 scale, windows[l], eps)});
        all.back().attention.pages += l * cache.stride(0);
    }
    work.fit(N, widest, table.size(1) * LANES);
    static std::vector<float> qkv, y, gate_up;
    if (qkv.size() < (size_t)N * (H + 2 * J) * D) qkv.resize((size_t)N * (H + 2 * J) * D);
    if (y.size() < (size_t)N * H * D) y.resize((size_t)N * H * D);
    if (gate_up.size() < (size_t)N * 2 * mlp) gate_up.resize((size_t)N * 2 * mlp);
    float* at = x.mutable_data_ptr<float>();
#pragma omp parallel
    for (const Layer& l : all) {
        multiply(at, width, l.qkv, l.norm, eps, N, qkv.data(), false);
        attend_all(qkv.data(), l.attention, N, y.data());
        multiply(y.data(), H * D, l.out, nullptr, eps, N, at, true);
        multiply(at, width, l.gate_up, l.mlp_norm, eps, N, gate_up.data(), false);
        multiply(gate_up.data(), 2 * mlp, l.down, nullptr, eps, N, at, true);
    }
}

}  // namespace

TORCH_LIBRARY(nanoghost, m) {
    m.def("linear(Tensor x, Tensor codes, Tensor scales, Tensor lows, int bits, Tensor bias, Tensor norm, float eps,"
          " Tensor(a!) out, bool add) -> ()", &linear);
    m.def("attend(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor(b!) cache, Tensor table, Tensor rows, Tensor positions,"
          " float scale, int window, Tensor q_norm, Tensor k_norm, float eps) -> Tensor", &attend);
    m.def("layers(Tensor(a!) x, Tensor[] parts, int[] bits, int[] turned, int[] windows, Tensor cos, Tensor sin, Tensor(b!) cache,"
          " Tensor table, Tensor rows, Tensor positions, float scale, float eps) -> ()", &layers);
}
