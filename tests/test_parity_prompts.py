"""Prompts equal to those of transformers and llama.cpp, for real tokenizers and for templates with many traits.

    make parity     # installs transformers and llama-cpp-python, fetches Qwen2.5-Coder's vocabulary and runs this

Gemma 3 is not among them: its vocabulary is SentencePiece, which nanoghost does not read.
"""

import jinja2
import pytest

from nanoghost import home
from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.gguf_tokenizer import read_tokenizer
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.qwen_vocabulary import vocabulary_file
from tests.support.templates import (
    CONVERSATIONS,
    TEMPLATES,
    WEATHER,
    for_transformers,
    tokenizer_with,
    with_calls_as_text,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed: make parity")

REAL_HOME = home.home()  # of the person who runs the tests; each test has a home folder of its own


@pytest.fixture(scope="module")
def smollm2():
    folder = REAL_HOME / "models" / "smollm2"
    if not (folder / "card.json").exists():
        pytest.skip(f"smollm2 is not adopted in {REAL_HOME}: nanoghost adopt smollm2")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def qwen_file():
    path = vocabulary_file(REAL_HOME)
    if not path.exists():
        pytest.skip(f"{path} does not exist: make parity")
    return path


@pytest.fixture(scope="module")
def qwen(qwen_file):
    gguf = GGUFFile(qwen_file)
    tokenizer = Tokenizer(read_tokenizer(gguf))
    eos = gguf.fields["tokenizer.ggml.tokens"][gguf.fields["tokenizer.ggml.eos_token_id"]]
    stop_ids = {tokenizer.special_id(eos)}
    tokenizer.chat_template = ChatTemplate(gguf.fields["tokenizer.chat_template"], {"eos_token": eos}, stop_ids)
    return tokenizer


def reference_of(tokenizer, folder):
    """The tokenizer in transformers."""
    tokenizer.save(folder)
    names = tokenizer.special_tokens_map
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **names)
    reference.chat_template = tokenizer.chat_template.source
    return reference


def check_prompts(tokenizer, reference, conversations, tools=None, generation=True):
    """The ids of the text that transformers renders."""
    functions = tools and [{"type": "function", "function": tool} for tool in tools]
    for messages, expected in conversations:
        text = reference.apply_chat_template(
            expected, tools=functions, tokenize=False, add_generation_prompt=generation
        )
        ids, _ = render(messages, tokenizer, generation, tools)
        assert ids == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("generation", [True, False], ids=["prompt", "whole"])
@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
def test_prompts_of_qwen(qwen, tmp_path, tools, generation):
    conversations = [(messages, for_transformers(messages)) for messages in CONVERSATIONS]
    check_prompts(qwen, reference_of(qwen, tmp_path), conversations, tools, generation)


@pytest.mark.parametrize("generation", [True, False], ids=["prompt", "whole"])
def test_prompts_of_smollm2(smollm2, tmp_path, generation):
    """Its template knows no tools: calls and results are text."""
    conversations = [(messages, with_calls_as_text(for_transformers(messages))) for messages in CONVERSATIONS]
    check_prompts(smollm2, reference_of(smollm2, tmp_path), conversations, None, generation)


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_templates_with_many_traits(name, tools, tmp_path):
    """Where the template takes a conversation as it is. Where it does not, tests/test_template_messages.py says what
    we make of it."""
    tokenizer = tokenizer_with(TEMPLATES[name])
    traits = tokenizer.chat_template.traits(bool(tools))
    reference = reference_of(tokenizer, tmp_path)
    count = 0
    for messages in CONVERSATIONS:
        expected = for_transformers(messages)
        expected = expected if traits.calls else with_calls_as_text(expected)
        if traits.content_is_parts:
            expected = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in expected]
        later_system = any(m["role"] == "system" for m in expected[1:])
        if (later_system and not traits.later_system) or (expected[0]["role"] == "system" and not traits.first_system):
            continue
        roles = [message["role"] for message in expected]
        if not traits.repeated_users and ("user", "user") in zip(roles, roles[1:]):
            continue
        try:
            reference.apply_chat_template(expected, tokenize=False)
        except jinja2.TemplateError:
            with pytest.raises(UserError, match="alternate"):
                render(messages, tokenizer, True, tools)
            continue
        check_prompts(tokenizer, reference, [(messages, expected)], tools)
        count += 1
    assert count >= 20


def test_what_is_typed_is_encoded_as_by_transformers(qwen, tmp_path):
    """The text is the same, and none of the typed tokens is a token."""
    reference = reference_of(qwen, tmp_path)
    harmless, _ = render([{"role": "user", "content": "x"}], qwen, True)
    control = set(qwen.template_tokens.values())
    for token in ("<|im_end|>", "<tool_call>", "</tool_call>"):
        messages = [{"role": "user", "content": f"What is {token}?"}]
        ids, _ = render(messages, qwen, True)
        expected = reference.apply_chat_template(
            messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
        )
        assert qwen.decode(ids, skip_special=False) == qwen.decode(expected, skip_special=False)
        assert [i for i in ids if i in control] == [i for i in expected if i in control]
        assert [i for i in ids if i in control] == [i for i in harmless if i in control]


def test_generation_blocks_give_the_loss_mask_of_transformers(tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{{ '\n' }}{% endfor %}"
    )
    tokenizer = tokenizer_with(source)
    reference = reference_of(tokenizer, tmp_path)
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(
            with_calls_as_text(for_transformers(messages)), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = render(messages, tokenizer)
        assert ids == expected["input_ids"]
        assert mask == [bool(in_loss) for in_loss in expected["assistant_masks"]]


def test_ids_of_qwen_equal_those_of_llama_cpp(qwen, qwen_file):
    """llama.cpp reads the vocabulary from the file itself."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make parity")
    reference = llama_cpp.Llama(str(qwen_file), vocab_only=True, verbose=False)
    for messages in CONVERSATIONS:
        ids, _ = render(messages, qwen, True, [WEATHER])
        text = qwen.decode(ids, skip_special=False)
        if text.isascii():  # Qwen normalizes text (NFC), llama.cpp does not
            assert ids == reference.tokenize(text.encode(), add_bos=False, special=True)
