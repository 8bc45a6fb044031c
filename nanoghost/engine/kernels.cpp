// Three operators that let a Llama speak as fast as the memory delivers its weights: a product with packed weights,
// attention over pages of keys and values, and all layers made of the two. For x86 with AVX-512 (VNNI, BF16). packed.py tells the layouts, and
// tests/test_engine.py holds both to the same in plain PyTorch.
//
// N tokens, K inputs, M outputs, G groups of 32 inputs, H heads, D width of a head.
//
// What a token gets does not depend on which others are computed beside it, to the last bit: every output is summed
// in one order, however many rows share a pass over the weights.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int GROUP = 32;  // inputs that share a scale
constexpr int LANES = 16;  // floats in a register; outputs computed side by side; tokens in a page

using at::Tensor;

inline __m512 half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// e^x to 1e-7 relative (Cody and Waite's reduction, a polynomial of degree 6); x <= 88.
inline __m512 exp(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

// ---- inputs: normed or gated, then in 8 bits with a scale for each group ----

struct Inputs {
    std::vector<int8_t> codes;    // N x K; as bf16, twice that
    std::vector<float> scales;    // N x G
    std::vector<int32_t> starts;  // N x G: -128 times the sum of the codes, as weights of 8 bits are stored 128 higher
    std::vector<float> sums;      // N x G, of the inputs as rounded
    std::vector<float> wide;      // one row a thread
};

// x -> x / rms(x) * weight
void rms_norm(const float* x, const float* weight, float eps, int K, float* y) {
    __m512 square = _mm512_setzero_ps();
    for (int k = 0; k < K; k += LANES) {
        __m512 v = _mm512_loadu_ps(x + k);
        square = _mm512_fmadd_ps(v, v, square);
    }
    __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(square) / K + eps));
    for (int k = 0; k < K; k += LANES)
        _mm512_storeu_ps(y + k, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + k), scale), _mm512_loadu_ps(weight + k)));
}

// (gate, up) -> silu(gate) * up
void gate(const float* x, int K, float* y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (int k = 0; k < K; k += LANES) {
        __m512 g = _mm512_loadu_ps(x + k);
        __m512 e = exp(_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(87.0f)));
        __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, e));
        _mm512_storeu_ps(y + k, _mm512_mul_ps(silu, _mm512_loadu_ps(x + K + k)));
    }
}

void quantise(const float* x, int K, int8_t* codes, float* scales, int32_t* starts, float* sums) {
    for (int g = 0; g < K / GROUP; g++, x += GROUP, codes += GROUP) {
        __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + LANES);
        float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
        __m512i i = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), j = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
        _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(i));
        _mm_storeu_si128((__m128i*)(codes + LANES), _mm512_cvtepi32_epi8(j));
        scales[g] = most / 127.0f;
        const int sum = _mm512_reduce_add_epi32(_mm512_add_epi32(i, j));
        starts[g] = -128 * sum;
        sums[g] = sum * scales[g];
    }
}

void to_bf16(const float* x, int K, int8_t* codes) {
    for (int k = 0; k < K; k += LANES)
        _mm256_storeu_si256((__m256i*)(codes + 2 * k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
}

// ---- products: R rows of inputs with 16 rows of weights ----

template <int BITS, int R>
void tile(const uint8_t* w, const uint16_t* scales, const uint16_t* lows, const int8_t* x, const float* x_scales,
          const int32_t* x_starts, const float* x_sums, int K, __m512* y) {
    const int G = K / GROUP;
    __m512 sum[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) sum[r] = _mm512_setzero_ps();
    for (int g = 0; g < G; g++) {
        if constexpr (BITS == 16) {
#pragma GCC unroll 16
            for (int j = 0; j < GROUP / 2; j++, w += 64) {
                __m512bh v = (__m512bh)_mm512_load_si512(w);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    int pair;
                    std::memcpy(&pair, x + 2 * (r * K + g * GROUP) + 4 * j, 4);
                    sum[r] = _mm512_dpbf16_ps(sum[r], v, (__m512bh)_mm512_set1_epi32(pair));
                }
            }
        } else {
            __m512i v[8];
            if constexpr (BITS == 8) {
#pragma GCC unroll 16
                for (int j = 0; j < 8; j++) v[j] = _mm512_load_si512(w + 64 * j);
                w += 512;
            } else {
                const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 16
                for (int j = 0; j < 4; j++) {
                    __m512i both = _mm512_load_si512(w + 64 * j);
                    v[j] = _mm512_and_si512(both, low);
                    v[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
                }
                w += 256;
            }
            const __m512 scale = half(scales + g * LANES);
            __m512 lowest;
            if constexpr (BITS == 4) lowest = half(lows + g * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                __m512i dot = BITS == 8 ? _mm512_set1_epi32(x_starts[r * G + g]) : _mm512_setzero_si512();
#pragma GCC unroll 16
                for (int j = 0; j < 8; j++) {
                    int four;
                    std::memcpy(&four, x + r * K + g * GROUP + 4 * j, 4);
                    dot = _mm512_dpbusd_epi32(dot, v[j], _mm512_set1_epi32(four));
                }
                const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(x_scales[r * G + g]));
                sum[r] = _mm512_fmadd_ps(product, scale, sum[r]);
                if constexpr (BITS == 4) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(x_sums[r * G + g]), lowest, sum[r]);
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
void rows(const Weights& w, const Inputs& x, int block, int first, bool add, float* out) {
    const int K = w.K, G = K / GROUP;
    const int64_t at = (int64_t)block * G;
    __m512 y[R];
    tile<BITS, R>(w.codes + at * 64 * BITS, w.scales + at * LANES, w.lows + at * LANES,
                  x.codes.data() + (int64_t)first * K * (BITS == 16 ? 2 : 1), x.scales.data() + first * G,
                  x.starts.data() + first * G, x.sums.data() + first * G, K, y);
    const int left = w.M - block * LANES;
    const __mmask16 inside = left >= LANES ? 0xFFFF : (1 << left) - 1;
    for (int r = 0; r < R; r++) {
        float* to = out + (int64_t)(first + r) * w.M + block * LANES;
        if (w.bias) y[r] = _mm512_add_ps(y[r], _mm512_maskz_loadu_ps(inside, w.bias + block * LANES));
        if (add) y[r] = _mm512_add_ps(y[r], _mm512_maskz_loadu_ps(inside, to));
        _mm512_mask_storeu_ps(to, inside, y[r]);
    }
}

template <int BITS>
void block_of_outputs(const Weights& w, const Inputs& x, int block, int N, bool add, float* out) {
    int n = 0;
    for (; n + 16 <= N; n += 16) rows<BITS, 16>(w, x, block, n, add, out);
    if (n + 8 <= N) rows<BITS, 8>(w, x, block, n, add, out), n += 8;
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
    else quantise(row, K, in.codes.data() + (size_t)n * K, in.scales.data() + (size_t)n * G, in.starts.data() + (size_t)n * G, in.sums.data() + (size_t)n * G);
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
        if (in.scales.size() < groups) in.scales.resize(groups), in.starts.resize(groups), in.sums.resize(groups);
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
    __m512 most[Q];
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++) most[h] = _mm512_set1_ps(-INFINITY);
    for (int p = from; p <= to; p++) {
        const uint16_t* keys = cache + pages[p] * page_size;
        __m512 s[Q], odd[Q];  // two sums each: an addition waits four cycles for the one before
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) s[h] = odd[h] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int d = 0; d < D; d += 2) {
            const __m512 k = half(keys + d * LANES), l = half(keys + (d + 1) * LANES);
#pragma GCC unroll 8
            for (int h = 0; h < Q; h++) {
                s[h] = _mm512_fmadd_ps(_mm512_set1_ps(q[h * D + d]), k, s[h]);
                odd[h] = _mm512_fmadd_ps(_mm512_set1_ps(q[h * D + d + 1]), l, odd[h]);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) s[h] = _mm512_add_ps(s[h], odd[h]);
        __mmask16 seen = 0xFFFF;
        if (p == from) seen &= 0xFFFF << (first % LANES);
        if (p == to) seen &= 0xFFFF >> (LANES - 1 - last % LANES);
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) {
            s[h] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, s[h], _mm512_set1_ps(scale));
            _mm512_storeu_ps(scores + h * S + (p - from) * LANES, s[h]);
            most[h] = _mm512_max_ps(most[h], s[h]);
        }
    }
    __m512 y[Q][D / LANES];
    float total[Q];
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++) {
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[h]));
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < S; i += LANES) {
            const __m512 s = _mm512_loadu_ps(scores + h * S + i);
            const __mmask16 seen = _mm512_cmp_ps_mask(s, _mm512_set1_ps(-INFINITY), _CMP_NEQ_OQ);
            const __m512 e = _mm512_maskz_mov_ps(seen, exp(_mm512_sub_ps(s, top)));
            _mm512_storeu_ps(scores + h * S + i, e);
            sum = _mm512_add_ps(sum, e);
        }
        total[h] = _mm512_reduce_add_ps(sum);
#pragma GCC unroll 8
        for (int d = 0; d < D / LANES; d++) y[h][d] = _mm512_setzero_ps();
    }
    for (int p = from; p <= to; p++) {
        const uint16_t* values = cache + pages[p] * page_size + D * LANES;
        const int begin = p == from ? first % LANES : 0, end = p == to ? last % LANES + 1 : LANES;
        for (int t = begin; t < end; t++) {  // what lies behind `last` in its page was never written
#pragma GCC unroll 8
            for (int d = 0; d < D / LANES; d++) {
                const __m512 v = half(values + t * D + d * LANES);
#pragma GCC unroll 8
                for (int h = 0; h < Q; h++)
                    y[h][d] = _mm512_fmadd_ps(_mm512_set1_ps(scores[h * S + (p - from) * LANES + t]), v, y[h][d]);
            }
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++)
#pragma GCC unroll 8
        for (int d = 0; d < D / LANES; d++)
            _mm512_storeu_ps(out + h * D + d * LANES, _mm512_mul_ps(y[h][d], _mm512_set1_ps(1.0f / total[h])));
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
            for (int d = 0; d < D; d += LANES)
                _mm256_storeu_si256((__m256i*)(page + D * LANES + lane * D + d), _mm512_cvtps_ph(_mm512_loadu_ps(v + d), 0));
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
