"""Conversations for chat templates with the traits of well-known ones: their form, what is typed, what is learned."""

import json
from itertools import groupby

import pytest

from nanoghost.errors import UserError
from nanoghost.serve.request_parsing import render_prompt
from nanoghost.serve.schema import Function
from nanoghost.tokenizer.chat_format import render, tool_response_ids
from nanoghost.tokenizer.jinja_environment import render_template, split_generation_marks
from nanoghost.tokenizer.reply_parser import parse_reply
from tests.support.templates import (
    CONVERSATIONS,
    DEEPSEEK_R1,
    GEMMA,
    LLAMA3,
    OPEN_THINK,
    QWEN25,
    TEMPLATES,
    TOWN,
    WEATHER,
    A,
    Q,
    caller,
    for_transformers,
    result,
    say,
    tokenizer_with,
)

TOKENIZERS = {name: tokenizer_with(source) for name, source in TEMPLATES.items()}
WRITES_CALLS = ("qwen2.5", "qwen3")
each_template = pytest.mark.parametrize("name", TEMPLATES)


def text_of_prompt(messages, tokenizer, tools=None, generation=True):
    return tokenizer.decode(render(messages, tokenizer, generation, tools)[0], skip_special=False)


def learned_texts(messages, tokenizer):
    """The texts of the runs of tokens in the loss."""
    ids, mask = render(messages, tokenizer)
    runs = [[i for i, _ in run] for in_loss, run in groupby(zip(ids, mask), lambda pair: pair[1]) if in_loss]
    return [tokenizer.decode(run, skip_special=False) for run in runs]


def accepted(name):
    """(messages, prompt) of the conversations that the template accepts."""
    for messages in CONVERSATIONS:
        try:
            yield messages, render(messages, TOKENIZERS[name], True)[0]
        except UserError as error:
            assert "alternate" in str(error), "nothing but the order of roles is rejected"


# ── the form ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_a_template_gets_what_users_of_transformers_hand_it(name, tools):
    """Text as content and arguments as objects, whatever the form of the conversation."""
    template = TOKENIZERS[name].chat_template
    functions = tools and [{"type": "function", "function": tool} for tool in tools]
    for messages in CONVERSATIONS:
        expected = for_transformers(messages)
        for message in expected:
            message["reasoning_content"] = (
                message.get("reasoning") or message.get("thinking") or message.get("reasoning_content", "")
            )
        text = render_template(template.source, expected, True, functions, **template.special_tokens_map)
        assert text_of_prompt(messages, TOKENIZERS[name], tools) == text


@each_template
def test_a_call_is_written_as_it_is_read(name):
    """In the template's own form if that is ours, too, otherwise as text: the model learns what the parser reads."""
    tokenizer = TOKENIZERS[name]
    for arguments in (TOWN, "{}", '{"a": {"<b>": [1, 2.5, null, "é"]}}'):
        messages = [Q, caller(arguments)]
        ids, mask = render(messages, tokenizer)
        start = len(render([Q], tokenizer, True)[0])
        assert mask[start] or name == "mistral"  # its header of an answer is empty, and an answer begins with a blank
        call = parse_reply([i for i, in_loss in zip(ids, mask) if in_loss], tokenizer)["tool_calls"][0]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == json.loads(arguments)


@each_template
def test_no_arguments_are_an_empty_object(name):
    assert '{"name": "now", "arguments": {}}' in text_of_prompt(
        [Q, caller("", name="now"), result("noon")], TOKENIZERS[name]
    )


@each_template
def test_arguments_that_are_not_json_stay_valid_json(name):
    text = text_of_prompt([Q, caller("{oops"), result("error")], TOKENIZERS[name])
    assert '"arguments": "{oops"}' in text or name == "qwen3"  # writes text as it is


@each_template
def test_ids_after_a_tool_result_continue_the_conversation(name):
    """Also where the template writes an answer in another way once it is not the last."""
    tokenizer = TOKENIZERS[name]
    question = [Q, caller(TOWN)]
    whole, _ = render([*question, result("Sun")], tokenizer, add_generation_prompt=True)
    ids = tool_response_ids([result("Sun")], tokenizer)
    assert whole[-len(ids) :] == ids
    assert whole[-len(ids) - 1] in tokenizer.stop_ids


def test_content_in_parts_for_a_template_that_knows_nothing_else():
    assert text_of_prompt([say("system", "Be brief."), Q, A, Q], TOKENIZERS["parts"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n"
        "<|im_start|>assistant\nNo.<|im_end|>\n<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_template_for_tools_is_used_with_tools():
    tokenizer = tokenizer_with(GEMMA, tool_use_source=QWEN25)
    assert text_of_prompt([Q], tokenizer).startswith("<|endoftext|><|im_start|>user\nRain?")
    assert '"name": "weather"' in text_of_prompt([Q], tokenizer, [WEATHER])
    assert tokenizer.chat_template.supports_tools
    assert not tokenizer_with(GEMMA).chat_template.supports_tools


def test_a_template_that_needs_tools_is_examined_with_tools():
    """Hermes' template for tools walks over them without asking whether there are any."""
    tokenizer = tokenizer_with(GEMMA, tool_use_source="{% for tool in tools %}{{ tool.type }}{% endfor %}" + QWEN25)
    assert tokenizer.chat_template.supports_tools
    text = text_of_prompt([Q, caller(TOWN), result("Sun")], tokenizer, [WEATHER])
    assert '<tool_call>\n{"name": "weather", "arguments": {"town": ' in text


# ── what a template does not know ────────────────────────────────────────────────────────────────────────────────────


@each_template
def test_a_system_message_is_written_wherever_it_stands(name):
    messages = [say("system", "Be brief."), Q, A, say("system", "In French."), Q]
    text = text_of_prompt(messages, TOKENIZERS[name])
    assert 0 <= text.find("Be brief.") < text.find("Rain?")
    assert "In French." in text


@pytest.mark.parametrize(
    "messages, texts",
    [
        ([say("system", "Be brief."), Q], ["Be brief.\n\nRain?"]),
        ([say("system", "Be brief."), say("system", "And kind."), Q], ["Be brief.\n\nAnd kind.\n\nRain?"]),
        ([say("system", "Be brief.")], ["Be brief."]),
        ([Q, A, say("system", "In French."), Q], ["Rain?", "No.", "In French.\n\nRain?"]),
        ([Q, say("system", "In French."), A, Q], ["Rain?\n\nIn French.", "No.", "Rain?"]),
        ([Q, Q, A, Q], ["Rain?\n\nRain?", "No.", "Rain?"]),
    ],
)
def test_without_a_system_role_its_text_is_part_of_the_next_question(messages, texts):
    turns = text_of_prompt(messages, TOKENIZERS["gemma"]).split("<|im_start|>")[1:-1]
    roles = ["user", "model", "user"][: len(texts)]
    assert turns == [f"{role}\n{text}<|im_end|>\n" for role, text in zip(roles, texts)]


@each_template
def test_what_the_server_adds_is_never_rejected(name):
    """The functions of a client, for a template that does not list them, go where the template takes text."""
    function = Function(**WEATHER)
    for messages in ([Q], [say("system", "Be brief."), Q, A, Q]):
        text = TOKENIZERS[name].decode(render_prompt(messages, TOKENIZERS[name], [function], {}), skip_special=False)
        assert '"name": "weather"' in text or '"name": "weather"' in text.replace("\n", "")
        assert "Rain?" in text


# ── what is typed ────────────────────────────────────────────────────────────────────────────────────────────────────


@each_template
@pytest.mark.parametrize("place", ["user", "system", "assistant", "result", "argument", "key", "tool", "parameter"])
def test_typed_tokens_stay_text(name, place):
    """Special or not: the rendered conversation has the same tokens of the template as one with a harmless word."""
    tokenizer = TOKENIZERS[name]

    def tokens(word):
        arguments = {word if place == "key" else "town": word if place == "argument" else "Rome"}
        messages = [
            say("system", word if place == "system" else "rule"),
            say("user", f"a{word}b {word}" if place == "user" else "question"),
            caller(json.dumps(arguments)),
            result(word if place == "result" else "sun"),
            say("assistant", word if place == "assistant" else "answer"),
            Q,
        ]
        description = word if place == "tool" else "Weather."
        properties = {word if place == "parameter" else "town": {"type": "string", "description": "A town."}}
        tool = {"name": "weather", "description": description, "parameters": {"properties": properties}}
        ids, _ = render(messages, tokenizer, True, [tool])
        names = {i: token for token, i in tokenizer.template_tokens.items()}
        return [names[i] for i in ids if i in names], tokenizer.decode(ids, skip_special=False)

    harmless, _ = tokens("word")
    for token in tokenizer.template_tokens:
        if place == "assistant" and token in ("<think>", "</think>"):
            continue  # the assistant's thinking
        found, text = tokens(token)
        assert found == harmless, token
        assert token in text or place in ("tool", "parameter")


def test_the_thinking_of_an_answer_is_between_tokens():
    tokenizer = TOKENIZERS["qwen2.5"]
    ids, _ = render([Q, say("assistant", "<think>\nhm\n</think>\n\nNo.")], tokenizer)
    assert {tokenizer.template_tokens["<think>"], tokenizer.template_tokens["</think>"]} <= set(ids)


def test_reserved_characters_are_dropped():
    """A person cannot forge the marks that distinguish typed tokens."""
    text = text_of_prompt([say("user", "a\ufdd0<\ufdd0|im_end|>\ufdd1b\ufdd2")], TOKENIZERS["gemma"])
    assert "user\na<|im_end|>b<|im_end|>" in text


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────────


@each_template
def test_an_answer_is_learned_as_the_continuation_of_its_generation_prompt(name):
    """Also where the prompt opens the reasoning, with and without reasoning in the answer."""
    tokenizer = TOKENIZERS[name]
    learned = 0
    for messages, _ in accepted(name):
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            continue
        if messages[-2]["role"] == "assistant":
            continue  # the first of two answers in a row
        ids, mask = render(messages, tokenizer)
        prompt, _ = render(messages[:-1], tokenizer, True)
        end = len(ids) - 1 - ids[::-1].index(tokenizer.special_id("<|im_end|>"))
        if name == "mistral":  # an answer begins with a blank, which may be part of a token of its first word
            prompt = prompt[:-1]
        assert ids[: len(prompt)] == prompt
        assert all(mask[len(prompt) + 1 : end + 1])
        assert not any(mask[end + 1 :])
        learned += 1
    assert learned >= 12


@pytest.mark.parametrize("source", [DEEPSEEK_R1, OPEN_THINK], ids=["dropped", "written"])
@pytest.mark.parametrize(
    "answer, text",
    [
        (say("assistant", "<think>\nhm\n</think>\n\nNo."), "hm\n</think>\n\nNo.<|im_end|>"),
        (say("assistant", "<think>hm</think>No."), "hm\n</think>\n\nNo.<|im_end|>"),
        (A | {"reasoning_content": "hm"}, "hm\n</think>\n\nNo.<|im_end|>"),
        (A, "\n</think>\n\nNo.<|im_end|>"),
        (say("assistant", "<b>No."), "\n</think>\n\n<b>No.<|im_end|>"),
    ],
)
def test_reasoning_is_learned_after_a_prompt_that_opens_it(source, answer, text):
    tokenizer = tokenizer_with(source)
    assert learned_texts([Q, answer], tokenizer) == [text]
    assert learned_texts([Q, A, Q, answer], tokenizer)[-1] == text


def test_generation_blocks_are_what_is_learned():
    block = "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\\n' }}"
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}" + block + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    marked = tokenizer_with(source)
    plain = tokenizer_with(source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    for messages in ([Q, A], [Q, A, Q, A], [say("system", "x"), Q, say("assistant", "é <|im_end|> é")]):
        assert render(messages, marked) == render(messages, plain)
        assert render(messages, marked, True) == render(messages, plain, True)
    assert split_generation_marks("a\ufdd1b\ufdd2c\ufdd1\ufdd2") == ("abc", [(1, 2), (3, 3)])


def test_tojson_has_the_options_of_transformers():
    value = {"b": "é<", "a": [1]}
    source = (
        "{{ v | tojson }} {{ v | tojson(ensure_ascii=True) }} {{ v | tojson(separators=(',', ':'), sort_keys=True) }}"
        "{{ v | tojson(indent=2) }}"
    )
    compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    indented = json.dumps(value, ensure_ascii=False, indent=2)
    plain = json.dumps(value, ensure_ascii=False)
    assert render_template(source, [], v=value) == f"{plain} {json.dumps(value)} {compact}{indented}"


def test_the_texts_of_tokens_stay_text_in_ascii_json():
    tokenizer = tokenizer_with(LLAMA3.replace("tojson(indent=4)", "tojson(ensure_ascii=True)"))
    tool = WEATHER | {"description": "Zürich <|im_end|>"}
    ids, _ = render([Q], tokenizer, True, [tool])
    assert ids.count(tokenizer.special_id("<|im_end|>")) == 2
    assert "Z\\u00fcrich <|im_end|>" in tokenizer.decode(ids, skip_special=False)
