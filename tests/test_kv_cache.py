"""A forward pass with a cache equals one over the whole text, whatever the chunks, the padding and the order of the
rows."""

import pytest
import torch
from torch.testing import assert_close

from tests.support.toy_models import CONFIGS, random_tokens, trained_model

LENGTHS = (7, 2, 4)  # of three prompts
NEW_TOKENS = 4
CAPACITY = 11  # the longest sequence fills the cache to its last slot


@pytest.fixture(params=CONFIGS)
def model(request):
    return trained_model(CONFIGS[request.param])


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 4, 3], [11, 1], [12]], ids=str)
def test_reading_in_chunks_equals_reading_at_once(model, chunks):
    x_BT = random_tokens(3, 12)
    cache = model.new_cache(3, 20)
    scores = torch.cat([model(x, cache) for x in x_BT.split(chunks, 1)], 1)
    assert_close(scores, model(x_BT), rtol=1e-4, atol=1e-5)
    assert cache.next_index_B.tolist() == [12] * 3


@pytest.mark.parametrize("cached", [False, True])
def test_last_B_selects_the_scores_of_one_position_in_each_row(model, cached):
    x_BT, last_B = random_tokens(2, 7), torch.tensor([6, 3])
    cache = model.new_cache(2, 7) if cached else None
    expected = model(x_BT)[[0, 1], last_B, None]
    assert_close(model(x_BT, cache, last_B=last_B), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def sequences():
    return [random_tokens(1, length + NEW_TOKENS) for length in LENGTHS]


@pytest.fixture
def filled(model, sequences):
    """(cache, scores (3, NEW_TOKENS, V)): prompts are read into rows 2, 0, 3, padded on the right; then copied to 0, 1,
    2 and continued token by token."""
    padded = torch.full((3, max(LENGTHS)), 17)  # an ordinary token, since the padding must not matter
    for row, (sequence, length) in enumerate(zip(sequences, LENGTHS)):
        padded[row, :length] = sequence[0, :length]
    lengths_B = torch.tensor(LENGTHS)
    cache = model.new_cache(4, CAPACITY)
    cache.select([2, 0, 3], torch.zeros(3, dtype=torch.long))
    scores = [model(padded, cache, last_B=lengths_B - 1)[:, 0]]
    cache.copy_rows([2, 0, 3], [0, 1, 2], max(LENGTHS))
    for t in range(NEW_TOKENS - 1):
        cache.select(None, lengths_B + t)
        next_tokens = [s[:, length + t : length + t + 1] for s, length in zip(sequences, LENGTHS)]
        scores.append(model(torch.cat(next_tokens), cache)[:, 0])
    return cache, torch.stack(scores, 1)


def test_sequences_of_different_lengths_have_the_scores_of_separate_ones(model, sequences, filled):
    _, scores = filled
    for row, (sequence, length) in enumerate(zip(sequences, LENGTHS)):
        expected = model(sequence)[0, length - 1 : length + NEW_TOKENS - 1]
        assert_close(scores[row], expected, rtol=1e-4, atol=1e-5)


def test_one_row_continues_while_the_others_wait(model, sequences, filled):
    cache, _ = filled
    cache.select([1], torch.tensor([LENGTHS[1] + NEW_TOKENS - 1]))
    assert_close(model(sequences[1][:, -1:], cache)[0, 0], model(sequences[1])[0, -1], rtol=1e-4, atol=1e-5)


def test_one_row_starts_again_while_another_is_padded_beyond_the_end(model, sequences, filled):
    cache, _ = filled
    cache.select([1, 0], torch.tensor([0, 9]))
    both = model(torch.cat([sequences[1][:, :5], sequences[0][:, [9, 10, 0, 0, 0]]]), cache)
    assert_close(both[0], model(sequences[1])[0, :5], rtol=1e-4, atol=1e-5)
    assert_close(both[1, :2], model(sequences[0])[0, 9:], rtol=1e-4, atol=1e-5)
