"""Adopted models whose chat templates refuse some conversations: training, chat, and templates in several files."""

import json

import pytest

from nanoghost.data.conversations import load_conversations
from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.home import ModelFolder
from nanoghost.memory.store import Fact
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.progress import Display
from nanoghost.serve import personal_chat, personal_routing
from nanoghost.serve.conversation import Conversation, ReplyFragment
from nanoghost.serve.personal_chat import PersonalConversation
from nanoghost.train.distill_methods import prompts_of
from tests.support.engine_toys import ScriptedModel
from tests.support.templates import GEMMA, QWEN25, A, Q, caller, result, say, tokenizer_with
from tests.support.toys import random_llama_folder

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>'
SFT = ("--steps", 1, "--batch", 1, "--context", 256)


def source_folder(template: str):
    """A model folder with this template and random weights, as others would publish it."""
    tokenizer = tokenizer_with(template)
    return random_llama_folder("source", LlamaConfig(tokenizer.vocab_size, 512, 1, 32, 2, 1, 32), tokenizer)


@pytest.fixture
def strict(nanoghost, home):
    """Name of an adopted model whose template has no system role and wants roles that alternate."""
    code, _, err = nanoghost("adopt", source_folder(GEMMA).path, "--name", "strict")
    assert code == 0, err
    return "strict"


def write_conversations(path, *conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conversations_that_the_template_rejects_are_left_out_counted_and_named(nanoghost, strict, tmp_path):
    file = write_conversations(
        tmp_path / "chats.jsonl",
        [Q, A],
        [A, Q, A],  # begins with the assistant
        [say("system", "Be brief."), Q, A],
        [Q, A, say("system", "In French."), Q, A],
        [Q, Q, A],
        [Q, A, A],
        [Q],
    )
    code, _, err = nanoghost("sft", strict, "--name", "tuned", "--data", file, *SFT)
    assert code == 0, err
    assert "3 of 7 conversations are left out" in err
    assert f"{file}:2: the model's chat template rejects this conversation: roles must alternate" in err
    assert f"{file}:6: the model's chat template rejects" in err
    assert f"{file}:7: it has no assistant message" in err
    card = ModelFolder("tuned").card
    assert (card.conversations, card.dropped_conversations) == (4, 3)


def test_rl_names_what_it_leaves_out(nanoghost, strict, tmp_path):
    file = write_conversations(tmp_path / "chats.jsonl", [Q, A], [A, Q, A])
    flags = ("--steps", 1, "--problems", 1, "--rollouts", 2, "--max-tokens", 2, "--eval-problems", 1, "--sft-rows", 1)
    code, _, err = nanoghost("rl", strict, "--name", "tuned", "--data", file, *flags)
    assert code == 0, err
    assert f"{file}:2: the model's chat template rejects" in err


def test_distillation_names_the_prompts_it_leaves_out(strict, tmp_path, capsys):
    file = write_conversations(tmp_path / "chats.jsonl", [Q, A], [A, Q], [say("system", "x"), A])
    tokenizer = load_tokenizer(ModelFolder(strict).path)
    assert prompts_of(load_conversations(file), tokenizer, Display()) == [[Q]]
    err = capsys.readouterr().err
    assert f"{file}:2: the model's chat template rejects" in err
    assert f"{file}:3: it has no user message to answer" in err


def test_if_none_is_left_the_error_names_the_first_and_why(nanoghost, strict, tmp_path):
    file = write_conversations(tmp_path / "chats.jsonl", [A, Q, A], [A, Q])
    code, out, err = nanoghost("sft", strict, "--name", "tuned", "--data", file, *SFT)
    assert (code, out) == (2, "")
    assert f"none of the 2 conversations has an answer to learn; {file}:1: the model's chat template rejects" in err


def test_the_builtin_conversations_are_all_learned(nanoghost, strict):
    """With their system messages, parts and tool calls."""
    code, _, err = nanoghost("sft", strict, "--name", "tuned", "--data", "tools", "--conversations", 300, *SFT)
    assert code == 0, err
    assert "left out" not in err


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fact_finds_its_place_in_a_chat_without_a_system_role(strict, me, monkeypatch):
    me.write_facts([Fact(1, "cat's name", "Momo")])
    monkeypatch.setattr(personal_chat, "is_personal", lambda messages: True)
    monkeypatch.setattr(personal_routing, "is_personal", lambda messages: True)
    conversation = PersonalConversation("me", True, strict, SamplingParams(4, temperature=0), "Be brief.")
    conversation.ask("What is my cat's name?")
    prompt = conversation.tokenizer.decode(
        conversation.render_prompt(conversation.prompt_messages()), skip_special=False
    )
    assert "Momo" in prompt
    assert prompt.count("<|im_start|>") == 2, "one question, and the header of the answer"
    list(conversation.answer())
    assert conversation.messages[-1]["role"] == "assistant"


def test_a_chat_continues_after_a_reply_that_was_stopped_at_once(strict):
    """Two questions follow each other then."""
    conversation = Conversation(strict, SamplingParams(4, temperature=0), None)
    conversation.ask("One?")
    conversation.answer().close()
    conversation.ask("Two?")
    prompt = conversation.tokenizer.decode(conversation.render_prompt(conversation.messages))
    assert "One?\n\nTwo?" in prompt


@pytest.mark.parametrize("tools", [None, "calculator"])
def test_a_call_is_a_call_only_if_tools_are_offered(nanoghost, home, tools):
    """A person can ask a coder what a tool call looks like: then its tags are text."""
    assert nanoghost("adopt", source_folder(QWEN25).path, "--name", "coder")[0] == 0
    conversation = Conversation("coder", SamplingParams(200, temperature=0), None, tools=tools)
    tokenizer = conversation.tokenizer
    conversation.ask("What does a call look like?")
    prompt = conversation.render_prompt(conversation.messages)
    ids = tokenizer.encode(CALL) + [tokenizer.special_id("<|im_end|>")] * 99  # also after the result of a tool
    conversation.engine.runner.model = ScriptedModel(tokenizer, prompt, ids)
    fragments = list(conversation.answer())
    if tools:
        assert fragments[0] == ReplyFragment("calculator(1+1) → 2", is_tool_call=True)
    else:
        assert "".join(fragment.text for fragment in fragments) == CALL
        assert conversation.messages[-1] == {"role": "assistant", "content": CALL}


# ── templates in several places ──────────────────────────────────────────────────────────────────────────────────────


def set_templates(folder, value) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": value}))


@pytest.mark.parametrize("place", ["list", "files"])
def test_named_templates_survive_adoption_training_and_export(nanoghost, home, tmp_path, place):
    folder = source_folder(GEMMA).path
    if place == "list":
        set_templates(folder, [{"name": "tool_use", "template": QWEN25}, {"name": "default", "template": GEMMA}])
    else:
        set_templates(folder, "{{ 'not this one' }}")
        (folder / "chat_template.jinja").write_text(GEMMA)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(QWEN25)
    assert nanoghost("adopt", folder, "--name", "adopted")[0] == 0
    file = write_conversations(tmp_path / "chats.jsonl", [Q, A], [Q, caller("{}"), result("Sun"), A])
    assert nanoghost("sft", "adopted", "--name", "tuned", "--data", file, *SFT)[0] == 0
    assert nanoghost("export", "tuned", "--quant", "f32", "--out", tmp_path / "tuned.gguf")[0] == 0
    assert nanoghost("adopt", tmp_path / "tuned.gguf", "--name", "again")[0] == 0
    for name in ("adopted", "tuned", "again"):
        template = load_tokenizer(ModelFolder(name).path).chat_template
        assert (template.source, template.tool_use_source) == (GEMMA, QWEN25)
