"""Kneser-Ney compared with a slow version, confidence intervals with tables, bits per byte with arithmetic."""

import math
import random
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.evals.task_accuracy import wilson_interval
from tests.support.toys import toy_text

FAST = settings(deadline=None, max_examples=60)
SEPARATOR = 256  # stands before each text


# -- Kneser-Ney: the slow version, with dictionaries and one recursion -------------------------------------------------


def symbols(texts):
    return [s for text in texts for s in (SEPARATOR, *text.encode())]


class SlowKneserNey:
    """Interpolated, modified Kneser-Ney (Chen and Goodman 1999, section 3)."""

    def __init__(self, texts, order):
        stream = [SEPARATOR] * order + symbols(texts)
        ends = range(order, len(stream))
        self.counts = {}  # length of the n-gram -> context -> Counter of what followed
        for n in range(1, order + 1):
            self.counts[n] = defaultdict(Counter)
            if n == order:
                grams = [tuple(stream[i - n + 1 : i + 1]) for i in ends]
            else:  # continuation counts: the number of different symbols before it
                grams = [gram[1:] for gram in {tuple(stream[i - n : i + 1]) for i in ends}]
            for gram in grams:
                self.counts[n][gram[:-1]][gram[-1]] += 1
        self.discounts = {n: self.estimate(n) for n in self.counts}

    def estimate(self, n):
        how_many = Counter(c for followers in self.counts[n].values() for c in followers.values())
        n1, n2, n3, n4 = (how_many[i] for i in (1, 2, 3, 4))
        steps = [0.5, 0.75, 0.9]
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            estimated = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            steps = estimated if min(estimated) > 0 else steps
        return steps

    def discount(self, n, count):
        return self.discounts[n][min(count, 3) - 1]

    def probability(self, context, symbol, n):
        """Probability of the symbol after the context, from n-grams of up to n symbols."""
        if n == 0:
            return 0 if symbol == SEPARATOR else 1 / 256
        shorter = self.probability(context, symbol, n - 1)
        followers = self.counts[n].get(tuple(context[len(context) - n + 1 :]))
        if not followers:
            return shorter
        discounted = followers[symbol] - self.discount(n, followers[symbol]) if followers[symbol] else 0
        back_off = sum(self.discount(n, count) for count in followers.values())
        return (discounted + back_off * shorter) / followers.total()


def slow_bpb(train, test, order):
    model, stream = SlowKneserNey(train, order), [SEPARATOR] * order + symbols(test)
    bits = [
        -math.log2(model.probability(stream[i - order : i], stream[i], order))
        for i in range(order, len(stream))
        if stream[i] != SEPARATOR
    ]
    return sum(bits) / len(bits)


TEXTS = st.text("ab c\né", max_size=25)
REPEATED = " bdcdb  bbcdd dcabbcbabdaddaac dadbb adcdacbdaabab bbabdda" * 4


@FAST
@given(
    st.lists(st.builds(str.__mul__, TEXTS, st.integers(1, 4)), min_size=1, max_size=3),
    st.lists(TEXTS, max_size=2),
    st.text(min_size=1, max_size=8),
    st.integers(1, 5),
)
@example([REPEATED, REPEATED[::-1]], [], "adcdcbdbdabcaeda abebdddaebbbc", 5)  # the estimate of a discount is below 0
@example(["abcabd" * 3, "abra cadabra\n" * 2, "bcd"], [], "abracad", 3)
def test_kneser_ney_equals_the_slow_version(train, test, last, order):
    bpb = kneser_ney_bpb(train, [*test, last], order)
    assert math.isfinite(bpb) and bpb > 0
    assert bpb == pytest.approx(slow_bpb(train, [*test, last], order), rel=1e-9)


def test_probabilities_of_the_next_symbol_sum_to_one():
    texts = [toy_text(20), "été", REPEATED]
    model, stream = SlowKneserNey(texts, 4), symbols(texts)
    rng = random.Random(0)
    seen = [stream[i : i + 4] for i in rng.sample(range(len(stream) - 4), 6)]
    for context in [*seen, [1, 2, 3, 4], [SEPARATOR] * 4, [*b"ings"]]:
        assert sum(model.probability(context, s, 4) for s in range(257)) == pytest.approx(1, abs=1e-12)


def test_longer_ngrams_help_on_repetitive_text():
    train, test = toy_text(300, seed=0), toy_text(50, seed=1)
    bpb = [kneser_ney_bpb([train], [test], order) for order in (1, 2, 3, 4, 5)]
    assert bpb == sorted(bpb, reverse=True)
    assert bpb[0] > 4 and bpb[-1] < 0.8


# -- confidence intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solved, count, low, high",
    [
        (0, 10, 0, 0.2775),
        (10, 10, 0.7225, 1),
        (5, 10, 0.2366, 0.7634),
        (8, 10, 0.4902, 0.9433),
        (1, 1000, 0.0002, 0.0056),
    ],
)
def test_wilson_known_values(solved, count, low, high):
    assert wilson_interval(solved, count) == pytest.approx((low, high), abs=6e-5)


@FAST
@given(st.integers(1, 5000).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilson_interval_is_symmetric_and_narrows_with_the_count(pair):
    """Its bounds are the proportions from which the measured one is 1.96 standard deviations away."""
    solved, count = pair
    low, high = wilson_interval(solved, count)
    assert 0 <= low <= solved / count + 1e-12 and solved / count - 1e-12 <= high <= 1
    for bound in (low, high):
        assert (solved / count - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / count, abs=1e-12)
    assert wilson_interval(count - solved, count) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    narrower = wilson_interval(4 * solved, 4 * count)
    assert narrower[1] - narrower[0] < high - low


# -- bits per byte -----------------------------------------------------------------------------------------------------


class Uniform(nn.Module):
    """A model for which each of V tokens is equally likely."""

    def __init__(self, V):
        super().__init__()
        self.V = V

    def logprobs(self, inputs_BT, targets_BT):
        return torch.full(targets_BT.shape, -math.log(self.V), dtype=torch.double)


class ScoreIsTokenId(nn.Module):
    """The score of a token is its id, so that the total shows which targets were scored, and how often."""

    def logprobs(self, inputs_BT, targets_BT):
        assert torch.equal(inputs_BT + 1, targets_BT)
        return -targets_BT.double()


@FAST
@given(st.integers(2, 200), st.integers(1, 40), st.integers(2, 5000), st.integers(1, 999))
def test_bits_per_byte_score_each_token_but_the_first_once(count, context, V, text_bytes):
    tokens = torch.arange(count).numpy()
    uniform = bits_per_byte(Uniform(V), tokens, context, text_bytes)
    assert uniform == pytest.approx((count - 1) * math.log2(V) / text_bytes, rel=1e-12)
    each_once = bits_per_byte(ScoreIsTokenId(), tokens, context, text_bytes) * math.log(2) * text_bytes
    assert each_once == pytest.approx(sum(range(1, count)), rel=1e-12)
