// Attention over blocks of the KV cache: keys as D x 16 tokens, values as 16 tokens x D, both fp16.
//
// N tokens, H query heads, J KV heads, D width of a head.

#pragma once

#include <algorithm>
#include <cmath>

#include "matmul.h"

namespace {

using namespace lanes;

// Q query heads of one KV head, for one token. It attends to the positions first ... last of the sequence in `blocks`.
template <int D, int Q>
void attend_heads(const float* q, const uint16_t* kv_cache, int64_t block_size, const int* blocks, int first, int last,
                  float scale, float* scores, float* out) {
    const int first_block = first / LANES, last_block = last / LANES, S = (last_block - first_block + 1) * LANES;
    // scores = q k^T, and their maximum
    Floats highest[Q];
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++) highest[h] = broadcast(-INFINITY);
    for (int b = first_block; b <= last_block; b++) {
        const uint16_t* keys = kv_cache + blocks[b] * block_size;
        const int begin = b == first_block ? first % LANES : 0, end = b == last_block ? last % LANES : LANES - 1;
        Floats s[Q], odd[Q];  // two sums for each head, since an addition waits four cycles for the one before
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) s[h] = odd[h] = zeros();
#pragma GCC unroll 4
        for (int d = 0; d < D; d += 2) {
            const Floats k0 = load_fp16(keys + d * LANES), k1 = load_fp16(keys + (d + 1) * LANES);
#pragma GCC unroll 8
            for (int h = 0; h < Q; h++) {
                s[h] = fma(broadcast(q[h * D + d]), k0, s[h]);
                odd[h] = fma(broadcast(q[h * D + d + 1]), k1, odd[h]);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < Q; h++) {
            s[h] = mul(add(s[h], odd[h]), broadcast(scale));
            // the rest of the block is outside the window, or was never written
            if (begin > 0 || end < LANES - 1) s[h] = keep_lanes(s[h], begin, end);
            store(scores + h * S + (b - first_block) * LANES, s[h]);
            highest[h] = max(highest[h], s[h]);
        }
    }
    // scores = exp(scores - maximum), and their sum
    Floats y[Q][D / LANES];
    float total[Q];
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++) {
        const Floats maximum = broadcast(reduce_max(highest[h]));
        Floats sum = zeros();
        for (int i = 0; i < S; i += LANES) {
            const Floats s = load(scores + h * S + i), e = where_finite(s, exp(sub(s, maximum)));
            store(scores + h * S + i, e);
            sum = add(sum, e);
        }
        total[h] = reduce_add(sum);
#pragma GCC unroll 8
        for (int d = 0; d < D / LANES; d++) y[h][d] = zeros();
    }
    // out = scores v / sum
    for (int b = first_block; b <= last_block; b++) {
        const uint16_t* values = kv_cache + blocks[b] * block_size + D * LANES;
        const int begin = b == first_block ? first % LANES : 0, end = b == last_block ? last % LANES + 1 : LANES;
        for (int t = begin; t < end; t++) {
#pragma GCC unroll 8
            for (int d = 0; d < D / LANES; d++) {
                const Floats v = load_fp16(values + t * D + d * LANES);
#pragma GCC unroll 8
                for (int h = 0; h < Q; h++) {
                    y[h][d] = fma(broadcast(scores[h * S + (b - first_block) * LANES + t]), v, y[h][d]);
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < Q; h++)
#pragma GCC unroll 8
        for (int d = 0; d < D / LANES; d++) store(out + h * D + d * LANES, mul(y[h][d], broadcast(1.0f / total[h])));
}

// All query heads of one KV head: three at a time share the load of keys and values, as many as fit in registers.
template <int D>
void attend_group(const float* q, int heads, const uint16_t* kv_cache, int64_t block_size, const int* blocks, int first,
                  int last, float scale, float* scores, float* out) {
    int h = 0;
    for (; h + 3 <= heads; h += 3) {
        attend_heads<D, 3>(q + h * D, kv_cache, block_size, blocks, first, last, scale, scores, out + h * D);
    }
    if (heads - h == 2) {
        attend_heads<D, 2>(q + h * D, kv_cache, block_size, blocks, first, last, scale, scores, out + h * D);
    }
    if (heads - h == 1) {
        attend_heads<D, 1>(q + h * D, kv_cache, block_size, blocks, first, last, scale, scores, out + h * D);
    }
}

// Rotary embedding: pairs (i, i + D / 2) are rotated by the angle of the position.
void rotate(float* x, const float* cos, const float* sin, int D) {
    for (int i = 0; i < D / 2; i++) {
        const float a = x[i], b = x[i + D / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + D / 2] = b * cos[i] + a * sin[i];
    }
}

// Arguments of attention, apart from queries, keys and values.
struct Attention {
    const float *cos, *sin;             // (context, D / 2), or null: no rotary embedding
    const float *q_norm, *k_norm;       // (D), or null: no norm
    uint16_t* kv_cache;                 // (blocks, J, 2, 16 D) fp16
    const int *block_table;             // (slots, max_blocks)
    const int *slots, *positions;       // (N): slot of each token's sequence, and its position there
    int64_t block_size;                 // numbers in a block
    int H, J, D, max_blocks, window;    // window 0: no sliding window
    float scale, eps;
};

// Normalize and rotate the queries and keys of token n in place, and store its keys and values in the cache.
void store_token(float* q, const Attention& a, int n) {
    const int H = a.H, J = a.J, D = a.D, position = a.positions[n];
    for (int h = 0; h < H + J; h++) {
        const float* norm = h < H ? a.q_norm : a.k_norm;
        if (norm) rms_norm(q + h * D, norm, a.eps, D, q + h * D);
        if (a.cos) rotate(q + h * D, a.cos + (int64_t)position * (D / 2), a.sin + (int64_t)position * (D / 2), D);
    }
    uint16_t* block = a.kv_cache + a.block_table[a.slots[n] * a.max_blocks + position / LANES] * a.block_size;
    const int lane = position % LANES;
    for (int j = 0; j < J; j++, block += 2 * LANES * D) {
        const float *k = q + (H + j) * D, *v = q + (H + J + j) * D;
        for (int d = 0; d < D; d++) block[d * LANES + lane] = _cvtss_sh(k[d], 0);
        for (int d = 0; d < D; d += LANES) store_fp16(block + D * LANES + lane * D + d, load(v + d));
    }
}

// qkv (N, (H + 2 J) D), changed in place, to out (N, H D); first stores the tokens' keys and values in the cache.
// Every thread of a parallel region calls this, and it ends with a barrier.
void attend_tokens(float* qkv, const Attention& a, int N, float* out) {
    const int H = a.H, J = a.J, D = a.D, width = (H + 2 * J) * D, group = H / J;
#pragma omp for schedule(static)
    for (int n = 0; n < N; n++) store_token(qkv + (int64_t)n * width, a, n);
    float* scores = workspace.scores[omp_get_thread_num()].data();
    const int chunk = std::clamp(N * J / (8 * omp_get_num_threads()), 1, 4);
#pragma omp for schedule(dynamic, chunk)
    for (int i = 0; i < N * J; i++) {
        const int n = i / J, j = i % J;
        const int last = a.positions[n], first = a.window ? std::max(0, last - a.window + 1) : 0;
        const float* q = qkv + (int64_t)n * width + j * group * D;
        const uint16_t* kv_cache = a.kv_cache + (int64_t)j * 2 * LANES * D;
        const int* blocks = a.block_table + a.slots[n] * a.max_blocks;
        auto attend = D == 64 ? attend_group<64> : attend_group<128>;
        float* y = out + ((int64_t)n * H + j * group) * D;
        attend(q, group, kv_cache, a.block_size, blocks, first, last, a.scale, scores, y);
    }
}

}  // namespace
