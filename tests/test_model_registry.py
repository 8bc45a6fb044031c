"""The tools by name, whom they are offered to, and the lessons that call them."""

import json
import random
import re
from dataclasses import replace

import pytest

from nanoghost.data.conversations import load_conversations
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder, write_json
from nanoghost.serve.terminal import Conversation
from nanoghost.tasks import registry, tool_use
from nanoghost.tasks.base import distinct_problems
from nanoghost.tasks.messages import assistant, final_text
from nanoghost.tasks.tool_use import Lookup, Programs
from nanoghost.tokenizer.chat_format import render
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tools import sandbox
from nanoghost.tools.registry import TOOLS, available_tools, lookup_tool, run_tool, tools_for_model
from tests.support.toys import TOY_FLAGS
from tests.test_generate import Scripted, tokenizer  # noqa: F401

WORDS = "sword possess banana letter ghost crown castle brother sister water mirror summer winter silver golden happy".split()
QWEN = (  # what templates that know of tools have in common
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n<tool_call>...</tool_call><|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call(name, arguments):
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": text}}


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "bees.md").write_text(
        "# Bees\n\nThe queen lives in the blue hive.\n\n# Wax\n\nThe queen has none."
    )
    return tmp_path / "notes"


# ── one registry ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tools_take_one_text_and_say_so():
    assert list(TOOLS) == ["calculator", "python", "lookup"]
    for name, tool in TOOLS.items():
        assert tool.schema["name"] == name == tool.name and tool.schema["description"] == tool.description
        parameters = tool.schema["parameters"]
        assert list(parameters["properties"]) == parameters["required"] == [tool.argument]
        for wrong in ({}, {"text": "1"}, {tool.argument: 5}, {tool.argument: None}):
            assert tool.run(wrong).content == f'error: the arguments need a text "{tool.argument}"'


@pytest.mark.parametrize("arguments", ["1+1", '{"expression": 5}', "[]", "{}", '{"expression"', "9" * 5000, "[" * 5000])
def test_what_a_model_got_wrong_comes_back_as_a_text(arguments):
    assert run_tool(call("calculator", arguments), TOOLS).startswith("error: ")
    assert run_tool(call("weather", arguments), TOOLS) == "error: no tool is called weather"


def test_available_is_what_can_run_here(notes, monkeypatch):
    assert ("python" in available_tools(None)) == sandbox.available()
    assert "lookup" not in available_tools(None) and "lookup" in available_tools(notes)
    monkeypatch.setattr(sandbox, "available", lambda: False)
    assert list(available_tools(notes)) == ["calculator", "lookup"]
    with pytest.raises(UserError, match="not a folder"):
        available_tools(notes / "nothing")
    (notes / "empty").mkdir()
    with pytest.raises(UserError, match="no text"):
        available_tools(notes / "empty")


def test_lookup_numbers_its_passages(notes):
    result = available_tools(notes)["lookup"].run({"query": "Where does the queen live?"})
    assert (
        result.content == "[1] bees.md, Bees: The queen lives in the blue hive.\n[2] bees.md, Wax: The queen has none."
    )
    assert result.passages[0] == {"n": 1, "source": "bees.md", "text": "The queen lives in the blue hive."}
    assert [p["n"] for p in result.passages] == [1, 2]
    assert available_tools(notes)["lookup"].run({"query": "zebra"}).content == "nothing was found"
    (notes / "long.txt").write_text("zebra " + "word " * 199)
    result = available_tools(notes)["lookup"].run({"query": "zebra"})
    assert len(result.content.split()) < 60 and len(result.passages[0]["text"].split()) == 200


def test_python_runs_in_its_sandbox(python_sandbox):
    assert run_tool(call("python", {"code": "6 * 7"}), available_tools(None)) == "42"
    assert run_tool(call("python", {"code": "x = 1"}), available_tools(None)) == "nothing was printed"


# ── whom they are offered to ────────────────────────────────────────────────────────────────────────────────────────


def adopted(tokenizer, home, source, stage):  # noqa: F811
    """(tokenizer, folder) of a model with that template, adopted or made from one that was."""
    folder = ModelFolder("other")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_card(ModelCard(name="other", stage=stage))
    tokenizer.chat_template = ChatTemplate(source, {"eos_token": "<|im_end|>"}, {tokenizer.special_id("<|im_end|>")})
    return tokenizer, folder


@pytest.fixture
def other_tokenizer(tokenizer):  # noqa: F811
    yield tokenizer
    tokenizer.chat_template = None


def test_a_template_that_knows_tools_tells_them(other_tokenizer, home, notes):
    question = [{"role": "user", "content": "Where does the queen live?"}]
    made = adopted(other_tokenizer, home, QWEN, "adopt")
    silent = other_tokenizer.decode(render(question, other_tokenizer, generation=True)[0])
    run = offer(*made, notes)
    told = other_tokenizer.decode(render(question, other_tokenizer, generation=True)[0])
    assert (
        "Tools:" not in silent
        and told.endswith(silent)
        and all(f'"name": "{name}"' in told for name in available_tools(notes))
    )
    assert run(call("lookup", {"query": "queen"})).startswith("[1] bees.md")


def test_who_was_not_taught_is_offered_nothing(other_tokenizer, home, notes):
    plain = QWEN[QWEN.index("{% endif %}") + len("{% endif %}") :]
    made = adopted(other_tokenizer, home, plain, "adopt")
    assert offer(*made, None) is None and other_tokenizer.chat_template.tools == ()
    with pytest.raises(UserError, match="other was not taught to call tools"):
        offer(*made, notes)
    assert offer(*adopted(other_tokenizer, home, plain, "sft"), None), "what was finetuned here may have been taught"
    llama = replace(other_tokenizer.chat_template, source=QWEN.replace("tool_call>", "call>"))
    assert not llama.supports_tools, "it writes calls in another form than we read"


def test_documents_in_the_terminal(nanoghost, toy_file, notes, monkeypatch):
    """A model that calls lookup reads what stands in the folder, and the line shows it."""
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 6, *TOY_FLAGS[:3], 512, *TOY_FLAGS[4:])
    assert code == 0, err
    conversation = Conversation("toy", SamplingParams(300, temperature=0), None, notes)
    conversation.ask("Where does the queen live?")
    tokenizer, messages = conversation.tokenizer, conversation.messages  # noqa: F811
    prompt = render(messages, tokenizer, generation=True)[0]
    told = available_tools(notes)["lookup"].run({"query": "queen live"}).content
    asked = assistant("") | {"tool_calls": [call("lookup", {"query": "queen live"})]}
    said = [asked, {"role": "tool", "tool_call_id": "call_1", "content": told}, assistant("In the blue hive [1].")]
    script = Scripted(tokenizer, render(messages + said, tokenizer)[0][len(prompt) :])
    script.start = len(prompt)
    conversation.engine.runner.model = script
    shown = list(conversation.answer())
    assert [s.text for s in shown if s.is_tool] == [f"lookup(queen live) → {told}"]
    assert "".join(s.text for s in shown if not s.is_tool) == "In the blue hive [1]."
    assert conversation.messages[1:] == said
    code, out, err = nanoghost("chat", "toy", "--prompt", "x", "--documents", notes / "nothing")
    assert (code, out) == (2, "") and "not a folder of documents" in err


# ── lessons and practice ────────────────────────────────────────────────────────────────────────────────────────────


def test_programs_in_lessons_print_what_python_prints(python_sandbox):
    for problem in distinct_problems(Programs(WORDS), 12):
        asked, told, answer = problem.solution
        assert run_tool(asked["tool_calls"][0], TOOLS) == told["content"]
        assert final_text([answer]).rstrip(".").endswith(problem.answer)


def test_an_answer_without_the_program_or_with_another_is_wrong():
    task, rng = Programs(WORDS), random.Random(0)
    for _ in range(100):
        problem = task.problem(rng, "train")
        asked, told, answer = problem.solution
        assert task.score(problem, [answer]) == task.score(problem, [asked, told]) == 0.0
        assert task.score(problem, [asked, told | {"content": "error: "}, answer]) == 0.0
        assert task.score(problem, [asked, told, assistant(f"{final_text([answer])} Or 77777.")]) == 0.0


def test_a_note_is_found_read_and_cited():
    task, rng, cited = Lookup(), random.Random(0), set()
    for _ in range(100):
        problem = task.problem(rng, "train")
        asked, told, answer = problem.solution
        assert run_tool(asked["tool_calls"][0], {"lookup": lookup_tool(tool_use.search)}) == told["content"]
        number = re.search(r"\[(\d)\]", final_text([answer]))[1]
        cited.add(number)
        other = final_text([answer]).replace(f"[{number}]", f"[{int(number) % 3 + 1}]")
        for wrong in (
            [answer],
            [asked, told],
            [asked, told, assistant(other)],
            [asked, told, assistant(f"I see [{number}].")],
        ):
            assert task.score(problem, wrong) == 0.0
    assert cited == {"1", "2", "3"}, "which passage it is must be read"


def test_people_in_the_notes_of_the_test_are_in_no_lesson():
    rng = random.Random(0)
    asked = {split: {Lookup().problem(rng, split).answer for _ in range(300)} for split in ("train", "test")}
    names = {split: {" ".join(text.split()[:2]) for text in texts} for split, texts in asked.items()}
    assert not names["train"] & names["test"]


def test_practice_runs_a_program_once(python_sandbox, monkeypatch):
    ran = []
    monkeypatch.setattr(sandbox, "run_python", lambda code: ran.append(code) or "5")
    run = tool_use.practice({"python"})
    program = call("python", {"code": f"{random.random()}"})
    assert run(program) == run(program) == "5" and len(ran) == 1
    assert run(call("calculator", {"expression": "1+1"})) == "error: no tool is called calculator"


def test_the_speedruns_lessons_call_the_calculator_alone(monkeypatch):
    card = ModelCard(name="other", stage="adopt", parameters=10)

    def tools_of(data):
        lessons = registry.lesson_conversations(data, card, "ghost", 150, 0)
        return {c["function"]["name"] for m in lessons for said in m for c in said.get("tool_calls", ())}

    assert tools_of("lessons") == {"calculator"} and tools_of("tools") == {"calculator", "python", "lookup"}


def test_data_names_a_mix_or_a_file_or_both(tmp_path, monkeypatch):
    turn = [{"role": "user", "content": "king?"}, {"role": "assistant", "content": "The king sees."}]
    monkeypatch.chdir(tmp_path)
    for name in ("lessons.jsonl", "a+b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": turn}) + "\n")
    for data in ("lessons.jsonl", "tools+lessons.jsonl", "lessons+a+b.jsonl", "a+b.jsonl"):
        assert registry.own_conversations(data) == load_conversations("a+b.jsonl")
    for data in ("lessons", "tools"):
        assert registry.own_conversations(data) == []
    assert registry.lesson_conversations("lessons.jsonl", {}, "ghost", 10, 0) == []


def test_tools_are_taught_and_practised(nanoghost, toy_file, python_sandbox):
    toy = ("--depth", 2, "--context", 256, "--batch", 4, "--vocab-size", 320)
    assert nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 6, *toy)[0] == 0
    code, out, err = nanoghost(
        "sft", "toy", "--name", "taught", "--data", "tools", "--conversations", 60, "--steps", 4, "--batch", 2, "--json"
    )
    assert code == 0 and json.loads(out)["loss"] > 0, err
    practice = (
        "rl",
        "taught",
        "--tasks",
        "programs,lookup",
        "--steps",
        2,
        "--problems",
        2,
        "--rollouts",
        2,
        "--max-tokens",
        8,
    )
    code, out, err = nanoghost(
        *practice, "--data", "tools", "--sft-rows", 2, "--eval-problems", 3, "--name", "practised", "--json"
    )
    assert code == 0 and set(json.loads(out)["accuracy"]) == {"programs", "notes"}, err


def test_practice_without_the_sandbox_is_refused(nanoghost, toy_base, monkeypatch):
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    code, _, err = nanoghost("rl", toy_base, "--tasks", "programs", "--name", "practised")
    assert code == 2 and "pip install 'nanoghost[sandbox]'" in err and not ModelFolder("practised").exists


def test_a_call_in_practice_is_answered(tokenizer):  # noqa: F811
    """What skills.attempt gives the engine: the whole way from a call to the answer that is scored."""
    task = Lookup()
    problem = task.problem(random.Random(3), "train")
    prompt = render(list(problem.messages), tokenizer, generation=True)[0]
    script = Scripted(tokenizer, render([*problem.messages, *problem.solution], tokenizer)[0][len(prompt) :])
    script.start = len(prompt)
    [row] = generate(script, tokenizer, [prompt], SamplingParams(300, temperature=0), run_tool=tool_use.practice({"lookup"}))
    assert task.score(problem, row.messages) == 1.0
