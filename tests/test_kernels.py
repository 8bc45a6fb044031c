"""Quantization and the C++ kernels, compared with plain PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from nanoghost.engine import kernels
from nanoghost.engine.quantization import LANES, dequantize, quantize
from nanoghost.engine.quantized_llama import EMPTY, load_quantized, quantize_model
from nanoghost.formats.model_folder import save_model
from nanoghost.model.lora import Adapter
from nanoghost.model.rope import rope_table
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.engine_toys import toy_llama
from tests.support.toys import GRANITE_MULTIPLIERS, toy_text

NO_KERNELS = kernels.unavailable_reason()
needs_kernels = pytest.mark.skipif(bool(NO_KERNELS), reason=f"no kernels here: {NO_KERNELS}")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(300)], 300)


# -- quantized matrices -----------------------------------------------------------------------------------------------


@pytest.fixture
def weight():
    torch.manual_seed(0)
    weight = torch.randn(50, 96)  # 50 outputs do not fill the last tile
    weight[3, 32:64] = 0.25  # a group of equal weights
    weight[4, :32] = 0.0
    return weight


@pytest.mark.parametrize(("bits", "step"), [(4, 1 / 15), (8, 1 / 127), (16, 2**-7)])
def test_quantization_error_is_at_most_half_a_step(weight, bits, step):
    groups = weight.view(50, 3, 32)
    highest = groups.abs().amax(2)
    value_range = groups.amax(2) - groups.amin(2) if bits == 4 else highest
    error = (dequantize(quantize(weight, bits)) - weight).view(50, 3, 32).abs().amax(2)
    assert (error <= 0.51 * step * value_range + 1e-3 * highest).all()  # the scales are rounded to fp16


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantizing_again_changes_nothing(weight, bits):
    restored = dequantize(quantize(weight, bits))
    assert torch.equal(dequantize(quantize(restored, bits)), restored)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_dequantizing_some_outputs_equals_those_of_all(weight, bits):
    quantized = quantize(weight, bits)
    outputs = torch.tensor([49, 0, 17])
    assert torch.equal(dequantize(quantized, outputs), dequantize(quantized)[outputs])


# -- kernels ----------------------------------------------------------------------------------------------------------


def test_the_best_instruction_set_of_a_processor_is_chosen():
    avx512, avx2 = kernels.INSTRUCTION_SETS
    assert kernels.best_instruction_set(dict.fromkeys(avx512 + avx2, True)) == avx512
    assert kernels.best_instruction_set(dict.fromkeys(avx512 + avx2, True) | {"avx512_bf16": False}) == avx2
    assert kernels.best_instruction_set({"neon": True, "avx2": False}) == ()


def rounded(x_NK: torch.Tensor, bits: int) -> torch.Tensor:
    """Inputs as the kernels see them: in bf16, or in 8 bits with a scale for each group of 32."""
    if bits == 16:
        return x_NK.bfloat16().float()
    groups = x_NK.view(len(x_NK), -1, 32)
    highest = groups.abs().amax(-1, keepdim=True)
    return ((groups * (127 / highest.clamp_min(1e-30))).round() * (highest / 127)).view_as(x_NK)


class LinearCase:
    """A quantized matrix of 50 x 96, inputs for it, and what else `linear` takes."""

    def __init__(self, N: int, bits: int):
        torch.manual_seed(N)
        self.bits = bits
        weight = torch.randn(50, 96)
        self.bias, self.norm = torch.randn(50), torch.rand(96) + 0.5
        self.x, self.start = torch.randn(N, 96), torch.randn(N, 50)
        self.x[0, :32] = 0.0
        self.gate = torch.randn(N, 96) * 3
        self.matrix = quantize(weight, bits)
        self.weight = dequantize(self.matrix)

    def linear(self, x, bias=EMPTY, norm=EMPTY, add_to=None):
        m = self.matrix
        out = torch.full((len(x), 50), torch.nan) if add_to is None else add_to.clone()
        add = add_to is not None
        torch.ops.nanoghost.linear(x, m.codes, m.scales, m.mins, self.bits, bias, norm, 1e-5, out, add)
        return out

    def expected(self, x):
        return rounded(x, self.bits) @ self.weight.T


def assert_near(actual, expected):
    assert (actual - expected).norm() <= 1e-3 * expected.norm()  # an input that rounds the other way is a step of 1/127


all_shapes = pytest.mark.parametrize("N", [1, 3, 7, 16, 37])
all_bits = pytest.mark.parametrize("bits", [4, 8, 16])


@needs_kernels
@all_bits
@all_shapes
def test_linear_multiplies_with_the_dequantized_weights(bits, N):
    case = LinearCase(N, bits)
    assert_near(case.linear(case.x), case.expected(case.x))


@needs_kernels
@all_bits
@all_shapes
def test_linear_adds_a_bias_and_to_the_output(bits, N):
    case = LinearCase(N, bits)
    actual = case.linear(case.x, bias=case.bias, add_to=case.start)
    assert_near(actual, case.expected(case.x) + case.bias + case.start)


@needs_kernels
@all_bits
@all_shapes
def test_linear_applies_rms_norm_first(bits, N):
    case = LinearCase(N, bits)
    assert_near(case.linear(case.x, norm=case.norm), case.expected(F.rms_norm(case.x, (96,), case.norm, 1e-5)))


@needs_kernels
@all_bits
@all_shapes
def test_linear_applies_swiglu_to_inputs_of_twice_the_width(bits, N):
    case = LinearCase(N, bits)
    assert_near(case.linear(torch.cat([case.gate, case.x], 1)), case.expected(F.silu(case.gate) * case.x))


@needs_kernels
@all_bits
@all_shapes
def test_a_row_of_linear_does_not_depend_on_the_others(bits, N):
    case = LinearCase(N, bits)
    together = case.linear(case.x)
    for n in range(N):
        assert torch.equal(case.linear(case.x[n : n + 1])[0], together[n])


@needs_kernels
@pytest.mark.parametrize("H, J, D, window", [(9, 3, 64, 0), (4, 2, 64, 20), (2, 2, 128, 0), (4, 1, 128, 5)])
def test_attention_over_blocks_equals_scaled_dot_product_attention(H, J, D, window):
    """Two sequences in one cache, one computed at once and one in pieces; their blocks are in any order.

    Unwritten memory is NaN, so that reading beyond a text shows.
    """
    torch.manual_seed(H)
    T = 45
    cos, sin = rope_table(64, D, 10000.0, None)
    q_norm, k_norm = torch.rand(D) + 0.5, torch.rand(D) + 0.5
    cache = torch.full((12, J, 2, LANES * D), torch.nan, dtype=torch.float16)
    block_table = torch.tensor([[7, 2, 9, 0], [3, 11, 5, 0]], dtype=torch.int32)
    for slot, pieces in enumerate(([45], [17, 23, 1, 1, 1, 1, 1])):
        qkv = torch.randn(T, (H + 2 * J) * D)
        outputs, start = [], 0
        for length in pieces:
            slots = torch.full((length,), slot, dtype=torch.int32)
            positions = torch.arange(start, start + length, dtype=torch.int32)
            chunk = qkv[start : start + length].clone()
            cache_arguments = (cache, block_table, slots, positions, D**-0.5, window)
            outputs.append(torch.ops.nanoghost.attend(chunk, cos, sin, *cache_arguments, q_norm, k_norm, 1e-5))
            start += length
        expected = reference_attention(qkv.view(T, -1, D), H, J, cos[:T], sin[:T], q_norm, k_norm, window)
        assert_close(torch.cat(outputs), expected, rtol=1e-3, atol=1e-4)


def reference_attention(qkv_TXD, H, J, cos, sin, q_norm, k_norm, window):
    """(T, H D): QK-norm, rotary embedding, grouped heads, sliding window; keys and values rounded to fp16."""
    q, k, v = qkv_TXD.split([H, J, J], 1)
    q = rotate(F.rms_norm(q, q.shape[-1:], q_norm, 1e-5), cos, sin)
    k = rotate(F.rms_norm(k, k.shape[-1:], k_norm, 1e-5), cos, sin).half().float()
    v = v.half().float()
    position = torch.arange(len(q))
    mask = position[:, None] >= position
    if window:
        mask &= position[:, None] - position < window
    k, v = (z.repeat_interleave(H // J, 1).transpose(0, 1) for z in (k, v))
    return F.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask).transpose(0, 1).flatten(1)


def rotate(x_THD, cos, sin):
    a, b = x_THD.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


# -- the quantized Llama ----------------------------------------------------------------------------------------------


def all_logits(model, ids: list[int], adapter: Adapter | None = None) -> torch.Tensor:
    """Logits (T, V) of a text in one pass."""
    return model.forward_one(ids, 0, model.new_kv_cache(math.ceil(len(ids) / LANES)), adapter)


VARIANTS = [
    {},
    {"tied_embeddings": True},
    {"qkv_bias": True, "out_bias": True, "qk_norm": True},
    {"sliding_windows": (9, 0)},
    {"no_rope_layers": (1,)},
    {**GRANITE_MULTIPLIERS, "out_bias": True},
]
all_variants = pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")


@needs_kernels
@all_variants
@pytest.mark.parametrize(("bits", "tolerance"), [(16, 0.04), (8, 0.1)])
def test_a_quantized_llama_computes_the_function_of_the_llama(changes, bits, tolerance, tokenizer):
    """The tolerance is large because inputs are rounded, too, and weights as large as these amplify errors."""
    model = toy_llama(tokenizer, **changes)
    ids = tokenizer.encode(toy_text(3))[:60]
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0]
    actual = all_logits(quantize_model(model, bits), ids)
    assert (actual - expected).norm() < tolerance * expected.norm()


@needs_kernels
@all_variants
@pytest.mark.parametrize("bits", [16, 8])
def test_all_layers_in_one_call_equal_one_kernel_at_a_time(changes, bits, tokenizer):
    """An adapter without updates takes the path of one kernel at a time."""
    quantized = quantize_model(toy_llama(tokenizer, **changes), bits)
    ids = tokenizer.encode(toy_text(3))[:60]
    assert torch.equal(all_logits(quantized, ids), all_logits(quantized, ids, Adapter(1, 1.0, {})))


@needs_kernels
@pytest.mark.parametrize("tied", [True, False])
def test_quantized_weights_are_stored_until_the_originals_change(tokenizer, tmp_path, tied):
    save_model(tmp_path, toy_llama(tokenizer, tied_embeddings=tied), tokenizer)
    first, stored = load_quantized(tmp_path), tmp_path / "quantized.safetensors"
    time_stored = stored.stat().st_mtime_ns
    again = load_quantized(tmp_path)
    assert stored.stat().st_mtime_ns == time_stored
    ids = list(range(20))
    assert torch.equal(all_logits(first, ids), all_logits(again, ids))
    (tmp_path / "model.safetensors").touch()
    load_quantized(tmp_path)
    assert stored.stat().st_mtime_ns != time_stored


@needs_kernels
def test_matrices_with_16_levels_are_stored_in_4_bits_and_others_in_8(tokenizer, tmp_path):
    """A model that was rounded to 4 bits is recognized and loaded without loss."""
    model = toy_llama(tokenizer)
    with torch.no_grad():
        for weight in model.matrices():
            weight.copy_(dequantize(quantize(weight, 4)))
    save_model(tmp_path, model, tokenizer)
    weights = load_quantized(tmp_path).weights
    matrices = {name: w for name, w in weights.items() if hasattr(w, "bits")}
    assert {w.bits for name, w in matrices.items() if name.startswith("blocks.")} == {4}
    assert matrices["embedding"].bits == 8
    assert matrices["head"].bits == 8
    expected = model.blocks[1].matrix("down").detach()
    assert_close(dequantize(matrices["blocks.1.down"]), expected, rtol=1e-5, atol=1e-7)
