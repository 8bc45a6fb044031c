"""The parser of replies: stop texts, text that is held back, tool calls, for every split of a reply into tokens."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.reply_parser import ReplyParser, parse_reply, partial_match_start
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import toy_text

# Both syntaxes of tool calls: tags as special tokens (models trained here), and as text (models with a chat template).
SPECIAL_TAGS = Tokenizer.train([toy_text(100)], 290)
TEXT_TAGS = Tokenizer.train([toy_text(100)], 290)
TEXT_TAGS.chat_template = ChatTemplate("", {}, {TEXT_TAGS.special_id("<|im_end|>")})
both_syntaxes = pytest.mark.parametrize("tokenizer", [SPECIAL_TAGS, TEXT_TAGS], ids=["special-tags", "text-tags"])
TOKEN_OF_BYTE = {SPECIAL_TAGS.token_bytes(i)[0]: i for i in range(7, 263)}
TEXT = st.text(alphabet="ab<>é👻 {}", max_size=40)


def encode(tokenizer, segments) -> list[int]:
    """The tokens of some texts; names of special tokens are encoded as a model of this syntax writes them."""
    ids = []
    for segment in segments:
        is_text_tag = tokenizer.chat_template is not None and "tool" in segment
        if segment in tokenizer.special_tokens and not is_text_tag:
            ids.append(tokenizer.special_id(segment))
        else:
            ids += tokenizer.encode(segment)
    return ids


def parse_in_steps(parser: ReplyParser, ids: list[int], rng=None) -> tuple[str, list[dict], list]:
    """(text, calls, tokens with their info): one token at a time, or 1 to 4 as an engine with drafts delivers them."""
    deltas, position = [], 0
    while position < len(ids) and not parser.stopped:
        step = rng.randint(1, 4) if rng else 1
        some = ids[position : position + step]
        deltas.append(parser.feed(some, [(-0.5, [])] * len(some)))
        position += step
    deltas.append(parser.finish())
    text = "".join(delta.text for delta in deltas)
    calls = [call for delta in deltas for call in delta.tool_calls]
    tokens = [token for delta in deltas for token in delta.tokens]
    return text, calls, tokens


@given(
    text=TEXT, stops=st.lists(st.text(alphabet="ab<é👻 ", min_size=1, max_size=4), max_size=3), seed=st.integers(0, 99)
)
@settings(max_examples=300, deadline=None)
@both_syntaxes
def test_a_stop_text_is_found_however_it_is_split_into_tokens(tokenizer, text, stops, seed):
    """Oracle: `str.find` in the whole text; the stop text that is complete first counts."""
    rng = random.Random(seed)
    byte_by_byte = [TOKEN_OF_BYTE[byte] for byte in text.encode()]
    ids = byte_by_byte if rng.random() < 0.5 else tokenizer.encode(text)
    parsed, calls, tokens = parse_in_steps(ReplyParser(tokenizer, tuple(stops), parse_calls=False), ids, rng)
    matches = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert calls == []
    if not matches:
        assert parsed == text
        assert [token_id for token_id, _ in tokens] == ids
        return
    _, start = min(matches)
    assert parsed == text[:start]
    reported = b"".join(tokenizer.token_bytes(token_id) for token_id, _ in tokens)
    assert reported.startswith(parsed.encode()), "the token that the cut goes through is reported, too"
    assert len(tokens) <= len(ids)


CALLS = [
    '{"name": "f", "arguments": {"a": 1}}',
    '{"name": "g", "arguments": "x"}',
    "{oops",
    "",
    '[{"name": "f", "arguments": {}}]',
    "[1]",
    "é👻",
]
SEGMENTS = st.lists(st.sampled_from(["Hello. ", "<", "<tool", "<tool_call>", "</tool_call>", "\n", *CALLS]), max_size=8)


@given(segments=SEGMENTS, seed=st.integers(0, 99))
@settings(max_examples=400, deadline=None)
@both_syntaxes
def test_parsing_in_steps_gives_the_same_as_parsing_at_once(tokenizer, segments, seed):
    ids = [*encode(tokenizer, segments), tokenizer.special_id("<|im_end|>")]
    text, calls, _ = parse_in_steps(ReplyParser(tokenizer), ids, random.Random(seed))
    message = parse_reply(ids, tokenizer)
    assert text == message["content"]
    assert calls == message.get("tool_calls", [])


@both_syntaxes
def test_nothing_of_a_call_is_emitted_before_it_is_complete(tokenizer):
    parser, text = ReplyParser(tokenizer), ""
    for token_id in encode(tokenizer, ["Well. ", "<tool_call>", '{"name": "f", "arguments": {}}']):
        text += parser.feed([token_id]).text
    assert text == "Well. "
    assert len(parser.finish().tool_calls) == 1


def test_several_calls_are_numbered():
    """In text tags, one pair of tags may hold a list of calls."""
    call = '{"name": "f", "arguments": {}}'
    segments = ["<tool_call>", f"[{call}, {call}]", "</tool_call>", "<tool_call>", call, "</tool_call>"]
    message = parse_reply(encode(TEXT_TAGS, segments), TEXT_TAGS)
    assert [call["id"] for call in message["tool_calls"]] == ["call_1", "call_2", "call_3"]


def test_an_invalid_call_in_text_tags_keeps_its_tags():
    segments = ["Well: ", "<tool_call>", "{oops", "</tool_call>", " and"]
    message = parse_reply(encode(TEXT_TAGS, segments), TEXT_TAGS)
    assert message == {"role": "assistant", "content": "Well: <tool_call>{oops</tool_call> and"}


def test_with_parse_calls_off_everything_is_text():
    ids = encode(TEXT_TAGS, ["<tool_call>", CALLS[0], "</tool_call>"])
    text, calls, _ = parse_in_steps(ReplyParser(TEXT_TAGS, parse_calls=False), ids)
    assert text == f"<tool_call>{CALLS[0]}</tool_call>"
    assert calls == []


def test_a_forced_call_is_the_whole_reply_and_ignores_stop_texts():
    ids = [*SPECIAL_TAGS.encode(CALLS[0]), SPECIAL_TAGS.special_id("<|im_end|>")]
    text, [call], _ = parse_in_steps(ReplyParser(SPECIAL_TAGS, ("arguments",), forced_call=True), ids)
    assert text == ""
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}


def test_a_forced_call_that_is_cut_off_is_text():
    ids = SPECIAL_TAGS.encode(CALLS[0][:-1])
    text, calls, _ = parse_in_steps(ReplyParser(SPECIAL_TAGS, forced_call=True), ids)
    assert text == CALLS[0][:-1]
    assert calls == []


@pytest.mark.parametrize("keep", [True, False])
def test_the_stop_token_is_reported_only_on_request(keep):
    """lm-eval needs its log-probability; chat clients add up the tokens to get the text."""
    ids = [*SPECIAL_TAGS.encode("a"), SPECIAL_TAGS.special_id("<|im_end|>")]
    text, _, tokens = parse_in_steps(ReplyParser(SPECIAL_TAGS, keep_stop_token=keep), ids)
    assert text == "a"
    assert [token_id for token_id, _ in tokens] == (ids if keep else ids[:-1])


@pytest.mark.parametrize(
    "text, patterns, start",
    [
        ("abc<to", ("<tool_call>",), 3),
        ("abc", ("x",), 3),
        ("abc", (), 3),
        ("aab", ("abc", "bd"), 1),
    ],
)
def test_partial_match_start_finds_the_longest_suffix_that_begins_a_pattern(text, patterns, start):
    assert partial_match_start(text, patterns) == start
