"""Rows as data sets have them: system prompts in a column, images, calls and results written as text between tags."""

import json

import pytest

from nanoghost.data.conversations import load_conversations, split_calls
from nanoghost.errors import UserError

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


@pytest.mark.parametrize("key", ["image", "images"])
def test_rows_with_images_are_refused(tmp_path, key):
    with pytest.raises(UserError, match=f"rows.jsonl:1: '{key}' is not empty"):
        load(tmp_path, {"messages": CHAT, key: ["cat.png"]})
    assert load(tmp_path, {"messages": CHAT, key: []}) == CHAT


CALL = '{"name": "add", "arguments": {"a": 1}}'


def test_calls_and_results_between_tags_are_calls_and_results(tmp_path):
    messages = load(
        tmp_path,
        {
            "conversations": [
                {"from": "human", "value": "1 + 1?"},
                {"from": "gpt", "value": f"I add.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>"},
                {"from": "tool", "value": "<tool_response>\n2\n</tool_response>"},
                {"from": "gpt", "value": "2"},
            ]
        },
    )
    assert messages[1]["content"] == "I add."
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == ["add", "add"]
    assert json.loads(messages[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}
    assert messages[2]["content"] == "2"


@pytest.mark.parametrize(
    "text",
    ["no call", "<tool_call>", "<tool_call>add</tool_call>", f"<tool_call>{CALL}</tool_call> and then",
     "<tool_call>[]</tool_call>"],
)  # fmt: skip
def test_other_text_with_tags_stays_text(text):
    assert split_calls(text) == (text, None)


def test_a_folder_and_a_missing_file_are_named_as_such(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_conversations(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        load_conversations(tmp_path / "none.jsonl")
