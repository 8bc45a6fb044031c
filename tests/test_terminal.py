"""Chat in the terminal: what is shown, what is kept in the conversation, slash commands, --prompt."""

import io
import json

import pytest
import torch

from nanoghost import cli
from nanoghost.data.conversations import load_conversations
from nanoghost.engine.engine import Engine
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.errors import UserError
from nanoghost.serve.conversation import Conversation, stream_fragments
from nanoghost.serve.terminal import run_slash_command
from nanoghost.tokenizer.chat_format import render
from tests.support.engine_toys import ScriptedModel
from tests.test_generate import run_tool, tokenizer  # noqa: F401

QUESTION = {"role": "user", "content": "?"}
CALL = '\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n'
TOOL_RESULT = "(tool result)"  # the engine inserts the result here, whatever the script says


def reply_of_script(tokenizer, *script):  # noqa: F811
    """(fragments, messages) of a reply that consists of these texts; names of special tokens stand for the tokens."""
    ids = []
    for text in script:
        if text == TOOL_RESULT:
            result = [{"role": "tool", "content": "2"}]
            ids += tokenizer.encode("\n") + render(result, tokenizer, add_generation_prompt=True)[0]
        elif text.startswith("<"):
            ids.append(tokenizer.special_id(text))
        else:
            ids += tokenizer.encode(text)
    return fragments_of_script(tokenizer, ids)


def fragments_of_script(tokenizer, ids):  # noqa: F811
    prompt, _ = render([QUESTION], tokenizer, add_generation_prompt=True)
    model = ScriptedModel(tokenizer, prompt, ids)
    engine = Engine(TorchRunner(model, 1, 512), tokenizer)
    sampling = SamplingParams(max_tokens=300, temperature=0, constrain_calls=False)  # scripts may be malformed
    [sequence] = engine.add(prompt, sampling, run_tool=run_tool)
    return list(stream_fragments(engine, sequence)), sequence.messages


def text_of_fragments(fragments):
    return "".join(fragment.text for fragment in fragments if not fragment.is_tool_call)


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_text_streams_whole_characters_and_a_tool_call_becomes_a_line(tokenizer):  # noqa: F811
    function = {"name": "calculator", "arguments": '{"expression": "1+1"}'}
    messages = [
        QUESTION,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "Voilà: 2 € 👻"},
    ]
    prompt, _ = render([QUESTION], tokenizer, add_generation_prompt=True)
    fragments, _ = fragments_of_script(tokenizer, render(messages, tokenizer)[0][len(prompt) :])
    assert [fragment.text for fragment in fragments if fragment.is_tool_call] == ["calculator(1+1) → 2"]
    assert text_of_fragments(fragments) == "Voilà: 2 € 👻"
    assert not any("\ufffd" in fragment.text for fragment in fragments)


MALFORMED = {
    "not JSON": ("<tool_call>", "\n{oops\n", "</tool_call>", "<|im_end|>"),
    "no arguments": ("<tool_call>", '\n{"name": "calculator"}\n', "</tool_call>", "<|im_end|>"),
    "cut off by its end": ("<tool_call>", '\n{"name": "calculator", "argum', "<|im_end|>"),
}


@pytest.mark.parametrize("script", MALFORMED.values(), ids=MALFORMED)
def test_a_call_that_cannot_be_read_is_a_line_without_json(tokenizer, script):  # noqa: F811
    fragments, _ = reply_of_script(tokenizer, "Well.", *script)
    assert text_of_fragments(fragments).strip() == "Well."
    assert [f.text for f in fragments if f.is_tool_call] == ["(a tool call that cannot be read)"]


def test_a_call_that_the_token_limit_cuts_is_a_line_without_json(tokenizer):  # noqa: F811
    prompt, _ = render([QUESTION], tokenizer, add_generation_prompt=True)
    ids = [tokenizer.special_id("<tool_call>"), *tokenizer.encode(CALL)]
    engine = Engine(TorchRunner(ScriptedModel(tokenizer, prompt, ids), 1, 512), tokenizer)
    [sequence] = engine.add(prompt, SamplingParams(max_tokens=len(ids) - 4, temperature=0), run_tool=run_tool)
    fragments = list(stream_fragments(engine, sequence))
    assert [f.text for f in fragments] == ["(a tool call that cannot be read)"]


def test_a_call_without_end_tag_does_not_hide_the_answer(tokenizer):  # noqa: F811
    fragments, _ = reply_of_script(tokenizer, "<tool_call>", CALL, "<|im_end|>", TOOL_RESULT, "It is 2.", "<|im_end|>")
    assert fragments[0].is_tool_call
    assert text_of_fragments(fragments[1:]) == "It is 2."


def test_a_tool_call_gets_a_line_of_its_own(tokenizer):  # noqa: F811
    script = ["Let me see.", "<tool_call>", CALL, "</tool_call>", "<|im_end|>", TOOL_RESULT, "2.", "<|im_end|>"]
    fragments, _ = reply_of_script(tokenizer, *script)
    texts = [f"[{fragment.text}]" if fragment.is_tool_call else fragment.text for fragment in fragments]
    assert "".join(texts) == "Let me see.\n[calculator(1+1) → 2]2."


# ── what is kept ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def conversation(toy_base):
    return Conversation(toy_base, SamplingParams(max_tokens=8, temperature=1.0), system="Be brief.")


def test_the_oldest_turns_are_dropped_and_the_system_message_stays(conversation):
    for _ in range(8):
        num_dropped = conversation.ask("The king sees the queen.")
        list(conversation.answer())
    assert num_dropped > 0
    assert conversation.messages[0]["role"] == "system"


def test_a_stopped_reply_keeps_the_text_that_was_shown(conversation):
    conversation.ask("Stop here.")
    reply = conversation.answer()
    first_text = next(reply).text
    reply.close()
    assert conversation.messages[-2]["content"] == "Stop here."
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"].startswith(first_text)


def test_a_message_longer_than_the_context_is_refused(conversation):
    with pytest.raises(UserError, match="context"):
        conversation.ask("word " * 200)


def test_stopping_inside_a_tool_call_keeps_only_the_text_before_it(conversation):
    special_id, encode = conversation.tokenizer.special_id, conversation.tokenizer.encode
    script = [*encode("Well."), special_id("<tool_call>"), *encode('{"name')]
    conversation.set_system(None)
    conversation.ask("?")
    conversation.sampling = SamplingParams(max_tokens=len(script) + 50, temperature=0)
    model = conversation.engine.runner.model

    class ScriptThenInterrupt(type(model)):
        def forward(self, tokens, cache=None, **options):
            if not script:
                raise KeyboardInterrupt
            logits = -50 * torch.ones(len(tokens), 1, self.config.vocab_size)
            logits[:, 0, script.pop(0)] = 50.0
            return logits

    model.__class__ = ScriptThenInterrupt
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer())
    assert conversation.messages[-1] == {"role": "assistant", "content": "Well."}


# ── slash commands ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_help_lists_the_commands(conversation):
    assert "/reset" in run_slash_command(conversation, "/help")


def test_an_unknown_command_is_named(conversation):
    assert "/dance" in run_slash_command(conversation, "/dance")


def test_reset_keeps_only_the_system_message(conversation):
    conversation.ask("The king.")
    run_slash_command(conversation, "/reset")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert conversation.transcript == [{"role": "system", "content": "Be brief."}]


def test_system_replaces_or_removes_the_system_message(conversation):
    run_slash_command(conversation, "/system Speak.")
    assert conversation.messages == [{"role": "system", "content": "Speak."}]
    run_slash_command(conversation, "/system")
    assert conversation.messages == []


def test_save_appends_a_conversation_each_time(conversation, tmp_path):
    conversation.ask("The king.")
    path = tmp_path / "saved.jsonl"
    run_slash_command(conversation, f"/save {path}")
    run_slash_command(conversation, f"/save {path}")
    saved = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(saved) == 2
    assert saved[0]["messages"] == conversation.messages


def test_save_without_messages_writes_no_file(conversation, tmp_path):
    path = tmp_path / "saved.jsonl"
    assert "nothing" in run_slash_command(conversation, f"/save {path}")
    assert not path.exists()


def test_save_includes_dropped_turns_and_completes_an_unfinished_last_line(conversation, tmp_path):
    path = tmp_path / "saved.jsonl"
    for turn in range(8):
        conversation.ask(f"The king sees the queen, {turn}.")
        list(conversation.answer())
    path.write_text('{"messages": [{"role": "user", "content": "no line end"}]}')
    run_slash_command(conversation, f"/save {path}")
    _, messages = load_conversations(path)
    assert [m["content"][-2] for m in messages if m["role"] == "user"] == list("01234567")
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert len(messages) > len(conversation.messages)


def test_saving_to_a_bad_path_does_not_end_the_conversation(conversation, tmp_path):
    conversation.ask("The king.")
    path = tmp_path / "saved.jsonl"
    run_slash_command(conversation, f"/save {path}")
    assert "not a file" in run_slash_command(conversation, f"/save {tmp_path}")
    assert "cannot save" in run_slash_command(conversation, f"/save {path}/below/x.jsonl")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_piped_input_gives_plain_output_and_continues_after_errors(nanoghost, toy_base, monkeypatch, capsys):
    lines = "Hello\n/dance\n" + "word " * 300 + "\n" + "The king sees the queen.\n" * 8
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    cli.main(["chat", toy_base, "--max-tokens", "4"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x01" not in out
    assert out.startswith("toy, ")
    assert "/dance is not a command" in out
    assert out.count("context holds 64") == 1
    assert out.count("no longer sees") == 1, "dropped turns are announced once"


def test_prompt_gives_the_same_reply_each_time_and_can_come_from_standard_input(nanoghost, toy_base, monkeypatch):
    """The default seed with --prompt is 0."""
    outputs = []
    for prompt in ("king?", "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO("king?\n"))
        code, out, _ = nanoghost("chat", toy_base, "--prompt", prompt, "--max-tokens", 6)
        assert code == 0
        outputs.append(out)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "flags",
    [("--top-k", -1), ("--temperature", -1), ("--top-p", 0), ("--max-tokens", 0), ("--prompt", "word " * 300)],
)
def test_bad_settings_are_user_errors(nanoghost, toy_base, flags):
    code, out, err = nanoghost("chat", toy_base, "--prompt", "x", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("nanoghost: ")


def test_input_that_is_not_utf8_is_a_user_error(nanoghost, toy_base, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    assert nanoghost("chat", toy_base)[0] == 2
