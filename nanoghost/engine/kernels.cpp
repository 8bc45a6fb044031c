// Three operators for inference with quantized weights and a paged KV cache: `linear` (a matmul), `attend` (attention),
// and `layers` (all layers of a Llama, made of the two). For x86 with AVX-512 or AVX2 (lanes.h). tests/test_kernels.py
// compares them with plain PyTorch.
//
// N tokens, H query heads, J KV heads, D width of a head.
//
// The result for a token does not depend on the other tokens of the call, to the last bit: every output is summed in
// the same order, however many rows of inputs share a pass over the weights.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "attention.h"
#include "matmul.h"

namespace {

using namespace lanes;
using at::Tensor;

// null for an empty tensor
const float* floats(const Tensor& t) { return t.defined() && t.numel() ? t.const_data_ptr<float>() : nullptr; }

Weights weights(const Tensor& codes, const Tensor& scales, const Tensor& mins, const Tensor& bias, int bits, int M) {
    return {codes.const_data_ptr<uint8_t>(), (const uint16_t*)scales.const_data_ptr(),
            (const uint16_t*)mins.const_data_ptr(), floats(bias), (int)codes.size(1) * GROUP, M, bits};
}

// A single matmul. An empty tensor means no bias or no norm.
void linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& mins, int64_t bits,
            const Tensor& bias, const Tensor& norm, double eps, Tensor out, bool add) {
    const Weights w = weights(codes, scales, mins, bias, bits, out.size(1));
    workspace.reserve(x.size(0), w.K, 0);
    const float *input = x.const_data_ptr<float>(), *norm_weight = floats(norm);
    float* output = out.mutable_data_ptr<float>();
#pragma omp parallel
    matmul(input, x.size(1), w, norm_weight, eps, x.size(0), output, add);
}

Attention attention(int heads, const Tensor& cos, const Tensor& sin, const Tensor& q_norm, const Tensor& k_norm,
                    Tensor kv_cache, const Tensor& block_table, const Tensor& slots, const Tensor& positions,
                    double scale, int64_t window, double eps) {
    return {floats(cos), floats(sin), floats(q_norm), floats(k_norm), (uint16_t*)kv_cache.mutable_data_ptr(),
            block_table.const_data_ptr<int>(), slots.const_data_ptr<int>(), positions.const_data_ptr<int>(),
            kv_cache.stride(0), heads, (int)kv_cache.size(1), (int)kv_cache.size(3) / LANES, (int)block_table.size(1),
            (int)window, (float)scale, (float)eps};
}

// Attention of one layer. An empty tensor means no rotary embedding or no norm.
Tensor attend(Tensor qkv, const Tensor& cos, const Tensor& sin, Tensor kv_cache, const Tensor& block_table,
              const Tensor& slots, const Tensor& positions, double scale, int64_t window, const Tensor& q_norm,
              const Tensor& k_norm, double eps) {
    const int N = qkv.size(0), J = kv_cache.size(1), D = kv_cache.size(3) / LANES, H = qkv.size(1) / D - 2 * J;
    const Attention a =
        attention(H, cos, sin, q_norm, k_norm, kv_cache, block_table, slots, positions, scale, window, eps);
    Tensor out = at::empty({N, H * D}, qkv.options());
    workspace.reserve(1, GROUP, a.max_blocks * LANES);
    float *input = qkv.mutable_data_ptr<float>(), *output = out.mutable_data_ptr<float>();
#pragma omp parallel
    attend_tokens(input, a, N, output);
    return out;
}

// Where the tensors of a layer are in the list for `layers`: as KERNEL_ORDER in quantized_llama.py, with three tensors
// for a matrix (codes, scales, mins).
enum {
    ATTENTION_NORM = 0,
    QKV = 1,
    QKV_BIAS = 4,
    Q_NORM = 5,
    K_NORM = 6,
    OUT = 7,
    OUT_BIAS = 10,
    MLP_NORM = 11,
    GATE_UP = 12,
    DOWN = 15,
    TENSORS = 18,
};

// x (N, width) through all layers, changed in place: one call and one parallel region instead of five for each layer.
// tensors: TENSORS of each layer; bits: of the four matrices of each layer; has_rope, windows: a number for each layer.
void layers(Tensor x, at::TensorList tensors, at::IntArrayRef bits, at::IntArrayRef has_rope, at::IntArrayRef windows,
            const Tensor& cos, const Tensor& sin, Tensor kv_cache, const Tensor& block_table, const Tensor& slots,
            const Tensor& positions, double scale, double eps) {
    struct Layer {
        const float *attention_norm, *mlp_norm;
        Weights qkv, out, gate_up, down;
        Attention attention;
    };
    const int N = x.size(0), width = x.size(1), depth = has_rope.size();
    const int D = kv_cache.size(4) / LANES, J = kv_cache.size(2);
    const Tensor none, first_layer_cache = kv_cache.select(0, 0);
    std::vector<Layer> all_layers;
    int widest = 0, mlp = 0, H = 0;
    for (int l = 0; l < depth; l++) {
        const at::TensorList t = tensors.slice(l * TENSORS, TENSORS);
        const int64_t* layer_bits = bits.data() + 4 * l;
        mlp = t[DOWN].size(1) * GROUP;
        H = t[OUT].size(1) * GROUP / D;
        widest = std::max({widest, mlp, H * D, width});
        const Weights qkv = weights(t[QKV], t[QKV + 1], t[QKV + 2], t[QKV_BIAS], layer_bits[0], (H + 2 * J) * D);
        const Weights out = weights(t[OUT], t[OUT + 1], t[OUT + 2], t[OUT_BIAS], layer_bits[1], width);
        const Weights gate_up = weights(t[GATE_UP], t[GATE_UP + 1], t[GATE_UP + 2], none, layer_bits[2], 2 * mlp);
        const Weights down = weights(t[DOWN], t[DOWN + 1], t[DOWN + 2], none, layer_bits[3], width);
        Attention a = attention(H, has_rope[l] ? cos : none, has_rope[l] ? sin : none, t[Q_NORM], t[K_NORM],
                                first_layer_cache, block_table, slots, positions, scale, windows[l], eps);
        a.kv_cache += l * kv_cache.stride(0);
        all_layers.push_back({floats(t[ATTENTION_NORM]), floats(t[MLP_NORM]), qkv, out, gate_up, down, a});
    }
    workspace.reserve(N, widest, block_table.size(1) * LANES);
    static std::vector<float> qkv, y, gate_up;
    if (qkv.size() < (size_t)N * (H + 2 * J) * D) qkv.resize((size_t)N * (H + 2 * J) * D);
    if (y.size() < (size_t)N * H * D) y.resize((size_t)N * H * D);
    if (gate_up.size() < (size_t)N * 2 * mlp) gate_up.resize((size_t)N * 2 * mlp);
    float* stream = x.mutable_data_ptr<float>();
#pragma omp parallel
    for (const Layer& l : all_layers) {
        matmul(stream, width, l.qkv, l.attention_norm, eps, N, qkv.data(), false);
        attend_tokens(qkv.data(), l.attention, N, y.data());
        matmul(y.data(), H * D, l.out, nullptr, eps, N, stream, true);
        matmul(stream, width, l.gate_up, l.mlp_norm, eps, N, gate_up.data(), false);
        matmul(gate_up.data(), 2 * mlp, l.down, nullptr, eps, N, stream, true);
    }
}

}  // namespace

TORCH_LIBRARY(nanoghost, m) {
    m.def("linear(Tensor x, Tensor codes, Tensor scales, Tensor mins, int bits, Tensor bias, Tensor norm, float eps,"
          " Tensor(a!) out, bool add) -> ()", &linear);
    m.def("attend(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor(b!) kv_cache, Tensor block_table, Tensor slots,"
          " Tensor positions, float scale, int window, Tensor q_norm, Tensor k_norm, float eps) -> Tensor", &attend);
    m.def("layers(Tensor(a!) x, Tensor[] tensors, int[] bits, int[] has_rope, int[] windows, Tensor cos, Tensor sin,"
          " Tensor(b!) kv_cache, Tensor block_table, Tensor slots, Tensor positions, float scale, float eps) -> ()",
          &layers);
}
