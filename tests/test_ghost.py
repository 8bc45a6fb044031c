"""What only a ghost has: copy heads, character features, embedding-row dropout."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from nanoghost.model.character_features import (
    END_OF_WORD,
    NO_FEATURE,
    NUM_CHARACTERS,
    POSITIONS_PER_END,
    byte_class,
    character_table,
    letters_written,
    word_features,
    words_so_far,
)
from nanoghost.model.copy_heads import BACK, CHARACTER, COPY, FRONT
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toy_models import GHOST, V, untrained_model
from tests.support.toys import toy_text

OPEN = 50.0  # logit of a gate that takes all probability


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([toy_text(200)], V)


@pytest.fixture
def model():
    return untrained_model(GHOST).requires_grad_(False)


# ── copy heads ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_copy_head_predicts_only_tokens_of_the_same_conversation(model):
    model.copy_heads.gates.bias[COPY] = OPEN
    row = torch.tensor([[5, 6, 7, 20, 21, 22]])
    probs = model(row, segments_BT=torch.tensor([[1, 1, 1, 2, 2, 2]])).exp()
    for t in range(6):
        start = 3 * (t // 3)
        assert_close(probs[0, t, row[0, start : t + 1]].sum(), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_untrained_copy_head_predicts_what_followed_the_same_token(model):
    model.copy_heads.gates.bias[COPY] = OPEN
    probs = model(torch.tensor([[9, 30, 10, 11, 9]])).exp()[0, -1]
    assert probs[30] > 2 * probs[[10, 11]].max()


def test_copy_head_never_copies_a_special_token(tokenizer, model):
    """A model could learn to end its answer by copying the end of the question, which then fails in some answers."""
    model.set_character_features(tokenizer)
    model.copy_heads.gates.bias[COPY] = OPEN
    end = tokenizer.special_id("<|im_end|>")
    ids = [*tokenizer.encode("t-o the"), end, *tokenizer.encode("owl"), end, *tokenizer.encode("the")]
    probs = model(torch.tensor([ids])).exp()[0, -1]
    assert probs[end] < 1e-6
    assert_close(probs[[*{*ids} - {end}]].sum(), torch.tensor(1.0), rtol=1e-4, atol=0)
    assert probs[tokenizer.encode("-")].sum() > 0  # it has no characters, and is text


@pytest.mark.parametrize(
    "text, direction, expected",
    [
        ("king,", FRONT, "k"),
        ("king,", BACK, "g"),
        ("king: k-i", FRONT, "n"),
        ("king: g-n", BACK, "i"),
        ("k-i-n-g ", FRONT, "k"),
        ("k-i-n-g is k", FRONT, "is"),  # the second characters of both words
        ("unkinglikeness: u-n-k-i-n-g-l-i-k-e-n-e", FRONT, "s"),  # beyond the character features
        ("unkinglikeness: s-s-e-n-e-k-i-l-g-n-i-k-n", BACK, "u"),
        ("on, king: o", FRONT, "ni"),
    ],
)
def test_character_copy_head_reads_the_next_character_of_a_word(text, direction, expected):
    tokenizer = Tokenizer.train([toy_text()], V)
    model = model_that_spells(tokenizer, direction)
    probs = model(torch.tensor([tokenizer.encode(text)])).exp()[0, -1]
    expected_tokens = {tokenizer.encode(character)[0] for character in expected}
    assert {*probs.topk(len(expected)).indices.tolist()} == expected_tokens
    assert probs[[*expected_tokens]].sum() > 0.1  # one token of the vocabulary has 1 / 300


@pytest.mark.parametrize("text", ["king", "o: k", "king: k-i-n-g"])
def test_probability_of_a_missing_character_goes_to_the_vocabulary(text):
    """A word that has not ended, a word of one character, and a word that is written to its end."""
    tokenizer = Tokenizer.train([toy_text()], V)
    model = model_that_spells(tokenizer, FRONT)
    assert model(torch.tensor([tokenizer.encode(text)])).exp()[0, -1].max() < 0.5


def test_the_output_layer_is_told_that_a_word_is_written_to_its_end():
    tokenizer = Tokenizer.train([toy_text()], V)
    model = model_that_spells(tokenizer, FRONT)
    period = tokenizer.encode(".")[0]
    model.head.weight[period] = 1.0
    model.copy_heads.end_of_word.fill_(1.0)
    for text, is_end in (("king: k-i-n", False), ("king: k-i-n-g", True), ("king k-i-n-g", True)):
        probs = model(torch.tensor([tokenizer.encode(text)])).exp()[0, -1]
        assert (probs[period] > 0.9) == is_end, text


def model_that_spells(tokenizer, direction: int):
    model = untrained_model(replace(GHOST, context=48)).requires_grad_(False)
    model.set_character_features(tokenizer)
    model.copy_heads.gates.bias[CHARACTER] = OPEN
    model.copy_heads.gates.bias[2 + direction] = OPEN
    return model


# ── character features ────────────────────────────────────────────────────────────────────────────────────────────────


def test_character_features_are_those_of_a_loop_over_bytes(tokenizer):
    """Words of several tokens have the features of words that are one token."""
    text = "The unkind owl\nsaid t-o o-w-l: 1066, 30+4 naïve owls' heads; wards sdraw  xyzzyx."
    ids = tokenizer.encode(text)
    slots = torch.arange(len(ids))[None]
    words = words_so_far(character_table(tokenizer), torch.tensor([ids]), slots - 1, slots)
    features = word_features(words)[0].tolist()
    assert max(len(tokenizer.token_bytes(token)) for token in ids) > 2, "some tokens have several characters"
    word, last_class = b"", 0
    for token, row in zip(ids, features):
        token_text = tokenizer.token_bytes(token)
        if token_text == b"-":  # joins, and is not part of the word
            last_class = byte_class(ord("a"))
            continue
        characters = token_text.lstrip(b" ") or token_text
        continues = byte_class(token_text[0]) and byte_class(token_text[0]) == last_class
        word = word + characters if continues else characters
        last_class = byte_class(token_text[-1])
        for half, spelled in ((row[:POSITIONS_PER_END], word), (row[POSITIONS_PER_END:], word[::-1])):
            found = [feature % NUM_CHARACTERS for feature in half if feature != NO_FEATURE]
            assert found == [*spelled, END_OF_WORD][:POSITIONS_PER_END]
        assert all(feature // NUM_CHARACTERS == p for p, feature in enumerate(row) if feature != NO_FEATURE)


@pytest.mark.parametrize(
    "text, count",
    [
        ("the k-i-n", 3),
        ("the k1-i2-n3", 3),  # numbers between letters do not count
        ("the a1-b2-c3-d4-e5-f6-g7-h8-i9-j10-k11-l12-m13-n14-o15-p16", 16),
        ("the king", 4),
        ("the king: ", 0),
        ("1066", 0),
        ("x" * 60, 60),
    ],
)
def test_letters_are_counted_from_the_last_blank_or_mark(tokenizer, text, count):
    ids = torch.tensor([tokenizer.encode(text)])
    slots = torch.arange(ids.size(1))[None]
    assert letters_written(character_table(tokenizer), ids, slots - 1)[0, -1] == count


# ── embedding-row dropout ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dropout_model(model):
    model.bigram_embedding.weight.normal_()
    return model


def logprobs(model):
    tokens = torch.randint(V, (4, 24), generator=torch.Generator().manual_seed(0))
    return model.logprobs(tokens[:, :-1], tokens[:, 1:])


def test_embedding_row_dropout_keeps_the_expectation(dropout_model):
    model, rows = dropout_model, torch.randint(101, (4, 24))
    without = model.look_up(model.bigram_embedding, "bigram", rows)
    ratios = []
    for seed in range(2000):
        model.set_embedding_row_dropout(4.0, seed)
        ratios.append(model.look_up(model.bigram_embedding, "bigram", rows) / without)
    ratios = torch.stack(ratios)
    assert set(ratios.round().unique().tolist()) == {0.0, 4.0}
    assert_close(ratios.mean(0), torch.ones_like(without), atol=0.25, rtol=0)


def test_embedding_row_dropout_depends_on_the_seed_alone(dropout_model):
    dropout_model.set_embedding_row_dropout(4.0, 1999)
    first = logprobs(dropout_model)
    dropout_model.set_embedding_row_dropout(4.0, 2000)
    assert not torch.equal(logprobs(dropout_model), first)
    dropout_model.set_embedding_row_dropout(4.0, 1999)
    assert torch.equal(logprobs(dropout_model), first)


def test_embedding_row_dropout_acts_in_training_only(dropout_model):
    without = logprobs(dropout_model)
    dropout_model.set_embedding_row_dropout(4.0, 1999)
    assert not torch.equal(logprobs(dropout_model), without)
    with torch.no_grad():
        assert_close(logprobs(dropout_model), without, rtol=1e-4, atol=1e-4)


def test_one_epoch_turns_embedding_row_dropout_off(dropout_model):
    without = logprobs(dropout_model)
    dropout_model.set_embedding_row_dropout(4.0, 1999)
    dropout_model.set_embedding_row_dropout(1.0, 0)
    assert torch.equal(logprobs(dropout_model), without)


def test_tables_of_the_same_length_have_dropout_masks_of_their_own():
    """Masks used to be keyed by the length of a table, so a vocabulary of as many tokens as there are bigram rows
    shared one."""
    model = untrained_model(replace(GHOST, bigram_rows=V))
    model.set_embedding_row_dropout(4.0, 0)
    assert model.dropout_scales["bigram"].shape == model.dropout_scales["value"].shape
    assert not torch.equal(model.dropout_scales["bigram"], model.dropout_scales["value"])
