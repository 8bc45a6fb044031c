"""Conversations to tokens and back: rendering equals the Jinja template, the loss mask, special tokens in user text."""

import json
from functools import cache
from itertools import groupby

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import nanoghost.tokenizer.chat_format
from nanoghost.data.conversations import load_conversations
from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import CHAT_TEMPLATE, render, render_text, text_of, truncate_oldest_turns
from nanoghost.tokenizer.reply_parser import parse_reply
from nanoghost.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.support.toys import toy_text

FAST = settings(deadline=None, max_examples=60)


@cache
def toy() -> Tokenizer:
    return Tokenizer.train([toy_text(300), '{"name": "calculator", "arguments": {"expression": "1 + 2"}}\n' * 9], 400)


@cache
def template():
    """The template as transformers compiles it (utils/chat_template_utils.py). Its tojson filter escapes nothing."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


AWKWARD = [
    *SPECIAL_TOKENS,
    "\n",
    "\r\n",
    " ",
    "user",
    "{{ 1 }}",
    "{% if %}",
    "{# #}",
    "<b>&'\"",
    "東",
    "é",
    "👩‍👩‍👧",
    "king",
]
TEXTS = st.text(max_size=12) | st.lists(st.sampled_from(AWKWARD), max_size=5).map("".join)
CONTENTS = TEXTS | st.none() | st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_subnormal=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


def call(name, arguments, number=1):
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{number}", "type": "function", "function": function}


def numbered(pairs):
    return [call(name, arguments, number) for number, (name, arguments) in enumerate(pairs, start=1)]


CALLS = st.lists(st.tuples(TEXTS, JSON), min_size=1, max_size=2).map(numbered)
SYSTEM, USER, TOOL, PLAIN_ASSISTANT = (
    st.builds(lambda content, role=role: {"role": role, "content": content}, CONTENTS)
    for role in ("system", "user", "tool", "assistant")
)
ASSISTANT = PLAIN_ASSISTANT | st.builds(
    lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls}, CONTENTS, CALLS
)
CONVERSATIONS = st.lists(SYSTEM | USER | TOOL | ASSISTANT, min_size=1, max_size=5)


def written(message):
    """The text that the model writes for an assistant message: a second implementation."""
    calls = [c["function"] for c in message.get("tool_calls", [])]
    return (
        text_of(message)
        + "".join(
            "<tool_call>\n"
            + '{"name": '
            + json.dumps(c["name"], ensure_ascii=False)
            + ', "arguments": '
            + c["arguments"]
            + "}"
            + "\n</tool_call>"
            for c in calls
        )
        + "<|im_end|>"
    )


@FAST
@given(CONVERSATIONS, st.booleans())
@example([{"role": "assistant", "content": None, "tool_calls": [call("é'<&>", {"é": "<'"})]}], True)
def test_tokens_text_and_jinja_template_agree(messages, generation):
    ids, learned = render(messages, toy(), generation)
    assert len(ids) == len(learned)
    text = render_text(messages, generation)
    assert toy().decode(ids, skip_special=False) == text
    assert template().render(messages=messages, add_generation_prompt=generation) == text


def json_bodies(text):
    return [json.loads(body.partition("\n</tool_call>")[0]) for body in text.split("<tool_call>\n")[1:]]


def as_objects(messages):
    """The arguments of calls as objects, as transformers and vLLM hand them to a template."""

    def convert(call):
        return call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}

    return [m | {"tool_calls": [convert(c) for c in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


@FAST
@given(CALLS.map(lambda calls: [{"role": "assistant", "content": None, "tool_calls": calls}]))
def test_the_template_takes_arguments_as_objects(messages):
    """One that is itself a string stays ambiguous: OpenAI's form is text."""
    if any(json.loads(c["function"]["arguments"]).__class__ is str for c in messages[0]["tool_calls"]):
        return
    assert json_bodies(template().render(messages=as_objects(messages))) == json_bodies(render_text(messages))


def test_no_arguments_are_an_empty_object():
    """Clients send "" for a function without parameters."""
    empty = {"id": "a", "type": "function", "function": {"name": "now", "arguments": ""}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [empty]}]
    assert '{"name": "now", "arguments": {}}' in render_text(messages)
    assert template().render(messages=messages) == render_text(messages)


def test_the_documented_example():
    ids, _ = render(
        [
            {"role": "user", "content": "What is 12 + 30?"},
            {"role": "assistant", "tool_calls": [call("calculator", {"expression": "12 + 30"})]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
            {"role": "assistant", "content": "12 + 30 = 42."},
        ],
        toy(),
    )
    block = nanoghost.tokenizer.chat_format.__doc__.split("\n\n")[2]
    assert toy().decode(ids, skip_special=False) == "".join(line.strip() + "\n" for line in block.splitlines())


@FAST
@given(CONVERSATIONS, st.booleans())
def test_the_loss_mask_covers_exactly_what_the_assistant_writes(messages, generation):
    ids, learned = render(messages, toy(), generation)
    runs = [[i for i, _ in run] for is_learned, run in groupby(zip(ids, learned), lambda pair: pair[1]) if is_learned]
    expected = [written(m) for m in messages if m["role"] == "assistant"]
    assert [toy().decode(run, skip_special=False) for run in runs] == expected


@FAST
@given(CONVERSATIONS)
def test_special_token_text_stays_text(messages):
    names = {toy().special_id(name): name for name in SPECIAL_TOKENS}
    expected = []
    for message in messages:
        inside = ["<tool_call>", "</tool_call>"] * len(message.get("tool_calls", []))
        inside = ["<tool_response>", "</tool_response>"] if message["role"] == "tool" else inside
        expected += ["<|im_start|>", *inside, "<|im_end|>"]
    assert [names[i] for i in render(messages, toy())[0] if i in names] == expected


@FAST
@given(CONTENTS, st.just([]) | CALLS)
def test_parsing_inverts_rendering(content, calls):
    message = {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})
    ids, learned = render([message], toy())
    reply = [i for i, is_learned in zip(ids, learned) if is_learned]
    assert parse_reply(reply, toy()) == message | {"content": text_of(message)}
    assert parse_reply(reply[:-1], toy()) == message | {"content": text_of(message)}, "cut before <|im_end|>"


MALFORMED = [
    "",
    "calculator(1 + 2)",
    '{"name": "calculator", "arguments": {',
    '{"name": "calculator"}',
    '{"name": 3, "arguments": {}}',
    '["calculator", {}]',
    "1" * 5000,
    "[" * 100_000,
]


@pytest.mark.parametrize("body", MALFORMED, ids=lambda body: body[:20])
def test_an_invalid_call_stays_in_the_text(body):
    opening, closing, end = map(toy().special_id, ("<tool_call>", "</tool_call>", "<|im_end|>"))
    ids = [*toy().encode("Well: "), opening, *toy().encode(body), closing]
    assert parse_reply([*ids, end], toy()) == {"role": "assistant", "content": "Well: " + body}
    good = [opening, *toy().encode('{"name": "f", "arguments": 1}'), closing]
    expected = {"role": "assistant", "content": "Well: " + body + " and", "tool_calls": [call("f", 1)]}
    assert parse_reply([*ids, *toy().encode(" and"), *good, end], toy()) == expected


@FAST
@given(st.lists(SYSTEM | USER | ASSISTANT, min_size=1, max_size=8), st.integers(0, 200), st.booleans())
@example([{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi."}], 200, False)
def test_truncation_drops_the_oldest_turns_and_no_more(messages, room, generation):
    def size(some):
        return len(render(some, toy(), generation)[0])

    remaining = truncate_oldest_turns(messages, toy(), room, generation)
    assert [m for m in remaining if m["role"] == "system"] == [m for m in messages if m["role"] == "system"]
    others = [m for m in messages if m["role"] != "system"]
    turns = [m for m in remaining if m["role"] != "system"]
    assert turns == others[len(others) - len(turns) :]
    if size(messages) <= room:
        assert remaining == messages
    elif len(turns) < len(others):
        starts = [i for i, m in enumerate(others) if m["role"] == "user"]
        first = len(others) - len(turns)
        assert first in starts, "what is left begins with a user message"
        assert size(remaining) <= room or first == starts[-1], "too long although older turns could be dropped"
        system = [m for m in messages if m["role"] == "system"]
        one_more = max((i for i in starts if i < first), default=0)
        assert size(system + others[one_more:]) > room, "one more turn would have fitted"


@pytest.mark.parametrize(
    "tool_calls",
    [
        [{"name": "calculator"}],
        ["calculator"],
        [{"function": {"name": "calculator", "arguments": 1}}],
        {"name": "calculator", "arguments": "{}"},
    ],
)
def test_a_file_with_invalid_calls_is_rejected(tmp_path, tool_calls):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "assistant", "content": None, "tool_calls": tool_calls}]}))
    with pytest.raises(UserError, match="tool_calls"):
        load_conversations(path)


@pytest.mark.parametrize(
    "call",
    [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Zürich"}'}},
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": {"town": "Zürich"}}},
        {"name": "weather", "arguments": {"town": "Zürich"}},
    ],
    ids=["OpenAI", "transformers", "bare"],
)
def test_arguments_in_a_file_are_text_or_an_object(tmp_path, call):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    [(system, _, caller)] = load_conversations(path)
    assert system == {"role": "system", "content": "Be brief."}
    assert caller["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"town": "Zürich"}'}
    assert '"arguments": {"town": "Zürich"}}' in render_text([caller])


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": {"url": "a.png"}}], 3, None])
def test_content_in_a_file_is_text(tmp_path, content):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    with pytest.raises(UserError, match="chats.jsonl:1: message 1: 'content'"):
        load_conversations(path)
