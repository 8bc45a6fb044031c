"""Chat: what is shown, what is kept, slash commands; and the verbs that look after models."""

import json

import pytest

from nanoghost.engine.generate import Sampling
from nanoghost.runs import ModelFolder
from nanoghost.serve.terminal import Conversation, fragments, slash
from tests.test_generate import Scripted, tokenizer  # noqa: F401


def test_text_streams_whole_characters_and_calls_become_a_line(tokenizer):  # noqa: F811
    from nanoghost.chat import render
    from nanoghost.engine.generate import steps
    from nanoghost.tools.calculator import run_tool

    call = {"id": "call_1", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "Voilà: 2 € 👻"},
    ]
    prompt, _ = render(messages[:1], tokenizer, generation=True)
    model = Scripted(tokenizer, render(messages, tokenizer)[0][len(prompt) :])
    model.start = len(prompt)
    engine = steps(model, tokenizer, [prompt], Sampling(max_tokens=300, temperature=0), run_tool=run_tool)
    said = [s for s, _ in fragments(engine, tokenizer) if s.text]
    assert [s.text for s in said if s.is_tool] == ["calculator(1+1) → 2"]
    assert "".join(s.text for s in said if not s.is_tool) == "Voilà: 2 € 👻"
    assert not any("\ufffd" in s.text for s in said)


@pytest.fixture
def conversation(toy_base):
    return Conversation(toy_base, Sampling(max_tokens=8, temperature=1.0), system="Be brief.")


def test_conversation_keeps_drops_and_stops(conversation):
    for turn in range(8):
        dropped = conversation.ask("The king sees the queen.")
        list(conversation.answer())
    assert dropped > 0 and conversation.messages[0]["role"] == "system", "old turns go, the system message stays"
    conversation.ask("Stop here.")
    answer = conversation.answer()
    shown = next(answer).text
    answer.close()
    assert conversation.messages[-2]["content"] == "Stop here."
    assert conversation.messages[-1]["role"] == "assistant" and conversation.messages[-1]["content"].startswith(shown)
    with pytest.raises(Exception, match="context"):
        conversation.ask("word " * 200)


def test_slash_commands(conversation, tmp_path):
    conversation.ask("The king.")
    path = tmp_path / "kept.jsonl"
    slash(conversation, f"/save {path}")
    slash(conversation, f"/save {path}")
    saved = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(saved) == 2 and saved[0]["messages"] == conversation.messages
    assert "/reset" in slash(conversation, "/help")
    slash(conversation, "/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    slash(conversation, "/system Speak.")
    assert conversation.messages == [{"role": "system", "content": "Speak."}]
    slash(conversation, "/system")
    assert conversation.messages == []
    assert "/dance" in slash(conversation, "/dance")


def test_list_show_rename_rm(nanoghost, toy_base):
    code, out, _ = nanoghost("list", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == [toy_base]
    assert nanoghost("show", toy_base)[0] == 0
    assert nanoghost("rename", toy_base, "other")[0] == 0
    assert ModelFolder("other").card["name"] == "other" and not ModelFolder(toy_base).exists
    assert nanoghost("rename", "other", "other")[0] == 2
    assert nanoghost("rename", "nobody", "x")[0] == 2
    assert nanoghost("rm", "other")[0] == 2, "nobody can be asked here"
    assert nanoghost("rm", "other", "--yes")[0] == 0
    assert not ModelFolder("other").path.exists()


def test_data_and_tokenizer_verbs(nanoghost, toy_file):
    code, out, err = nanoghost("data", toy_file, "--vocab-size", 300, "--json")
    assert code == 0, err
    assert json.loads(out)["splits"]["train"]["bytes"] > 0
    code, out, err = nanoghost("tokenizer", "train", "--data", toy_file, "--vocab-size", 300, "--name", "t")
    assert code == 0, err
    code, out, err = nanoghost("tokenizer", "eval", "--name", "t", "--json")
    assert code == 0, err
    assert json.loads(out)["vocab_size"] == 300
