"""Sampling: temperature, top-k, top-p and draws."""

import pytest
import torch

from nanoghost.engine.sampler import SamplingParams, distribution, draw, uniform


@pytest.fixture
def logits():
    return torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 2


def test_temperature_divides_the_logits(logits):
    assert torch.allclose(distribution(logits, SamplingParams(temperature=1.0)), torch.softmax(logits, 1))
    assert torch.allclose(distribution(logits, SamplingParams(temperature=0.5)), torch.softmax(logits * 2, 1))


def test_temperature_0_is_greedy(logits):
    greedy = distribution(logits, SamplingParams(temperature=0))
    assert (greedy.argmax(1) == logits.argmax(1)).all()
    assert (greedy.max(1).values == 1).all()


def test_top_k_keeps_k_tokens(logits):
    probs = distribution(logits, SamplingParams(temperature=1.0, top_k=5))
    assert ((probs > 0).sum(1) == 5).all()


def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits):
    probs = distribution(logits, SamplingParams(temperature=1.0, top_p=0.7))
    for in_nucleus, p in zip(probs > 0, torch.softmax(logits, 1)):
        nucleus = p[in_nucleus]
        assert nucleus.sum() >= 0.7
        assert nucleus.sum() - nucleus.min() < 0.7
    assert torch.allclose(probs.sum(1), torch.ones(50))


def test_draws_follow_the_distribution():
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).expand(20000, 4)
    ids, logprobs = draw(probs, [uniform(0, 7, i) for i in range(20000)])
    frequencies = torch.bincount(torch.tensor(ids), minlength=4) / 20000
    assert torch.allclose(frequencies, probs[0], atol=0.015)
    assert frequencies[1] == 0
    assert logprobs[0] == pytest.approx(float(probs[0, ids[0]].log()))
