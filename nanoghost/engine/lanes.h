// A vector of 16 floats (lanes) and the operations that kernels.cpp needs: one register of AVX-512 (VNNI, BF16), or two
// of AVX2. Both give the same integers; sums of floats may differ in their last bits.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lanes {

constexpr int GROUP = 32;  // inputs that share a quantization scale
constexpr int LANES = 16;  // floats in a vector; outputs in a tile of weights; tokens in a block of the KV cache

#ifdef __AVX512F__

constexpr int MAX_ROWS = 16;  // rows of inputs in one pass over a tile of weights

using Floats = __m512;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, int n) { return _mm512_maskz_loadu_ps((1 << n) - 1, p); }  // the first n, then zeros
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, Floats x, int n) { _mm512_mask_storeu_ps(p, (1 << n) - 1, x); }
inline Floats load_fp16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_fp16(uint16_t* p, Floats x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, 0)); }
inline void store_bf16(void* p, Floats x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }  // the nearest integers
inline Floats scale_by_power_of_2(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }

// x in lanes first ... last, -inf in the others
inline Floats keep_lanes(Floats x, int first, int last) {
    const __mmask16 inside = (0xFFFF << first) & (0xFFFF >> (LANES - 1 - last));
    return _mm512_mask_mov_ps(broadcast(-INFINITY), inside, x);
}
// x where s is not -inf, 0 where it is
inline Floats where_finite(Floats s, Floats x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(s, broadcast(-INFINITY), _CMP_NEQ_OQ), x);
}
// Round to 8-bit integers, store them, and return their sum.
inline int store_int8(int8_t* p, Floats x) {
    const __m512i i = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(i));
    return _mm512_reduce_add_epi32(i);
}

// The weights of a tile for one group (16 outputs, 32 inputs) in 4 or 8 bits, in the order of quantization.py.
template <int BITS>
struct IntegerWeights {
    __m512i v[8];

    explicit IntegerWeights(const uint8_t* w) {
        if constexpr (BITS == 8) {
#pragma GCC unroll 16
            for (int j = 0; j < 8; j++) v[j] = _mm512_load_si512(w + 64 * j);
        } else {
            const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 16
            for (int j = 0; j < 4; j++) {
                const __m512i both = _mm512_load_si512(w + 64 * j);
                v[j] = _mm512_and_si512(both, low);
                v[j + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
            }
        }
    }
    // For each output the dot product with 32 inputs in 8 bits, whose sum is `total`.
    Floats dot(const int8_t* x, int total) const {
        // 8-bit codes are stored + 128
        __m512i sum = BITS == 8 ? _mm512_set1_epi32(-128 * total) : _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int j = 0; j < 8; j++) {
            int four;
            std::memcpy(&four, x + 4 * j, 4);
            sum = _mm512_dpbusd_epi32(sum, v[j], _mm512_set1_epi32(four));
        }
        return _mm512_cvtepi32_ps(sum);
    }
};

// The weights of a tile for two inputs in bf16.
struct Bf16Weights {
    __m512bh v;

    explicit Bf16Weights(const uint8_t* w) : v((__m512bh)_mm512_load_si512(w)) {}
    Floats dot(const void* x, Floats sum) const {
        int two;
        std::memcpy(&two, x, 4);
        return _mm512_dpbf16_ps(sum, v, (__m512bh)_mm512_set1_epi32(two));
    }
};

#else

constexpr int MAX_ROWS = 8;

struct Floats {
    __m256 a, b;
};

inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Floats load(const float* p, int n) {
    float buffer[LANES] = {};
    std::memcpy(buffer, p, n * sizeof(float));
    return load(buffer);
}
inline void store(float* p, Floats x, int n) {
    float buffer[LANES];
    store(buffer, x);
    std::memcpy(p, buffer, n * sizeof(float));
}
inline Floats load_fp16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_fp16(uint16_t* p, Floats x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}

inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats abs(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats nearest(Floats x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline __m256 power_of_2(__m256 n) {  // sets the exponent bits of a float directly: n from -126 to 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Floats scale_by_power_of_2(Floats x, Floats n) {
    return {_mm256_mul_ps(x.a, power_of_2(n.a)), _mm256_mul_ps(x.b, power_of_2(n.b))};
}
inline float reduce_add(Floats x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float reduce_max(Floats x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Floats keep_lanes(Floats x, int first, int last) {
    float buffer[LANES];
    store(buffer, x);
    for (int i = 0; i < LANES; i++) buffer[i] = first <= i && i <= last ? buffer[i] : -INFINITY;
    return load(buffer);
}
inline Floats where_finite(Floats s, Floats x) {
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    return {_mm256_and_ps(_mm256_cmp_ps(s.a, lowest, _CMP_NEQ_OQ), x.a),
            _mm256_and_ps(_mm256_cmp_ps(s.b, lowest, _CMP_NEQ_OQ), x.b)};
}
inline int store_int8(int8_t* p, Floats x) {
    const __m256i i = _mm256_cvtps_epi32(x.a), j = _mm256_cvtps_epi32(x.b);
    const __m256i mixed = _mm256_permute4x64_epi64(_mm256_packs_epi32(i, j), 0b11011000);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(mixed), _mm256_extracti128_si256(mixed, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
    const __m256i eight = _mm256_add_epi32(i, j);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1);
}
inline __m256i to_bf16(__m256 x) {  // to the nearest, ties to even; in the low 16 bits
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}
inline void store_bf16(void* p, Floats x) {
    const __m256i mixed = _mm256_packus_epi32(to_bf16(x.a), to_bf16(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(mixed, 0b11011000));
}

template <int BITS>
struct IntegerWeights {
    __m256i v[16];

    explicit IntegerWeights(const uint8_t* w) {
        if constexpr (BITS == 8) {
            const __m256i high = _mm256_set1_epi8(-128);
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++) v[j] = _mm256_xor_si256(_mm256_load_si256((const __m256i*)(w + 32 * j)), high);
        } else {
            const __m256i low = _mm256_set1_epi8(15);
#pragma GCC unroll 16
            for (int j = 0; j < 8; j++) {
                const __m256i both = _mm256_load_si256((const __m256i*)(w + 32 * j));
                v[j] = _mm256_and_si256(both, low);
                v[j + 8] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            }
        }
    }
    // Sums of 2 products of 8-bit integers fit into 16 bits (2 x 127 x 127); of 4-bit codes, even 16 (16 x 15 x 127).
    Floats dot(const int8_t* x, int) const {
        const __m256i one = _mm256_set1_epi16(1);
        __m256i a = _mm256_setzero_si256(), b = a;
#pragma GCC unroll 16
        for (int j = 0; j < 8; j++) {
            int four;
            std::memcpy(&four, x + 4 * j, 4);
            const __m256i u = _mm256_set1_epi32(four);
            if constexpr (BITS == 8) {  // |w| times x with the sign of w: maddubs multiplies unsigned with signed
                const __m256i p = v[2 * j], q = v[2 * j + 1];
                const __m256i pu = _mm256_maddubs_epi16(_mm256_abs_epi8(p), _mm256_sign_epi8(u, p));
                const __m256i qu = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(u, q));
                a = _mm256_add_epi32(a, _mm256_madd_epi16(pu, one));
                b = _mm256_add_epi32(b, _mm256_madd_epi16(qu, one));
            } else {
                a = _mm256_add_epi16(a, _mm256_maddubs_epi16(v[2 * j], u));
                b = _mm256_add_epi16(b, _mm256_maddubs_epi16(v[2 * j + 1], u));
            }
        }
        if constexpr (BITS == 4) {
            a = _mm256_madd_epi16(a, one);
            b = _mm256_madd_epi16(b, one);
        }
        return {_mm256_cvtepi32_ps(a), _mm256_cvtepi32_ps(b)};
    }
};

struct Bf16Weights {
    Floats even, odd;

    explicit Bf16Weights(const uint8_t* w) : even{low(w), low(w + 32)}, odd{high(w), high(w + 32)} {}
    static __m256 low(const uint8_t* w) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_load_si256((const __m256i*)w), 16));
    }
    static __m256 high(const uint8_t* w) {
        const __m256i both = _mm256_load_si256((const __m256i*)w);
        return _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(0xFFFF0000)));
    }
    Floats dot(const void* x, Floats sum) const {
        uint32_t two;
        std::memcpy(&two, x, 4);
        const uint32_t parts[2] = {two << 16, two & 0xFFFF0000};
        float first, second;
        std::memcpy(&first, parts, 4);
        std::memcpy(&second, parts + 1, 4);
        return fma(even, broadcast(first), fma(odd, broadcast(second), sum));
    }
};

#endif

// e^x with a relative error of 1e-7 (Cody-Waite range reduction, a polynomial of degree 6); x <= 88.
inline Floats exp(Floats x) {
    x = max(x, broadcast(-87.0f));
    const Floats n = nearest(mul(x, broadcast(1.44269504f)));
    Floats r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Floats p = broadcast(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, broadcast(c));
    return scale_by_power_of_2(p, n);
}

}  // namespace lanes
