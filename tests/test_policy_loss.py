"""The five policy-gradient losses against slow loops, a bandit that can be solved by hand, and each other.

N rollouts, G rollouts of each of P prompts, T tokens.
"""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.model.ghost import Ghost, GhostConfig
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.policy_loss import VARIANTS, advantages, denominators, policy_loss
from nanoghost.train.rl import RlSettings
from nanoghost.train.rollouts import Rollouts, accumulate_policy_gradients, compute_advantages
from tests.support.toys import toy_text

FAST = settings(deadline=None, max_examples=50)
P, G, T, MAX_TOKENS = 3, 4, 6, 7
N = P * G
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def batch(seed=0, drift=0.3):
    """Log-probabilities of two policies that differ by `drift`, advantages, a ragged mask, and the prompt of each
    rollout."""
    random = torch.Generator().manual_seed(seed)
    old_NT = -2 * torch.rand(N, T, generator=random, dtype=torch.double) - 0.1
    logp_NT = (old_NT + drift * torch.randn(N, T, generator=random, dtype=torch.double)).requires_grad_()
    mask_NT = (torch.rand(N, T, generator=random) < 0.7).double()
    mask_NT[:, 1] = 1  # every rollout has a token
    advantages_N = torch.randn(N, generator=random, dtype=torch.double)
    return logp_NT, old_NT, advantages_N, mask_NT, torch.arange(P).repeat_interleave(G)


def loss_of(variant, logp_NT, old_NT, advantages_N, mask_NT, prompts_N):
    denominators_N = denominators(mask_NT, prompts_N, variant, MAX_TOKENS)
    return policy_loss(logp_NT, old_NT, advantages_N, mask_NT, denominators_N, variant)


def gradient_of(variant, logp_NT, *rest):
    (gradient_NT,) = torch.autograd.grad(loss_of(variant, logp_NT, *rest), logp_NT)
    return gradient_NT


# -- the slow, clear version: one loop for each paper -----------------------------------------------------------------


def surrogate(ratio, advantage, low, high):
    """The objective of PPO (Schulman et al. 2017, equation 7)."""
    return min(ratio * advantage, max(1 - low, min(ratio, 1 + high)) * advantage)


def slow_loss(variant, logp, old, advantage, mask, prompts, weights_of=None):
    """`weights_of`: log-probabilities for the weights of CISPO, which are constants."""
    tokens = [[t for t in range(T) if mask[n][t]] for n in range(N)]
    weights_of = weights_of or logp
    total = 0.0
    for n in range(N):
        ratios = {t: math.exp(logp[n][t] - old[n][t]) for t in tokens[n]}
        a = advantage[n]
        if variant == "reinforce":
            total += sum(a * logp[n][t] for t in tokens[n]) / sum(map(len, tokens))
        if variant == "dapo":
            total += sum(surrogate(r, a, 0.2, 0.28) for r in ratios.values()) / sum(map(len, tokens))
        if variant == "dr_grpo":
            total += sum(surrogate(r, a, 0.2, 0.2) for r in ratios.values()) / (N * MAX_TOKENS)
        if variant == "gspo":
            of_sequence = math.prod(ratios.values()) ** (1 / len(ratios))
            total += surrogate(of_sequence, a, 3e-4, 4e-4) / N
        if variant == "cispo":
            weights = {t: min(math.exp(weights_of[n][t] - old[n][t]), 5.0) for t in tokens[n]}
            siblings = sum(len(tokens[m]) for m in range(N) if prompts[m] == prompts[n])
            total += sum(weights[t] * a * logp[n][t] for t in tokens[n]) / siblings / P
    return -total


@every_variant
@pytest.mark.parametrize("drift", [0.0, 0.3, 2.0])
def test_loss_and_gradient_equal_those_of_the_slow_loops(variant, drift):
    if variant == "gspo":
        drift *= 1e-3  # its clips are that narrow
    tensors = batch(drift=drift)
    assert loss_of(variant, *tensors).item() == pytest.approx(
        slow_loss(variant, *(t.tolist() for t in tensors)), rel=1e-5
    )
    gradient = gradient_of(variant, *tensors).tolist()
    base, *rest = [t.tolist() for t in tensors]
    if drift == 0 and variant != "reinforce":
        return  # min() has a kink here, where finite differences are wrong; the next test covers it
    for n in range(N):
        for t in range(T):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [row[:] for row in base]
                moved[n][t] += step
                ends.append(slow_loss(variant, moved, *rest, weights_of=base))
            assert gradient[n][t] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-7)


# -- properties of all variants ---------------------------------------------------------------------------------------


def test_on_policy_all_variants_push_in_the_same_direction():
    logp_NT, _, advantages_N, _, prompts_N = batch()
    mask_NT = torch.ones(N, T)
    mask_NT[:, :2] = 0
    every = [gradient_of(v, logp_NT, logp_NT.detach(), advantages_N, mask_NT, prompts_N).flatten() for v in VARIANTS]
    assert all(torch.cosine_similarity(g, every[0], dim=0) > 1 - 1e-9 for g in every)


@every_variant
@pytest.mark.parametrize("drift", [0.0, 2.0])
def test_tokens_outside_the_mask_get_exactly_no_gradient_and_good_ones_become_more_likely(variant, drift):
    logp_NT, old_NT, advantages_N, mask_NT, prompts_N = batch(drift=drift)
    gradient_NT = gradient_of(variant, logp_NT, old_NT, advantages_N, mask_NT, prompts_N)
    assert (gradient_NT[mask_NT == 0] == 0).all()
    pull_NT = -gradient_NT * advantages_N[:, None]
    assert (pull_NT >= 0).all()
    assert (pull_NT > 0).any()
    assert drift or (pull_NT[mask_NT == 1] > 0).all(), "on-policy nothing is clipped"


@every_variant
@pytest.mark.parametrize("size", [1, 5, N])
def test_the_size_of_micro_batches_does_not_change_loss_or_gradient(variant, size):
    logp_NT, *rest, prompts_N = batch()
    denominators_N = denominators(rest[2], prompts_N, variant, MAX_TOKENS)
    parts = zip(*(t.split(size) for t in (logp_NT, *rest, denominators_N)))
    loss = sum(policy_loss(*part, variant) for part in parts)
    whole = loss_of(variant, logp_NT, *rest, prompts_N)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(torch.autograd.grad(loss, logp_NT), torch.autograd.grad(whole, logp_NT))


def test_cispo_on_policy_is_cross_entropy_weighted_with_advantages():
    logp_NT, _, advantages_N, mask_NT, prompts_N = batch()
    per_prompt = [
        (mask_NT * advantages_N[:, None] * logp_NT)[prompts_N == p].sum() / mask_NT[prompts_N == p].sum()
        for p in range(P)
    ]
    (expected_NT,) = torch.autograd.grad(-sum(per_prompt) / P, logp_NT)
    given_NT = gradient_of("cispo", logp_NT, logp_NT.detach(), advantages_N, mask_NT, prompts_N)
    torch.testing.assert_close(given_NT, expected_NT, rtol=1e-6, atol=1e-12)


@every_variant
def test_on_a_bandit_the_gradient_is_that_of_the_expected_reward(variant):
    """Ten rollouts that hit four arms exactly as often as expected: the estimate has no noise."""
    hits, rewards_A = torch.tensor([1, 2, 3, 4]), torch.tensor([1.0, 0.0, 0.5, 0.25], dtype=torch.double)
    logits_A = hits.double().log().requires_grad_()
    arms_N = torch.arange(4).repeat_interleave(hits)
    logp_NT = torch.log_softmax(logits_A, 0)[arms_N][:, None]
    centered_N = advantages(rewards_A[arms_N][None], "reinforce")[0]
    rest = (logp_NT.detach(), centered_N, torch.ones(10, 1), torch.zeros(10, dtype=torch.long))
    (gradient_A,) = torch.autograd.grad(loss_of(variant, logp_NT, *rest), logits_A)

    def expected_reward(logits_A):
        return torch.softmax(logits_A, 0) @ rewards_A

    step = 1e-5 * torch.eye(4, dtype=torch.double)
    slope_A = torch.stack([expected_reward(logits_A + e) - expected_reward(logits_A - e) for e in step]) / 2e-5
    if variant == "dr_grpo":
        slope_A = slope_A / MAX_TOKENS  # a constant, independent of the length of the rollouts
    torch.testing.assert_close(-gradient_A, slope_A.detach(), rtol=1e-6, atol=1e-9)


# -- clipping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant, ratio, advantage, pull",  # pull: the gradient's size as a multiple of the advantage
    [
        ("cispo", 0.01, 1, 0.01), ("cispo", 0.01, -1, 0.01),
        ("cispo", 4.9, 1, 4.9), ("cispo", 9, 1, 5), ("cispo", 9, -1, 5),
        ("dr_grpo", 1.19, 1, 1.19), ("dr_grpo", 1.21, 1, 0), ("dr_grpo", 1.21, -1, 1.21),
        ("dr_grpo", 0.81, -1, 0.81), ("dr_grpo", 0.79, -1, 0), ("dr_grpo", 0.79, 1, 0.79),
        ("dapo", 1.27, 1, 1.27), ("dapo", 1.29, 1, 0), ("dapo", 1.29, -1, 1.29),
        ("dapo", 0.81, -1, 0.81), ("dapo", 0.79, -1, 0), ("dapo", 0.79, 1, 0.79),
        ("gspo", 1.00039, 1, 1.00039), ("gspo", 1.00041, 1, 0), ("gspo", 1.00041, -1, 1.00041),
        ("gspo", 0.99971, -1, 0.99971), ("gspo", 0.99969, -1, 0), ("gspo", 0.99969, 1, 0.99969),
        ("reinforce", 100, 1, 1), ("reinforce", 0.01, -1, 1),
    ],
)  # fmt: skip
def test_clipping(variant, ratio, advantage, pull):
    old = torch.full((1, 1), -6.0, dtype=torch.double)
    logp = (old + math.log(ratio)).requires_grad_()
    loss = policy_loss(logp, old, torch.tensor([float(advantage)]), torch.ones(1, 1), torch.ones(1), variant)
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(-pull * advantage)


def test_gspo_clips_by_the_ratio_of_the_whole_rollout():
    """Extreme token ratios that cancel over the rollout do not clip it, and all its tokens have the same weight."""
    old = torch.full((1, 4), -3.0)
    logp = (old + torch.tensor([[2.0, -2.0, 1.0, -1.0]])).requires_grad_()
    rest = (torch.ones(1), torch.ones(1, 4), torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(gradient_of("gspo", logp, old, *rest), torch.full((1, 4), -0.25))
    assert gradient_of("dapo", logp, old, *rest)[0, 0] == 0


# -- denominators and advantages --------------------------------------------------------------------------------------


@FAST
@given(st.integers(0, 1000))
def test_denominators_make_a_mean_except_for_dr_grpo_where_they_are_constant(seed):
    *_, mask_NT, prompts_N = batch(seed)
    for variant in VARIANTS:
        denominators_N = denominators(mask_NT, prompts_N, variant, MAX_TOKENS)
        assert denominators_N.shape == (N,)
        if variant == "dr_grpo":
            assert (denominators_N == N * MAX_TOKENS).all()
        else:
            assert (mask_NT / denominators_N[:, None]).sum().item() == pytest.approx(1)


REWARDS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.95, 1.0])
GROUPS = st.integers(2, 17).flatmap(
    lambda G: st.lists(st.lists(REWARDS, min_size=G, max_size=G), min_size=1, max_size=5)
)


@FAST
@given(GROUPS, REWARDS)
def test_advantages_are_centered_shift_invariant_and_scaled_as_the_variant_says(groups, reward):
    rewards_PG = torch.tensor(groups)
    without_signal = torch.full((1, rewards_PG.size(1)), reward)
    flat_P = rewards_PG.amax(1) == rewards_PG.amin(1)
    for variant, v in VARIANTS.items():
        a_PG = advantages(rewards_PG, variant)
        assert (a_PG[flat_P] == 0).all(), "without a signal exactly 0"
        torch.testing.assert_close(a_PG.sum(1), torch.zeros(len(groups)), rtol=0, atol=1e-4)
        torch.testing.assert_close(advantages(rewards_PG + 3, variant), a_PG, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            advantages(2 * rewards_PG, variant), a_PG * (2 if v.advantage_std == "none" else 1), rtol=1e-4, atol=1e-4
        )
        more = advantages(torch.cat([rewards_PG, without_signal]), variant)
        torch.testing.assert_close(more, torch.cat([a_PG, torch.zeros_like(without_signal)]))
        square_PG = a_PG[~flat_P].square()
        if v.advantage_std == "batch" and len(square_PG):
            assert square_PG.mean().item() == pytest.approx(1, abs=1e-3)
        if v.advantage_std == "group":
            torch.testing.assert_close(square_PG.mean(1), torch.ones(len(square_PG)), rtol=0, atol=1e-3)


def test_only_the_std_of_the_group_favors_problems_that_are_almost_solved():
    """Why CISPO divides by the std of the batch here (Liu et al. 2025, section 3)."""
    rewards_PG = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
    push = {v: advantages(rewards_PG, v).abs().amax(1) for v in VARIANTS}
    for variant, push_P in push.items():
        ratio = push_P[0] / push_P[1]
        assert ratio > 2.5 if VARIANTS[variant].advantage_std == "group" else ratio == pytest.approx(1.75)


# -- a real model: the sampler stores the probabilities that the trainer computes -------------------------------------


def test_ratios_of_fresh_rollouts_are_one_and_micro_batches_do_not_change_the_gradient():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([toy_text(200)], 300)
    model = Ghost(GhostConfig(tokenizer.vocab_size, 64, depth=2, width=32, head_width=16, bigram_rows=64))
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)  # some matrices start as zeros, which would hide errors
    prompts = [
        render([{"role": "user", "content": c}], tokenizer, add_generation_prompt=True)[0]
        for c in ("king?", "The ghost")
    ]
    rows = generate(model, tokenizer, prompts, SamplingParams(max_tokens=8, temperature=1.0, seed=3), 4)
    rewards = [random.Random(i + 4 * p).random() for p in range(2) for i in range(4)]
    settings = RlSettings(max_tokens=8, rollouts=4)
    rollouts = Rollouts(
        rows, ["toy"] * 8, rewards, [sum(row.sampled_mask) for row in rows], [sum(row.logprobs) for row in rows]
    )
    advantages_N, denominators_N = compute_advantages(rollouts, settings)
    losses, gradients = [], []
    for micro_batch in (2, 1):
        model.zero_grad(set_to_none=True)
        result = accumulate_policy_gradients(model, rows, advantages_N, denominators_N, settings, micro_batch)
        assert result.figures["ratio_max"] == pytest.approx(1, abs=1e-3)
        assert abs(result.figures["sampler_kl"]) < 1e-5
        losses.append(result.loss)
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    assert any(g.abs().max() > 0 for g in gradients[0])
