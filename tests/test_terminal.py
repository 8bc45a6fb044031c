"""Chat: what is shown, what is kept, slash commands; and the verbs that look after data."""

import io
import json

import pytest
import torch

from nanoghost import cli
from nanoghost.data.conversations import load_conversations
from nanoghost.engine.sampler import SamplingParams
from nanoghost.serve.terminal import Conversation, fragments, slash
from tests.test_generate import Scripted, run_tool, tokenizer  # noqa: F401


def test_text_streams_whole_characters_and_calls_become_a_line(tokenizer):  # noqa: F811
    from nanoghost.engine.engine import Engine
    from nanoghost.engine.torch_runner import TorchRunner
    from nanoghost.tokenizer.chat_format import render

    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'},
    }
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "Voilà: 2 € 👻"},
    ]
    prompt, _ = render(messages[:1], tokenizer, generation=True)
    model = Scripted(tokenizer, render(messages, tokenizer)[0][len(prompt) :])
    model.start = len(prompt)
    engine = Engine(TorchRunner(model, 1, 512), tokenizer)
    [row] = engine.add(prompt, SamplingParams(max_tokens=300, temperature=0), run_tool=run_tool)
    said = [s for s in fragments(engine, row) if s.text]
    assert [s.text for s in said if s.is_tool] == ["calculator(1+1) → 2"]
    assert "".join(s.text for s in said if not s.is_tool) == "Voilà: 2 € 👻"
    assert not any("\ufffd" in s.text for s in said)


@pytest.fixture
def conversation(toy_base):
    return Conversation(toy_base, SamplingParams(max_tokens=8, temperature=1.0), system="Be brief.")


def test_conversation_keeps_drops_and_stops(conversation):
    for _ in range(8):
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


def shown(tokenizer, *script):  # noqa: F811
    """What is shown of an answer of these texts; names of marks stand for the marks. (fragments, messages)"""
    from nanoghost.engine.engine import Engine
    from nanoghost.engine.torch_runner import TorchRunner
    from nanoghost.tokenizer.chat_format import render

    prompt, _ = render([{"role": "user", "content": "?"}], tokenizer, generation=True)
    ids = []
    for text in script:
        if text == "(fed)":  # the engine puts the tool's answer here, whatever the script says
            told = [{"role": "tool", "content": "2"}]
            ids += tokenizer.encode("\n") + render(told, tokenizer, generation=True)[0]
        else:
            ids += [tokenizer.special_id(text)] if text.startswith("<") else tokenizer.encode(text)
    model = Scripted(tokenizer, ids)
    model.start = len(prompt)
    engine = Engine(TorchRunner(model, 1, 512), tokenizer)
    [row] = engine.add(prompt, SamplingParams(max_tokens=300, temperature=0), run_tool=run_tool)
    return [s for s in fragments(engine, row) if s.text], row.messages


CALL = '\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n'


def test_a_call_that_does_not_parse_is_shown(tokenizer):  # noqa: F811
    said, messages = shown(tokenizer, "<tool_call>", "\n{oops\n", "</tool_call>", "<|im_end|>")
    assert "".join(s.text for s in said) == messages[-1]["content"] == "\n{oops\n"


def test_an_unclosed_call_does_not_hide_the_answer(tokenizer):  # noqa: F811
    said, _ = shown(tokenizer, "<tool_call>", CALL, "<|im_end|>", "(fed)", "It is 2.", "<|im_end|>")
    assert said[0].is_tool and "".join(s.text for s in said[1:]) == "It is 2."


def test_a_tool_line_stands_alone(tokenizer):  # noqa: F811
    said, _ = shown(
        tokenizer, "Let me see.", "<tool_call>", CALL, "</tool_call>", "<|im_end|>", "(fed)", "2.", "<|im_end|>"
    )
    assert "".join(f"[{s.text}]" if s.is_tool else s.text for s in said) == "Let me see.\n[calculator(1+1) → 2]2."


def test_stopping_inside_a_call_keeps_only_what_was_said(conversation):
    special, encode = conversation.tokenizer.special_id, conversation.tokenizer.encode
    script = [*encode("Well."), special("<tool_call>"), *encode('{"name')]
    conversation.set_system(None)
    conversation.ask("?")
    conversation.sampling = SamplingParams(max_tokens=len(script) + 50, temperature=0)
    weights = conversation.engine.runner.model

    class Scribe(type(weights)):
        def forward(self, tokens, cache=None, **options):
            if not script:
                raise KeyboardInterrupt
            logits = -50 * torch.ones(len(tokens), 1, self.config.vocab_size)
            logits[:, 0, script.pop(0)] = 50.0
            return logits

    weights.__class__ = Scribe
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer())
    assert conversation.messages[-1] == {"role": "assistant", "content": "Well."}


def test_save_holds_all_that_was_said_and_a_bad_path_is_no_end(conversation, tmp_path):
    path = tmp_path / "kept.jsonl"
    assert "nothing" in slash(conversation, f"/save {path}") and not path.exists()
    for turn in range(8):
        conversation.ask(f"The king sees the queen, {turn}.")
        list(conversation.answer())
    path.write_text('{"messages": [{"role": "user", "content": "no line end"}]}')
    slash(conversation, f"/save {path}")
    _, messages = load_conversations(path)
    assert [m["content"][-2] for m in messages if m["role"] == "user"] == list("01234567")
    assert messages[0] == {"role": "system", "content": "Be brief."} and len(messages) > len(conversation.messages)
    assert "not a file" in slash(conversation, f"/save {tmp_path}")
    assert "cannot save" in slash(conversation, f"/save {path}/below/x.jsonl")
    slash(conversation, "/reset")
    assert conversation.transcript == [{"role": "system", "content": "Be brief."}]


def test_piped_chat_and_prompt(nanoghost, toy_base, monkeypatch, capsys):
    lines = "Hello\n/dance\n" + "word " * 300 + "\n" + "The king sees the queen.\n" * 8
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    cli.main(["chat", toy_base, "--max-tokens", "4"])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x01" not in out and out.startswith("toy, ")
    assert "/dance is not a command" in out and out.count("context holds 64") == 1
    assert out.count("no longer sees") == 1, "that old turns go is said once"
    answers = []
    for words in (("--prompt", "king?"), ("--prompt", "-")):
        monkeypatch.setattr("sys.stdin", io.StringIO("king?\n"))
        code, out, _ = nanoghost("chat", toy_base, *words, "--max-tokens", 6)
        assert code == 0
        answers.append(out)
    assert answers[0] == answers[1], "with --prompt the seed is 0"
    for words in (("--top-k", -1), ("--temperature", -1), ("--top-p", 0), ("--prompt", "word " * 300)):
        code, out, err = nanoghost("chat", toy_base, "--prompt", "x", *words)
        assert (code, out) == (2, "") and err.startswith("nanoghost: ")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert nanoghost("chat", toy_base)[0] == 2


def test_data_and_tokenizer_verbs(nanoghost, toy_file):
    code, out, err = nanoghost("data", toy_file, "--vocab-size", 300, "--json")
    assert code == 0, err
    assert json.loads(out)["splits"]["train"]["bytes"] > 0
    code, out, err = nanoghost("tokenizer", "train", "--data", toy_file, "--vocab-size", 300, "--name", "t")
    assert code == 0, err
    code, out, err = nanoghost("tokenizer", "eval", "--name", "t", "--json")
    assert code == 0, err
    assert json.loads(out)["vocab_size"] == 300


def test_data_shows_what_is_too_short_to_train_on_and_any_file_name(nanoghost, tmp_path):
    path = tmp_path / "notes[1].txt"
    path.write_text("To be, or not to be. " * 10)
    code, out, err = nanoghost("data", path, "--vocab-size", 280, "--json")
    assert code == 0 and json.loads(out)["batch_milliseconds"] is None, err
    assert "notes[1].txt" in json.loads(out)["attribution"]
    code, _, err = nanoghost("data", path, "--vocab-size", 280)
    assert code == 0 and "notes[1].txt" in err and "too short" in err
