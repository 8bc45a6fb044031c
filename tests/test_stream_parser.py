"""From tokens to an answer: what is cut, what is held back, what is a call, however the text falls into tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.serve.stream_parser import Reply, chat_logprobs, completion_logprobs, end_of, key_of
from nanoghost.tokenizer.chat_format import parse_reply
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

OURS = Tokenizer.train([toy_text(100)], 290)
OTHERS = Tokenizer.train([toy_text(100)], 290)
OTHERS.chat_template = ChatTemplate("", {}, {OTHERS.special_id("<|im_end|>")})
BYTES = {OURS.token_bytes(i)[0]: i for i in range(7, 263)}
TEXT = st.text(alphabet="ab<>é👻 {}", max_size=40)


def written(tokenizer, pieces) -> list[int]:
    """Tokens of some texts; names of marks stand for the marks, where the tokenizer has them as tokens."""
    ids = []
    for piece in pieces:
        is_mark = piece in tokenizer.special_tokens and not (tokenizer.chat_template and "tool" in piece)
        ids += [tokenizer.special_id(piece)] if is_mark else tokenizer.encode(piece)
    return ids


def said(reply: Reply, ids: list[int], rng=None) -> tuple[str, list[dict], list]:
    """(text, calls, tokens with probabilities) in pieces as an engine would bring them."""
    text, calls, tokens, at = "", [], [], 0
    while at < len(ids):
        step = rng.randint(1, 4) if rng else 1
        some = ids[at : at + step]
        piece = reply.feed(some, [(-0.5, [])] * len(some))
        text, calls, tokens, at = text + piece.text, calls + piece.calls, tokens + piece.tokens, at + step
        if reply.stopped:
            break
    piece = reply.finish()
    return text + piece.text, calls + piece.calls, tokens + piece.tokens


@given(
    text=TEXT, stops=st.lists(st.text(alphabet="ab<é👻 ", min_size=1, max_size=4), max_size=3), seed=st.integers(0, 99)
)
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("tokenizer", [OURS, OTHERS], ids=["ours", "others"])
def test_a_stop_text_is_found_wherever_it_is_split(tokenizer, text, stops, seed):
    rng = random.Random(seed)
    byte_by_byte = [BYTES[byte] for byte in text.encode()]
    ids = byte_by_byte if rng.random() < 0.5 else tokenizer.encode(text)
    got, calls, tokens = said(Reply(tokenizer, tuple(stops), calls=False), ids, rng)
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]  # who is complete first counts
    assert got == text[: min(found)[1] if found else None] and not calls
    if not found:
        assert [token for token, _ in tokens] == ids
    else:
        shown = b"".join(tokenizer.token_bytes(token) for token, _ in tokens)
        assert shown.startswith(got.encode()) and len(tokens) <= len(ids), "the token that the cut goes through stays"


CALLS = [
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "g", "arguments": "x"}',
    "{oops",
    "",
    '[{"name": "f", "arguments": {}}]',
    "[1]",
    "é👻",
]
PARTS = st.lists(st.sampled_from(["Hello. ", "<", "<tool", "<tool_call>", "</tool_call>", "\n", *CALLS]), max_size=8)


@given(parts=PARTS, seed=st.integers(0, 99))
@settings(max_examples=400, deadline=None)
@pytest.mark.parametrize("tokenizer", [OURS, OTHERS], ids=["ours", "others"])
def test_an_answer_in_pieces_is_the_answer_as_a_whole(tokenizer, parts, seed):
    """The same text and calls as chat.parse_reply, which sees everything at once."""
    ids = [*written(tokenizer, parts), tokenizer.special_id("<|im_end|>")]
    text, calls, _ = said(Reply(tokenizer), ids, random.Random(seed))
    whole = parse_reply(ids, tokenizer)
    assert text == whole["content"]
    assert [call["function"] for call in calls] == [call["function"] for call in whole.get("tool_calls", [])]


def test_nothing_of_a_call_is_shown_before_it_is_known_to_be_one():
    for tokenizer in (OURS, OTHERS):
        reply, shown = Reply(tokenizer), ""
        for token in written(tokenizer, ["Well. ", "<tool_call>", '{"name": "f", "arguments": {}}']):
            shown += reply.feed([token], []).text
        assert shown == "Well. " and len(reply.finish().calls) == 1


def test_without_tools_everything_is_text():
    ids = written(OTHERS, ["<tool_call>", CALLS[0], "</tool_call>"])
    assert said(Reply(OTHERS, calls=False), ids)[0] == f"<tool_call>{CALLS[0]}</tool_call>"


def test_a_forced_call_is_the_whole_reply():
    text, calls, _ = said(
        Reply(OURS, ("arguments",), forced=True), [*OURS.encode(CALLS[0]), OURS.special_id("<|im_end|>")]
    )
    assert not text and calls[0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert said(Reply(OURS, forced=True), OURS.encode(CALLS[0][:-1]))[0] == CALLS[0][:-1], "cut off, it is text"


def test_what_may_be_the_beginning_of_a_mark():
    assert end_of("abc<to", ("<tool_call>",)) == 3 and end_of("abc", ("x",)) == 3 == end_of("abc", ())
    assert end_of("aab", ("abc", "bd")) == 1


def test_probabilities_have_names_that_no_two_tokens_share():
    names = [key_of(OURS, token) for token in range(OURS.vocab_size)]
    assert len(set(names)) == len(names) and not any("\ufffd" in name for name in names)
    ghost = OURS.encode("👻")
    found = chat_logprobs(OURS, [(token, (-1.0, [(token, -1.0)])) for token in ghost])["content"]
    assert bytes(byte for entry in found for byte in entry["bytes"]).decode() == "👻"
    table = completion_logprobs(OURS, [(ghost[0], None), *((token, (-1.0, [(5, -0.5)])) for token in ghost[1:])], 1)
    assert table["token_logprobs"][0] is None and all(len(t) == 2 for t in table["top_logprobs"][1:])


def test_the_grammar_lets_no_blanks_in():
    import torch
    from llguidance import LLMatcher

    from nanoghost.engine.grammar import grammar_tokenizer, json_grammar
    from nanoghost.engine.logits_processors import LogitsProcessor

    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    processor, ids = LogitsProcessor(LLMatcher(grammar_tokenizer(OURS), json_grammar(schema)), 2), []
    blank = torch.zeros(OURS.vocab_size + 10)
    blank[OURS.encode(" ")[0]] = 50.0
    while not ids or ids[-1] not in OURS.stop_ids:
        logits = blank + torch.rand(len(blank), generator=torch.Generator().manual_seed(len(ids)))
        processor.process(logits)
        ids.append(int(logits.argmax()))
        processor.accept(ids[-1])
        assert len(ids) < 60
    assert "  " not in OURS.decode(ids) and len(processor.recorded) == len(ids)
    assert processor.recorded[0][1][0] == (OURS.encode(" ")[0], pytest.approx(0, abs=1e-3)), (
        "probabilities are the model's own, before the grammar"
    )
