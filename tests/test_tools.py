"""The tools by name, the errors that a model can read, and which tools a model gets."""

import json

import pytest

from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder
from nanoghost.serve.conversation import Conversation
from nanoghost.tasks.messages import assistant
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tools import sandbox
from nanoghost.tools.registry import TOOLS, available_tools, run_tool, tools_for_model
from tests.support.engine_toys import ScriptedModel
from tests.support.toys import TOY_FLAGS
from tests.test_generate import tokenizer  # noqa: F401

MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE_WITHOUT_TOOLS = MESSAGES
TEMPLATE_WITH_TOOLS = (  # the common form of templates that support tools
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    "<tool_call>...</tool_call><|im_end|>\n{% endif %}" + MESSAGES
)


def call(name, arguments):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": text}}


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "bees.md").write_text("# Bees\n\nThe queen lives in the blue hive.\n\n# Wax\n\nThe queen has none.")
    return folder


# ── the tools ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tools():
    assert list(TOOLS) == ["calculator", "python", "lookup"]


@pytest.mark.parametrize("name", TOOLS)
def test_the_schema_of_a_tool_has_one_required_argument(name):
    tool = TOOLS[name]
    assert tool.schema["name"] == name == tool.name
    assert tool.schema["description"] == tool.description
    parameters = tool.schema["parameters"]
    assert list(parameters["properties"]) == parameters["required"] == [tool.argument]


@pytest.mark.parametrize("name", TOOLS)
def test_a_missing_or_wrong_argument_is_an_error_for_the_model(name):
    tool = TOOLS[name]
    for arguments in ({}, {"text": "1"}, {tool.argument: 5}, {tool.argument: None}):
        assert tool.run(arguments).content == f'error: the arguments need a text "{tool.argument}"'


@pytest.mark.parametrize("arguments", ["1+1", '{"expression": 5}', "[]", "{}", '{"expression"', "9" * 5000, "[" * 5000])
def test_malformed_calls_are_errors_for_the_model(arguments):
    assert run_tool(call("calculator", arguments), TOOLS).startswith("error: ")
    assert run_tool(call("weather", arguments), TOOLS) == "error: no tool is called weather"


def test_lookup_numbers_its_passages(documents):
    result = available_tools(documents)["lookup"].run({"query": "Where does the queen live?"})
    first, second = result.content.split("\n")
    assert first == "[1] bees.md, Bees: The queen lives in the blue hive."
    assert second == "[2] bees.md, Wax: The queen has none."
    assert result.passages[0] == {"n": 1, "source": "bees.md", "text": "The queen lives in the blue hive."}
    assert [passage["n"] for passage in result.passages] == [1, 2]


def test_lookup_without_a_match(documents):
    assert available_tools(documents)["lookup"].run({"query": "zebra"}).content == "nothing was found"


def test_the_model_reads_a_short_snippet_of_a_long_passage(documents):
    (documents / "long.txt").write_text("zebra " + "word " * 199)
    result = available_tools(documents)["lookup"].run({"query": "zebra"})
    assert len(result.content.split()) < 60
    assert len(result.passages[0]["text"].split()) == 200


def test_python_runs_in_its_sandbox(python_sandbox):
    assert run_tool(call("python", {"code": "6 * 7"}), available_tools(None)) == "42"
    assert run_tool(call("python", {"code": "x = 1"}), available_tools(None)) == "nothing was printed"


# ── which tools a model gets ─────────────────────────────────────────────────────────────────────────────────────────


def test_python_is_available_only_with_its_sandbox(documents, monkeypatch):
    assert ("python" in available_tools(None)) == sandbox.is_installed()
    monkeypatch.setattr(sandbox, "is_installed", lambda: False)
    assert list(available_tools(documents)) == ["calculator", "lookup"]


def test_lookup_is_available_only_with_documents(documents):
    assert "lookup" not in available_tools(None)
    assert "lookup" in available_tools(documents)


def test_a_folder_without_documents_is_refused(documents):
    with pytest.raises(UserError, match="not a folder"):
        available_tools(documents / "nothing")
    (documents / "empty").mkdir()
    with pytest.raises(UserError, match="no text"):
        available_tools(documents / "empty")


def model_folder(stage, **fields):
    folder = ModelFolder("other")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_card(ModelCard(name="other", stage=stage, **fields))
    return folder


ADOPTED = ModelCard(name="base", stage="adopt")


def chat_template(source, tokenizer):  # noqa: F811
    return ChatTemplate(source, {"eos_token": "<|im_end|>"}, {tokenizer.special_id("<|im_end|>")})


def test_an_adopted_model_gets_the_tools_that_the_user_asks_for(tokenizer, home, documents):  # noqa: F811
    """Its authors taught it other tools. A coder that is offered ours answers with calls."""
    template = chat_template(TEMPLATE_WITH_TOOLS, tokenizer)
    assert tools_for_model(model_folder("adopt"), template, None) == {}
    tools = tools_for_model(model_folder("adopt"), template, documents)
    assert list(tools) == ["lookup"]
    assert run_tool(call("lookup", {"query": "queen"}), tools).startswith("[1] bees.md")
    assert list(tools_for_model(model_folder("adopt"), template, None, "calculator")) == ["calculator"]
    with pytest.raises(UserError, match="--documents is searched by the tool lookup"):
        tools_for_model(model_folder("adopt"), template, documents, "")


@pytest.mark.parametrize("name", ["dice", "lookup"])
def test_a_tool_that_is_not_available_is_named(tokenizer, home, name):  # noqa: F811
    with pytest.raises(UserError, match=f"no tool '{name}' here; available: calculator"):
        tools_for_model(
            model_folder("adopt"), chat_template(TEMPLATE_WITH_TOOLS, tokenizer), None, f"calculator,{name}"
        )


@pytest.mark.parametrize(
    "stage, settings, learned",
    [
        ("sft", {"data": "builtin"}, True),
        ("sft", {"data": "tools+mine.jsonl"}, True),
        ("distill", {"data": "builtin"}, True),
        ("rl", {"data": "mine.jsonl"}, True),
        ("sft", {"data": "mine.jsonl"}, False),
        ("distill", {"data": "notes.txt"}, False),
        ("pretrain", {"data": "tools"}, False),
    ],
)
def test_a_model_that_learned_tool_calls_here_gets_all_tools(tokenizer, home, stage, settings, learned):  # noqa: F811
    """Also if its last stage is another one."""
    template = chat_template(TEMPLATE_WITH_TOOLS, tokenizer)
    parent = ModelCard(name="parent", stage=stage, settings=settings, parent=ADOPTED)
    for folder in (
        model_folder(stage, settings=settings, parent=ADOPTED),
        model_folder("sft", settings={"data": "mine.jsonl"}, parent=parent),
    ):
        tools = tools_for_model(folder, template, None)
        assert list(tools) == (list(available_tools(None)) if learned else [])


def test_the_template_lists_the_tools_before_the_conversation(tokenizer, home, documents):  # noqa: F811
    question = [{"role": "user", "content": "Where does the queen live?"}]
    template = chat_template(TEMPLATE_WITH_TOOLS, tokenizer)
    tools = tools_for_model(model_folder("adopt"), template, documents, "calculator,lookup")
    schemas = [tool.schema for tool in tools.values()]
    without_tools = tokenizer.decode(template.render(question, tokenizer, add_generation_prompt=True)[0])
    with_tools = tokenizer.decode(template.render(question, tokenizer, add_generation_prompt=True, tools=schemas)[0])
    assert "Tools:" not in without_tools
    assert with_tools.endswith(without_tools)
    assert all(f'"name": "{name}"' in with_tools for name in tools)


def test_an_adopted_model_whose_template_has_no_tools_gets_none(tokenizer, home, documents):  # noqa: F811
    template = chat_template(TEMPLATE_WITHOUT_TOOLS, tokenizer)
    assert tools_for_model(model_folder("adopt"), template, None) == {}
    with pytest.raises(UserError, match="other was not trained to call tools"):
        tools_for_model(model_folder("adopt"), template, documents)


def test_a_model_finetuned_here_gets_tools_whatever_its_template(tokenizer, home):  # noqa: F811
    """It was trained on tool calls here."""
    assert tools_for_model(
        model_folder("sft", settings={"data": "builtin"}), chat_template(TEMPLATE_WITHOUT_TOOLS, tokenizer), None
    )


def test_templates_with_another_form_of_calls_do_not_support_tools(tokenizer):  # noqa: F811
    template = chat_template(TEMPLATE_WITH_TOOLS.replace("tool_call>", "call>"), tokenizer)
    assert not template.supports_tools


def test_documents_in_the_terminal(nanoghost, toy_file, documents):
    """A model that calls lookup reads the passages of the folder, and the terminal shows the call."""
    flags = [*TOY_FLAGS[:3], 512, *TOY_FLAGS[4:]]
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 6, *flags)
    assert code == 0, err
    conversation = Conversation("toy", SamplingParams(300, temperature=0), None, documents)
    conversation.ask("Where does the queen live?")
    tokenizer, messages = conversation.tokenizer, conversation.messages  # noqa: F811
    prompt = render(messages, tokenizer, add_generation_prompt=True)[0]
    result = available_tools(documents)["lookup"].run({"query": "queen live"}).content
    reply = [
        assistant("") | {"tool_calls": [call("lookup", {"query": "queen live"})]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
        assistant("In the blue hive [1]."),
    ]
    script = ScriptedModel(tokenizer, prompt, render(messages + reply, tokenizer)[0][len(prompt) :])
    conversation.engine.runner.model = script
    fragments = list(conversation.answer())
    assert [fragment.text for fragment in fragments if fragment.is_tool_call] == [f"lookup(queen live) → {result}"]
    assert "".join(fragment.text for fragment in fragments if not fragment.is_tool_call) == "In the blue hive [1]."
    assert conversation.messages[1:] == reply


def test_a_missing_folder_of_documents_ends_the_chat_command(nanoghost, toy_base, tmp_path):
    code, out, err = nanoghost("chat", toy_base, "--prompt", "x", "--documents", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "not a folder of documents" in err
