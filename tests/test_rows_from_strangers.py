"""Rows as data sets have them: system prompts in a column, images, calls and results written as text between tags."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from nanoghost.commands.adopt import import_source
from nanoghost.data.conversations import load_conversations
from nanoghost.data.local import open_local
from nanoghost.data.tagged_calls import parse_tags
from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import render_text

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]


def load(tmp_path, row: dict) -> list[dict]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    [conversation] = load_conversations(path)
    return conversation


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "row",
    [{"messages": CHAT}, {"conversations": SHAREGPT}, {"prompt": "hi", "completion": "hello"},
     {"instruction": "hi", "output": "hello"}],
    ids=lambda row: next(iter(row)),
)  # fmt: skip
def test_a_system_prompt_in_a_column_comes_first(tmp_path, key, row):
    messages = load(tmp_path, row | {key: "Be brief."})
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in messages] == ["Be brief.", "hi", "hello"]


def test_a_system_message_of_the_conversation_is_kept(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    assert load(tmp_path, {"messages": [system, *CHAT], "system": "Be brief."})[0]["content"] == "Be kind."


def test_a_column_that_differs_from_the_system_message_is_named(tmp_path, capsys):
    system = {"from": "system", "value": "Be kind."}
    for prompt in ("Be kind.", "Be brief."):
        messages = load(tmp_path, {"conversations": [system, *SHAREGPT], "system_prompt": prompt})
        assert [message["content"] for message in messages] == ["Be kind.", "hi", "hello"]
        is_named = "'system_prompt' is not read" in capsys.readouterr().err
        assert is_named == (prompt == "Be brief.")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_not_read_are_named_once(tmp_path, capsys, kind):
    rows = [{"messages": CHAT, "system": "Be brief.", "reasoning": "think", "tools": "[]"}] * 2
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_conversations(path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "read as" not in line]
    assert lines == [f"{path}: not read: 'reasoning', 'tools'"]


@pytest.mark.parametrize("key", ["image", "images", "video", "audios"])
def test_rows_and_messages_with_images_are_refused(tmp_path, key):
    with pytest.raises(UserError, match=f"rows.jsonl:1: '{key}' is not empty"):
        load(tmp_path, {"messages": CHAT, key: ["cat.png"]})
    with pytest.raises(UserError, match=f"rows.jsonl:1: message 1: '{key}' is not empty"):
        load(tmp_path, {"messages": [CHAT[0] | {key: ["cat.png"]}, CHAT[1]]})
    assert load(tmp_path, {"messages": CHAT, key: []}) == CHAT


def test_parts_that_are_not_text_are_refused(tmp_path):
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "cat.png"}}]
    with pytest.raises(UserError, match="rows.jsonl:1: message 1: 'content' has a part of the type 'image_url'"):
        load(tmp_path, {"messages": [{"role": "user", "content": parts}, CHAT[1]]})


# ── calls and results between tags ───────────────────────────────────────────────────────────────────────────────────

CALL = '{"name": "add", "arguments": {"a": 1}}'
PYTHON_CALL = "{'arguments': {'a': 1, 'exact': True}, 'name': 'add'}"


def hermes(answer: str, *others: dict) -> dict:
    """A ShareGPT row with that answer of the model."""
    return {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": answer}, *others]}


@pytest.mark.parametrize("sender", ["tool", "human"])
def test_calls_and_results_between_tags_are_calls_and_results(tmp_path, capsys, sender):
    answer = f"I add.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{PYTHON_CALL}</tool_call>\n"
    results = {"from": sender, "value": "<tool_response>\n2\n</tool_response>\n<tool_response>3</tool_response>"}
    messages = load(tmp_path, hermes(answer, results, {"from": "gpt", "value": "2"}))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [message["content"] for message in messages] == ["1 + 1?", "I add.", "2", "3", "2"]
    functions = [call["function"] for call in messages[1]["tool_calls"]]
    assert [function["name"] for function in functions] == ["add", "add"]
    assert [json.loads(function["arguments"]) for function in functions] == [{"a": 1}, {"a": 1, "exact": True}]
    assert "tool_call" not in capsys.readouterr().err


@given(st.text(max_size=20).filter(lambda text: "<" not in text), st.dictionaries(st.text(), st.integers() | st.text()))
def test_calls_that_the_chat_format_writes_are_read_back(text, arguments):
    call = {"function": {"name": "f", "arguments": json.dumps(arguments, ensure_ascii=False)}}
    message = {"role": "assistant", "content": text.rstrip(), "tool_calls": [call]}
    written = render_text([message]).removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
    if "</tool_call>" not in str(arguments):
        assert parse_tags([{"role": "assistant", "content": written}], Path("a"), "a") == [message]


@pytest.mark.parametrize(
    "text",
    ["<tool_call>", "<tool_call>add</tool_call>", f"<tool_call>{CALL}</tool_call> and", "<tool_call>[]</tool_call>"],
)
def test_other_text_with_tags_stays_text_and_is_named(tmp_path, capsys, text):
    assert load(tmp_path, hermes(text))[1] == {"role": "assistant", "content": text}
    assert "rows.jsonl: <tool_call> is learned as text where" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "add", "arguments": {"a": 1}',
        "{'name': add}",
        "{'name': 'f', 'arguments': {1}}",
        '{"arguments": {}}',
        "[{}]",
    ],
)
def test_a_call_between_tags_that_cannot_be_read_is_refused(tmp_path, body):
    with pytest.raises(UserError, match="rows.jsonl:1: message 2: .* is not a call"):
        load(tmp_path, hermes(f"<tool_call>{body}</tool_call>"))


@pytest.mark.parametrize("text", ["<tool_response>2", "<tool_response>2</tool_response> is it"])
def test_other_results_stay_as_they_are(tmp_path, text):
    result = {"from": "tool", "value": text}
    assert load(tmp_path, hermes(f"<tool_call>{CALL}</tool_call>", result))[2]["content"] == text
    quoted = {"from": "human", "value": "<tool_response>2</tool_response>"}
    assert load(tmp_path, hermes("hello", quoted))[2] == {"role": "user", "content": quoted["value"]}


def test_a_folder_and_a_missing_file_are_named_as_such(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_conversations(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_conversations(tmp_path / "none.jsonl")


def test_a_pipe_is_named_as_such_for_text_and_conversations(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for read in (load_conversations, open_local, lambda path: import_source(str(path), tmp_path / "model")):
        with pytest.raises(UserError, match="a.jsonl is a pipe or a device, not a file"):
            read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name, header", [("a.csv", 'question,"answer, short"'), ("a.TSV", "question\tanswer, short")])
def test_a_table_is_refused_with_its_columns(tmp_path, name, header):
    (tmp_path / name).write_text(f"{header}\n1,2\n")
    for read in (load_conversations, open_local):
        with pytest.raises(UserError, match=r"is a table \(columns: 'question', 'answer, short'\): write each row"):
            read(tmp_path / name)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/a.jsonl", "s3://bucket/a.jsonl", "hub:owner/name"])
def test_conversations_by_address_are_refused_as_such(address):
    with pytest.raises(UserError, match=f"{address}: .* download it first"):
        load_conversations(address)
