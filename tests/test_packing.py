"""Packing: every lesson once an epoch, rows well filled, no conversation sees or predicts another."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.packing import TokenizedExample, PackedBatches, tokenize_conversations, pack
from tests.conftest import toy_text

FAST = settings(deadline=None, max_examples=30)
CONTEXT = 24


@cache
def toy() -> Tokenizer:
    return Tokenizer.train([toy_text(300)], 400)


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@FAST
@given(st.lists(st.integers(1, 50), max_size=120), st.integers(50, 80), st.integers(1, 40), st.randoms())
def test_every_lesson_once_and_no_row_too_long(lengths, capacity, open_rows, random):
    order = random.sample(range(len(lengths)), len(lengths))
    rows = pack(lengths, capacity, order, open_rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)


def test_rows_are_nine_tenths_full_or_more():
    random = np.random.default_rng(0)
    lengths = random.lognormal(4.2, 0.6, 3000).astype(int).clip(8, 256).tolist()  # a median of 67 tokens, a long tail
    rows = pack(lengths, 257, random.permutation(3000).tolist())
    assert sum(lengths) / (257 * len(rows)) > 0.9


# ── batches: token p of lesson n is 1000 (n + 1) + p, so that each number in a tensor tells where it is from ────────


def traceable(masks):
    return [TokenizedExample([1000 * (n + 1) + p for p in range(len(mask))], mask) for n, mask in enumerate(masks)]


MASKS = st.lists(st.booleans(), min_size=1, max_size=CONTEXT - 1).map(
    lambda m: [False, *(m if any(m) else m[:-1] + [True])]
)
LESSONS = st.lists(MASKS, min_size=1, max_size=25).map(traceable)


@FAST
@given(LESSONS, st.integers(0, 3))
def test_an_epoch_teaches_each_learned_token_once_from_the_token_before_it(lessons, seed):
    batches = PackedBatches(lessons, CONTEXT, rows=1, seed=seed)
    taught, step = [], 0
    while step == 0 or step < batches.starts[1]:
        inputs, targets, weights, segments = batches.at(step)
        assert inputs.shape == targets.shape == weights.shape == segments.shape == (1, CONTEXT)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        learned = weights > 0
        assert learned.any(), "a row without anything to learn"
        assert torch.equal(inputs[learned] + 1, targets[learned]), "a target in another conversation, or a first token"
        lesson = inputs // 1000
        assert torch.equal(segments == segments.T, lesson == lesson.T), "segments are conversations"
        assert torch.equal(segments == 0, inputs == 0), "segment 0 is padding"
        taught += targets[learned].tolist()
        step += 1
    assert sorted(taught) == [
        i for lesson in lessons for i, is_learned in zip(lesson.ids, lesson.loss_mask) if is_learned
    ]


@FAST
@given(LESSONS, st.integers(1, 6), st.integers(0, 5))
def test_every_learned_token_of_a_batch_counts_the_same(lessons, rows, step):
    _, _, weights, _ = PackedBatches(lessons, CONTEXT, rows, seed=0).at(step)
    positive = weights[weights > 0]
    assert positive.tolist() == pytest.approx([1 / len(positive)] * len(positive))


@FAST
@given(LESSONS, st.integers(1, 6), st.integers(0, 12), st.integers(1, 4))
def test_a_batch_depends_on_seed_and_step_only_not_on_ranks_or_history(lessons, rows, step, world):
    whole = PackedBatches(lessons, CONTEXT, rows, seed=1)
    for earlier in range(step):
        whole.at(earlier)
    tensors = whole.at(step)
    for rank in range(world):
        part = PackedBatches(lessons, CONTEXT, rows, 1, rank, world).at(step)
        assert all(torch.equal(some, every[rank::world]) for some, every in zip(part, tensors, strict=True))
    assert (tensors[2] > 0).any(1).all(), "a row without anything to learn"


def test_seeds_and_epochs_have_orders_of_their_own():
    lessons = traceable([[False, *[True] * (CONTEXT - 1)]] * 40)  # each fills a row
    a, b = (PackedBatches(lessons, CONTEXT, 40, seed) for seed in (0, 1))
    orders = [tuple(batches.at(epoch)[0][:, 0].tolist()) for batches in (a, b) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert len({frozenset(order) for order in orders}) == 1


# ── conversations that are too long ─────────────────────────────────────────────────────────────────────────────────


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SYSTEM = [{"role": "system", "content": "Be brief."}]


def length(messages):
    return len(render(messages, toy())[0])


def test_the_oldest_turns_go_first():
    turns = [turn(f"{i}?", f"{i}!") for i in range(6)]
    newest = SYSTEM + turns[4] + turns[5]
    lessons, left_out = tokenize_conversations([SYSTEM + sum(turns, [])], toy(), length(newest) + 3)
    assert (lessons[0].ids, lessons[0].loss_mask) == render(newest, toy())
    assert left_out == 0


def test_a_last_turn_too_long_is_cut_at_the_end_and_its_end_mark_not_learned():
    answer = "The king sees the sword. " * 20
    conversation = turn("x", "y") + turn("king?", answer)
    lessons, left_out = tokenize_conversations([conversation], toy(), 40)
    ids, learned = render(turn("king?", answer), toy())
    assert (lessons[0].ids, lessons[0].loss_mask, left_out) == (ids[:40], learned[:40], 0)
    taught = [i for i, is_learned in zip(lessons[0].ids, lessons[0].loss_mask) if is_learned]
    assert answer.startswith(toy().decode(taught, skip_special=False)), "the answer, and no end mark"


def test_without_an_answer_in_reach_it_is_left_out_and_counted():
    long_question = turn("king " * 50, "Yes.")
    unanswered = turn("a", "b")[:1]
    lessons, left_out = tokenize_conversations([long_question, turn("a", "b"), unanswered], toy(), 40)
    assert ([(lesson.ids, lesson.loss_mask) for lesson in lessons], left_out) == ([render(turn("a", "b"), toy())], 2)
    with pytest.raises(UserError, match="none of the 2 conversations .* 40 tokens"):
        tokenize_conversations([long_question, unanswered], toy(), 40)


SOME_TEXT = st.sampled_from(["", "a", "The king sees.", "sword " * 12, "night " * 60])
SOME_CONVERSATIONS = st.lists(
    st.lists(st.builds(turn, SOME_TEXT, SOME_TEXT), min_size=1, max_size=4).map(lambda turns: sum(turns, [])),
    min_size=1,
    max_size=12,
)


@FAST
@given(SOME_CONVERSATIONS, st.integers(16, 100))
def test_whatever_the_conversations_every_row_has_something_to_learn(conversations, context):
    teachable = [any(render(c[-2:], toy())[1][:context]) for c in conversations]  # at least by their last turn
    if not any(teachable):
        with pytest.raises(UserError):
            tokenize_conversations(conversations, toy(), context)
        return
    lessons, left_out = tokenize_conversations(conversations, toy(), context)
    assert (len(lessons), left_out) == (sum(teachable), len(conversations) - sum(teachable))
    batches = PackedBatches(lessons, context, 3, 0)
    for step in range(4):
        _, _, weights, _ = batches.at(step)
        assert (weights > 0).any(1).all() and weights.sum().item() == pytest.approx(1)
