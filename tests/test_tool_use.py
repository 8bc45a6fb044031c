"""The tasks that need Python or a lookup: in SFT examples, in RL, and in the SFT mixes."""

import json
import random
import re

import pytest

from nanoghost.data.conversations import load_conversations
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder
from nanoghost.tasks.base import distinct_problems
from nanoghost.tasks.messages import assistant, final_text
from nanoghost.tasks.sft_mix import builtin_conversations, file_conversations
from nanoghost.tasks.tool_use import Lookup, Programs, search_synthetic, tool_runner
from nanoghost.tokenizer.chat_format import render
from nanoghost.tools import sandbox
from nanoghost.tools.registry import TOOLS, lookup_tool, run_tool
from tests.support.engine_toys import ScriptedModel
from tests.test_generate import tokenizer  # noqa: F401
from tests.test_tools import call

WORDS = "sword possess banana letter ghost crown castle brother sister water mirror summer winter silver golden happy"


def test_the_results_in_program_solutions_are_what_python_prints(python_sandbox):
    """The solutions are computed without running the sandbox."""
    for problem in distinct_problems(Programs(WORDS.split()), 12):
        call_message, result, answer = problem.solution
        assert run_tool(call_message["tool_calls"][0], TOOLS) == result["content"]
        assert final_text([answer]).rstrip(".").endswith(problem.answer)


def test_programs_need_the_call_its_result_and_the_answer_at_the_end():
    task, rng = Programs(WORDS.split()), random.Random(0)
    for _ in range(100):
        problem = task.problem(rng, "train")
        call_message, result, answer = problem.solution
        assert task.score(problem, [answer]) == 0.0
        assert task.score(problem, [call_message, result]) == 0.0
        assert task.score(problem, [call_message, result | {"content": "error: "}, answer]) == 0.0
        assert task.score(problem, [call_message, result, assistant(f"{final_text([answer])} Or 77777.")]) == 0.0


def test_lookup_needs_the_call_the_answer_and_the_right_citation():
    task, rng, cited_numbers = Lookup(), random.Random(0), set()
    for _ in range(100):
        problem = task.problem(rng, "train")
        call_message, result, answer = problem.solution
        lookup = {"lookup": lookup_tool(search_synthetic)}
        assert run_tool(call_message["tool_calls"][0], lookup) == result["content"]
        number = re.search(r"\[(\d)\]", final_text([answer]))[1]
        cited_numbers.add(number)
        other_citation = final_text([answer]).replace(f"[{number}]", f"[{int(number) % 3 + 1}]")
        assert task.score(problem, [answer]) == 0.0
        assert task.score(problem, [call_message, result]) == 0.0
        assert task.score(problem, [call_message, result, assistant(other_citation)]) == 0.0
        assert task.score(problem, [call_message, result, assistant(f"I see [{number}].")]) == 0.0
    assert cited_numbers == {"1", "2", "3"}, "the number cannot be guessed: the model must read the passages"


def test_people_of_test_lookups_are_in_no_sft_example():
    rng = random.Random(0)
    names = {}
    for split in ("train", "test"):
        sentences = {Lookup().problem(rng, split).answer for _ in range(300)}
        names[split] = {" ".join(sentence.split()[:2]) for sentence in sentences}
    assert not names["train"] & names["test"]


def test_rl_runs_a_program_only_once(python_sandbox, monkeypatch):
    programs = []
    monkeypatch.setattr(sandbox, "run_python", lambda code: programs.append(code) or "5")
    run = tool_runner({"python"})
    program = call("python", {"code": f"{random.random()}"})
    assert run(program) == "5"
    assert run(program) == "5"
    assert len(programs) == 1


def test_rl_offers_only_the_tools_of_the_problem():
    run = tool_runner({"python"})
    assert run(call("calculator", {"expression": "1+1"})) == "error: no tool is called calculator"


# ── the SFT mixes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("data, tools", [("builtin", {"calculator"}), ("tools", {"calculator", "python", "lookup"})])
def test_tools_that_the_builtin_conversations_call(data, tools):
    card = ModelCard(name="other", stage="adopt", parameters=10)
    called = set()
    for messages in builtin_conversations(data, card, "ghost", 150, 0):
        for message in messages:
            called |= {c["function"]["name"] for c in message.get("tool_calls", ())}
    assert called == tools


@pytest.fixture
def conversation_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turn = [{"role": "user", "content": "king?"}, {"role": "assistant", "content": "The king sees."}]
    for name in ("builtin.jsonl", "a+b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"messages": turn}) + "\n")


@pytest.mark.parametrize("data", ["builtin.jsonl", "tools+builtin.jsonl", "builtin+a+b.jsonl", "a+b.jsonl"])
def test_data_can_name_a_file_alone_or_after_a_mix(conversation_files, data):
    assert file_conversations(data) == load_conversations("a+b.jsonl")


@pytest.mark.parametrize("data", ["builtin", "tools"])
def test_a_mix_alone_names_no_file(conversation_files, data):
    assert file_conversations(data) == []


def test_a_file_alone_gives_no_builtin_conversations():
    card = ModelCard(name="other", stage="adopt", parameters=10)
    assert builtin_conversations("builtin.jsonl", card, "ghost", 10, 0) == []


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sft_and_rl_on_the_tool_tasks(nanoghost, toy_file, python_sandbox):
    toy = ("--depth", 2, "--context", 256, "--batch", 4, "--vocab-size", 320)
    assert nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 6, *toy)[0] == 0
    sft = ("sft", "toy", "--name", "toy-sft", "--data", "tools", "--conversations", 60, "--steps", 4, "--batch", 2)
    code, out, err = nanoghost(*sft, "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] > 0
    rl = ("rl", "toy-sft", "--name", "toy-rl", "--data", "tools", "--tasks", "programs,lookup", "--steps", 2)
    sizes = ("--problems", 2, "--rollouts", 2, "--max-tokens", 8, "--sft-rows", 2, "--eval-problems", 3)
    code, out, err = nanoghost(*rl, *sizes, "--json")
    assert code == 0, err
    assert set(json.loads(out)["accuracy"]) == {"programs", "lookup"}


def test_rl_on_programs_without_the_sandbox_is_refused(nanoghost, toy_base, monkeypatch):
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    code, _, err = nanoghost("rl", toy_base, "--tasks", "programs", "--name", "toy-rl")
    assert code == 2
    assert "pip install 'nanoghost[sandbox]'" in err
    assert not ModelFolder("toy-rl").exists


def test_a_tool_call_in_a_rollout_is_answered_and_scored(tokenizer):  # noqa: F811
    task = Lookup()
    problem = task.problem(random.Random(3), "train")
    prompt = render(list(problem.messages), tokenizer, add_generation_prompt=True)[0]
    solution = render([*problem.messages, *problem.solution], tokenizer)[0][len(prompt) :]
    script = ScriptedModel(tokenizer, prompt, solution)
    sampling = SamplingParams(300, temperature=0)
    [sequence] = generate(script, tokenizer, [prompt], sampling, run_tool=tool_runner({"lookup"}))
    assert task.score(problem, sequence.messages) == 1.0
