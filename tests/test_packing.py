"""Packing: every example once an epoch, rows well filled, no example sees or predicts another."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.data.conversations import FileConversation
from nanoghost.errors import UserError
from nanoghost.progress import Display
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.packing import (
    Omissions,
    PackedBatches,
    TokenizedExample,
    pack,
    report_omissions,
    tokenize_conversations,
)
from tests.support.toys import toy_text

FAST = settings(deadline=None, max_examples=30)
CONTEXT = 24


@cache
def toy() -> Tokenizer:
    return Tokenizer.train([toy_text(300)], 400)


# -- rows -----------------------------------------------------------------------------------------------------------


@FAST
@given(st.lists(st.integers(1, 50), max_size=120), st.integers(50, 80), st.integers(1, 40), st.randoms())
def test_pack_uses_every_example_once_and_no_row_exceeds_the_capacity(lengths, capacity, open_rows, random):
    order = random.sample(range(len(lengths)), len(lengths))
    rows = pack(lengths, capacity, order, open_rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)


def test_rows_are_at_least_nine_tenths_full():
    random = np.random.default_rng(0)
    lengths = random.lognormal(4.2, 0.6, 3000).astype(int).clip(8, 256).tolist()  # median 67, long tail
    rows = pack(lengths, 257, random.permutation(3000).tolist())
    assert sum(lengths) / (257 * len(rows)) > 0.9


# -- batches: token p of example n is 1000 (n + 1) + p, so that each number tells where it is from -------------------


def traceable(masks) -> list[TokenizedExample]:
    return [TokenizedExample([1000 * (n + 1) + p for p in range(len(mask))], mask) for n, mask in enumerate(masks)]


MASKS = st.lists(st.booleans(), min_size=1, max_size=CONTEXT - 1).map(
    lambda m: [False, *(m if any(m) else m[:-1] + [True])]
)
EXAMPLES = st.lists(MASKS, min_size=1, max_size=25).map(traceable)


@FAST
@given(EXAMPLES, st.integers(0, 3))
def test_an_epoch_has_each_token_in_the_loss_once_and_predicts_it_from_the_token_before(examples, seed):
    batches = PackedBatches(examples, CONTEXT, rows=1, seed=seed)
    in_loss_of_epoch, step = [], 0
    while step == 0 or step < batches.first_rows[1]:
        inputs, targets, weights, segments = batches.at(step)
        assert inputs.shape == targets.shape == weights.shape == segments.shape == (1, CONTEXT)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        in_loss = weights > 0
        assert in_loss.any(), "a row without a token in the loss"
        assert torch.equal(inputs[in_loss] + 1, targets[in_loss]), "a target in another example, or a first token"
        example = inputs // 1000
        assert torch.equal(segments == segments.T, example == example.T), "segments are examples"
        assert torch.equal(segments == 0, inputs == 0), "segment 0 is padding"
        in_loss_of_epoch += targets[in_loss].tolist()
        step += 1
    expected = [i for example in examples for i, in_loss in zip(example.ids, example.loss_mask) if in_loss]
    assert sorted(in_loss_of_epoch) == expected


@FAST
@given(EXAMPLES, st.integers(1, 6), st.integers(0, 5))
def test_all_tokens_in_the_loss_of_a_batch_have_the_same_weight(examples, rows, step):
    _, _, weights, _ = PackedBatches(examples, CONTEXT, rows, seed=0).at(step)
    positive = weights[weights > 0]
    assert positive.tolist() == pytest.approx([1 / len(positive)] * len(positive))


@FAST
@given(EXAMPLES, st.integers(1, 6), st.integers(0, 12), st.integers(1, 4))
def test_a_batch_depends_only_on_seed_and_step_not_on_ranks_or_history(examples, rows, step, world_size):
    whole = PackedBatches(examples, CONTEXT, rows, seed=1)
    for earlier in range(step):
        whole.at(earlier)
    tensors = whole.at(step)
    for rank in range(world_size):
        part = PackedBatches(examples, CONTEXT, rows, 1, rank, world_size).at(step)
        for local, every in zip(part, tensors, strict=True):
            assert torch.equal(local, every[rank::world_size])
    weights = tensors[2]
    assert (weights > 0).any(1).all(), "a row without a token in the loss"


def test_each_seed_and_each_epoch_has_another_order():
    examples = traceable([[False, *[True] * (CONTEXT - 1)]] * 40)  # each fills a row
    a, b = (PackedBatches(examples, CONTEXT, 40, seed) for seed in (0, 1))
    orders = [tuple(batches.at(epoch)[0][:, 0].tolist()) for batches in (a, b) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert len({frozenset(order) for order in orders}) == 1


# -- conversations that are too long ----------------------------------------------------------------------------------


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


SYSTEM = [{"role": "system", "content": "Be brief."}]


def length(messages):
    return len(render(messages, toy())[0])


def test_the_oldest_turns_are_dropped_first():
    turns = [turn(f"{i}?", f"{i}!") for i in range(6)]
    newest = SYSTEM + turns[4] + turns[5]
    (example,), omissions = tokenize_conversations([SYSTEM + sum(turns, [])], toy(), length(newest) + 3)
    assert (example.ids, example.loss_mask) == render(newest, toy())
    assert omissions == Omissions(without_oldest=["a built-in conversation"])


def test_a_last_turn_that_is_too_long_is_cut_and_its_stop_token_is_not_learned():
    answer = "The king sees the sword. " * 20
    conversation = turn("x", "y") + turn("king?", answer)
    (example,), omissions = tokenize_conversations([conversation], toy(), 40)
    ids, loss_mask = render(turn("king?", answer), toy())
    assert (example.ids, example.loss_mask) == (ids[:40], loss_mask[:40])
    assert omissions == Omissions(cut=["a built-in conversation"])
    in_loss = [i for i, in_loss in zip(example.ids, example.loss_mask) if in_loss]
    assert answer.startswith(toy().decode(in_loss, skip_special=False)), "the answer, without a stop token"


def test_conversations_without_an_answer_within_the_context_are_dropped_and_counted():
    long_question = turn("king " * 50, "Yes.")
    unanswered = turn("a", "b")[:1]
    (example,), omissions = tokenize_conversations([long_question, turn("a", "b"), unanswered], toy(), 40)
    assert (example.ids, example.loss_mask) == render(turn("a", "b"), toy())
    assert omissions.dropped == [
        "a built-in conversation: no answer within a context of 40 tokens",
        "a built-in conversation: it has no assistant message",
    ]
    with pytest.raises(UserError, match="none of the 2 conversations .* 40 tokens"):
        tokenize_conversations([long_question, unanswered], toy(), 40)


def test_what_the_context_does_not_hold_is_counted_and_the_first_is_named(capsys):
    king = "king " * 50
    long_question, long_answer = turn(king, "Yes."), turn("a", king)
    texts = [long_question, long_answer, turn("a", king) + turn("a", "b"), turn("a", "b"), long_answer]
    conversations = [FileConversation(messages, f"x.jsonl:{line}") for line, messages in enumerate(texts, 1)]
    _, omissions = tokenize_conversations(conversations, toy(), 40)
    report_omissions(omissions, len(conversations), 40, Display())
    assert capsys.readouterr().err.splitlines() == [
        "1 of 5 conversations are left out:",
        "  x.jsonl:1: no answer within a context of 40 tokens",
        "1 of 5 conversations lose their oldest turns, which the context of 40 tokens does not hold"
        " (the first: x.jsonl:3)",
        "2 of 5 conversations lose the end of their last turn, which the context of 40 tokens does not hold"
        " (the first: x.jsonl:2)",
    ]
    _, omissions = tokenize_conversations(conversations[3:4], toy(), length(texts[3]))
    assert omissions == Omissions()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_that_the_chat_format_does_not_write_is_counted(capsys, key):
    question, answer = turn("a", "b")
    conversations = [turn("a", "b"), [question, answer | {key: ""}], [question, answer | {key: "Hm."}]]
    examples, omissions = tokenize_conversations(conversations, toy(), 40)
    assert examples[0] == examples[2]
    assert omissions == Omissions(without_reasoning=["a built-in conversation"])
    report_omissions(omissions, 3, 40, Display())
    assert "1 of 3 conversations lose their reasoning, which" in capsys.readouterr().err


def test_reasoning_that_the_chat_template_writes_is_not_counted():
    tokenizer = Tokenizer.train([toy_text(300)], 400)
    writes = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    for reasoning, places in ((writes, []), ("", ["a built-in conversation"])):
        source = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n" + reasoning + "{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        tokenizer.chat_template = ChatTemplate(
            source, {"eos_token": "<|im_end|>"}, {tokenizer.special_id("<|im_end|>")}
        )
        question, answer = turn("a", "b")
        _, omissions = tokenize_conversations([[question, answer | {"reasoning_content": "Hm."}]], tokenizer, 60)
        assert omissions.without_reasoning == places


SOME_TEXT = st.sampled_from(["", "a", "The king sees.", "sword " * 12, "night " * 60])
SOME_CONVERSATIONS = st.lists(
    st.lists(st.builds(turn, SOME_TEXT, SOME_TEXT), min_size=1, max_size=4).map(lambda turns: sum(turns, [])),
    min_size=1,
    max_size=12,
)


@FAST
@given(SOME_CONVERSATIONS, st.integers(16, 100))
def test_every_row_has_a_token_in_the_loss_whatever_the_conversations(conversations, context):
    learnable = [any(render(c[-2:], toy())[1][:context]) for c in conversations]  # at least by their last turn
    if not any(learnable):
        with pytest.raises(UserError):
            tokenize_conversations(conversations, toy(), context)
        return
    examples, omissions = tokenize_conversations(conversations, toy(), context)
    assert len(examples) == sum(learnable)
    assert len(omissions.dropped) == len(conversations) - sum(learnable)
    batches = PackedBatches(examples, context, 3, 0)
    for step in range(4):
        _, _, weights, _ = batches.at(step)
        assert (weights > 0).any(1).all()
        assert weights.sum().item() == pytest.approx(1)
