"""The fast operations against slow ones: autograd and finite differences, attention by loops, a full log-softmax.

B batch, T time, S tokens read so far, D width, H heads, K head width, V vocabulary, N positions.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from nanoghost.model import layers
from nanoghost.model.layers import attend, norm, relu_squared, rotate, token_logprobs
from nanoghost.model.layout import causal_mask
from nanoghost.model.rope import rope_table


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def value_and_gradients(function, *inputs):
    """The result, and the gradients of its random (but fixed) weighted sum."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y.detach(), torch.autograd.grad((y * weights).sum(), inputs)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_norm_and_its_gradient_equal_the_formula_of_rmsnorm(size):
    """The oracle is autograd in fp64. Finite differences cannot be used, because the norm is computed in fp32 by
    design."""
    x_BTD = torch.randn(2, 3, 16) * size
    y, (gradient,) = value_and_gradients(norm, x_BTD)
    expected = value_and_gradients(lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), x_BTD.double())
    assert_close(y.double(), expected[0], rtol=1e-5, atol=1e-6)
    assert_close(gradient.double(), expected[1][0], rtol=1e-4, atol=1e-5 / size)


def test_relu_squared_has_the_gradient_of_finite_differences():
    assert gradcheck(relu_squared, torch.randn(4, 7, dtype=torch.float64, requires_grad=True))
    assert_close(relu_squared(torch.tensor([-2.0, 0.0, 3.0])), torch.tensor([0.0, 0.0, 9.0]))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 2, 3, 4)])  # queries alone; queries and keys together
def test_rotate_has_the_gradient_of_finite_differences(shape):
    cos, sin = rope_table(5, 4, 100.0)
    assert gradcheck(lambda x: rotate(x, cos, sin), torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_rotate_multiplies_pairs_of_channels_by_complex_phases():
    T, K, base = 6, 8, 100.0
    x_BTHK = torch.randn(2, T, 3, K, dtype=torch.float64)
    complex_x = torch.complex(x_BTHK[..., : K // 2], x_BTHK[..., K // 2 :])
    frequencies = torch.tensor([base ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)
    rotated = complex_x * torch.exp(1j * torch.arange(T)[:, None] * frequencies)[:, None]
    assert_close(
        rotate(x_BTHK, *rope_table(T, K, base)), torch.cat([rotated.real, rotated.imag], -1), atol=1e-6, rtol=0
    )


def test_scores_of_rotated_queries_and_keys_depend_on_the_distance_only():
    cos, sin = rope_table(40, 8, 100.0)
    q_BTHK, k_BTHK = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)

    def scores(start):
        q, k = (rotate(x, cos[start : start + 5], sin[start : start + 5]) for x in (q_BTHK, k_BTHK))
        return torch.einsum("bthk,bshk->bhts", q, k)

    assert_close(scores(35), scores(0), atol=1e-5, rtol=1e-5)


def slow_attend(q_BTHK, k_BSHK, v_BSHK, mask_BTS, scale):
    """One query of one head at a time."""
    B, T, H, K = q_BTHK.shape
    y = torch.zeros(B, T, H, K, dtype=q_BTHK.dtype)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                scores_S = k_BSHK[b, :, h] @ q_BTHK[b, t, h] * scale + mask_BTS[b % len(mask_BTS), t]
                y[b, t, h] = torch.softmax(scores_S, 0) @ v_BSHK[b, :, h]
    return y.flatten(2)


@pytest.mark.parametrize("mask_rows", [1, 2])
@pytest.mark.parametrize("past", [0, 3])  # tokens in the cache
def test_attend_equals_a_loop_over_heads_and_the_attention_of_pytorch(mask_rows, past):
    B, T, H, K = 2, 4, 3, 8
    S = past + T
    q, k, v = torch.randn(B, T, H, K), torch.randn(B, S, H, K), torch.randn(B, S, H, K)
    mask = causal_mask(S, torch.float32, "cpu")[:, past:].repeat(mask_rows, 1, 1)
    mask[-1, :, 0] = -1.0  # the mask is added to the scores, and may differ between rows
    y = attend(q, k, v, mask, scale=0.3)
    assert_close(y, slow_attend(q, k, v, mask, 0.3))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    assert_close(y, F.scaled_dot_product_attention(*heads_first, mask[:, None], scale=0.3).transpose(1, 2).flatten(2))


def test_causal_mask_hides_later_tokens_and_other_conversations():
    segments_BT = torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4]])
    mask_BTS = causal_mask(6, torch.float32, "cpu", segments_BT)
    for b, row in enumerate(segments_BT.tolist()):
        for t in range(6):
            for s in range(6):
                assert mask_BTS[b, t, s] == (0.0 if s <= t and row[s] == row[t] else float("-inf"))
    assert_close(causal_mask(6, torch.float32, "cpu"), mask_BTS[1:])


@pytest.mark.parametrize("chunk", [4, 5, 1024])  # of 10 positions: with a remainder, in equal parts, in one part
def test_token_logprobs_equal_a_gathered_log_softmax(monkeypatch, chunk):
    monkeypatch.setattr(layers, "LOGITS_CHUNK", chunk)
    hidden_ND, head_VD, targets_N = torch.randn(10, 6), torch.randn(13, 6), torch.randint(13, (10,))
    targets_N[:3] = 7  # a target that occurs several times

    def slow(hidden_ND, head_VD):
        return torch.log_softmax(hidden_ND @ head_VD.T, 1).gather(1, targets_N[:, None])[:, 0]

    fast = value_and_gradients(lambda hidden, head: token_logprobs(hidden, head, targets_N), hidden_ND, head_VD)
    assert_close(fast, value_and_gradients(slow, hidden_ND, head_VD), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert_close(token_logprobs(hidden_ND, head_VD, targets_N), fast[0], rtol=1e-5, atol=1e-5)


def test_token_logprobs_in_bf16_are_close_to_those_in_fp32():
    hidden_ND, head_VD, targets_N = torch.randn(50, 32), torch.randn(40, 32) / 4, torch.randint(40, (50,))

    def result(dtype):
        y, gradients = value_and_gradients(
            lambda h, w: token_logprobs(h, w, targets_N), hidden_ND.to(dtype), head_VD.to(dtype)
        )
        return [y, *(g.float() for g in gradients)]

    for approximate, exact in zip(result(torch.bfloat16), result(torch.float32)):
        assert (approximate - exact).norm() < 0.02 * exact.norm()
