"""Batches and windows: their order is a pure function, and every token is used."""

import time

import numpy as np
import pytest
import torch

from nanoghost.data.batches import Batches, windows
from nanoghost.data.mixed_batches import MixedBatches
from nanoghost.errors import UserError

TOKENS = np.arange(1003, dtype=np.uint16)


def test_targets_are_one_ahead():
    inputs, targets = Batches(TOKENS, context=16, rows=4, seed=0).at(0)
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(inputs[:, 0], torch.from_numpy(Batches(TOKENS, 16, 4, 0).row_starts(0)))


def test_batches_are_a_pure_function_of_seed_and_step():
    forward, backward = Batches(TOKENS, 16, 4, seed=3), Batches(TOKENS, 16, 4, seed=3)
    ahead = [forward.at(step)[0] for step in range(50)]
    back = [backward.at(step)[0] for step in reversed(range(50))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(ahead, back))
    assert not torch.equal(Batches(TOKENS, 16, 4, seed=4).at(0)[0], ahead[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_number_of_ranks_does_not_change_the_batch(world_size):
    whole = Batches(TOKENS, 16, 8, seed=1)
    ranks = [Batches(TOKENS, 16, 8, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(20):  # epochs end in the middle of a batch
        parts = torch.empty(8, 16, dtype=torch.int64)
        for rank, batches in enumerate(ranks):
            parts[rank::world_size] = batches.at(step)[0]
        assert torch.equal(parts, whole.at(step)[0])


def test_epochs_in_a_number_of_steps():
    batches = Batches(TOKENS, context=16, rows=4, seed=0)
    for epoch in (1, 2, 5):
        steps = round(epoch * batches.rows_per_epoch / 4)
        seen = np.concatenate([batches.row_starts(step) // 16 for step in range(steps)])
        assert batches.epochs_in(steps) == pytest.approx(epoch, abs=0.05)
        assert np.bincount(seen)[1:-1].mean() == pytest.approx(epoch, abs=0.1)
    parts = [{"tokens": 200, "weight": 1.0}, {"tokens": 803, "weight": 1.0}]
    mixed = MixedBatches(TOKENS, parts, 16, 4, 0)
    rows = np.array([part.rows_per_epoch for part in mixed.sources])
    assert mixed.epochs_in(100) == pytest.approx(np.mean(200 / rows)), "half of the rows are from the short text"


def test_an_epoch_visits_each_window_once():
    batches = Batches(TOKENS, context=16, rows=1, seed=0)
    n = batches.rows_per_epoch
    epochs = [np.array([batches.row_starts(step)[0] for step in range(e * n, (e + 1) * n)]) for e in range(40)]
    for starts in epochs:
        assert np.array_equal(np.sort(starts), starts.min() + 16 * np.arange(n))
        assert starts.max() + 16 < len(TOKENS)
    assert len({starts.min() for starts in epochs}) > 10  # each epoch from another offset
    assert not np.array_equal(epochs[0] - epochs[0].min(), epochs[1] - epochs[1].min())


@pytest.mark.parametrize("length", range(17, 70))
def test_every_token_can_be_reached(length):
    """Also the first and the last token of a very short text are used."""
    batches = Batches(TOKENS[:length], context=16, rows=64, seed=0)
    inputs, targets = (torch.cat(x) for x in zip(*(batches.at(step) for step in range(12))))
    assert set(inputs.unique().tolist()) == set(range(length - 1))
    assert set(targets.unique().tolist()) == set(range(1, length))


def test_a_text_that_is_too_short_is_reported():
    with pytest.raises(UserError, match="has 16 tokens, too few for one row of 16 .* smaller --context"):
        Batches(TOKENS[:16], context=16, rows=1, seed=0)


def test_a_batch_takes_less_than_a_millisecond():
    batches = Batches(np.zeros(2_000_000, np.uint16), context=256, rows=16, seed=0)
    batches.at(0)
    seconds = []
    for step in range(1, 50):
        begin = time.perf_counter()
        batches.at(step)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3  # the minimum: the machine may be busy


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 500, 1003])
def test_windows_predict_each_token_once(length):
    batches = list(windows(TOKENS[:length], context=16, rows=4))
    assert torch.equal(torch.cat([targets.flatten() for _, targets in batches]), torch.arange(1, length))
    for inputs, targets in batches:
        assert inputs.shape == targets.shape
        assert inputs.shape[0] <= 4
        assert inputs.shape[1] <= 16
        assert torch.equal(inputs + 1, targets)


def test_windows_need_two_tokens():
    with pytest.raises(UserError, match="too few to score"):
        next(windows(TOKENS[:1], context=16))
