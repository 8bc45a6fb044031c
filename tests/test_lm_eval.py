"""lm-eval evaluates local task files through our server and gets the same scores as our own evaluation.

    make api     # installs lm-eval and runs this

The part about SmolLM2 needs it adopted in $NANOGHOST_HOME.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoghost.bench.http_client import running_server
from nanoghost.engine.engine import open_engine
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.task_accuracy import accuracy
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, home
from nanoghost.lab.retention import GENERAL_KNOWLEDGE
from nanoghost.memory.answers import RoutedModel, contains_values
from nanoghost.tasks.base import distinct_problems
from nanoghost.tasks.registry import all_tasks
from tests.support.serving import ServerProcess, make_home
from tests.support.toys import toy_text

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make api")
pytest.importorskip("transformers", reason="transformers is not installed: make api")

HOME = home()  # of the user who runs the tests
NAMES, COMMON = (
    "ANNA BEN CARL DORA".split(),
    "dataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n",
)
BITS = (
    "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: bits_per_byte}]\n"
)
CHOICE = (
    "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
    "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
)
SKILL = (
    "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{answer}}'\n"
    "process_results: !function scoring.score\n"
    "generation_kwargs: {until: ['<|im_end|>'], max_gen_toks: LONGEST, temperature: 0}\nmetric_list: [{metric: acc}]\n"
)
SCORING = """
from nanoghost.home import ModelFolder
from nanoghost.memory.answers import contains_values
from nanoghost.tasks.base import Problem
from nanoghost.tasks.messages import assistant, user
from nanoghost.tasks.registry import all_tasks

counting = all_tasks(ModelFolder("smollm2").card, "smollm2")["counting"]

def score(doc, results):
    problem = Problem("counting", (user(doc["text"]),), (), doc["answer"])
    return {"acc": counting.score(problem, [assistant(results[0])])}

def knows(doc, results):
    return {"acc": contains_values(results[0], [doc["answer"]])}
"""


def lm_eval(
    folder: Path, tasks: dict[str, tuple[str, list[dict]]], port: int, model: ModelFolder, context: int, *more: str
) -> dict:
    """The results of `lm_eval` for tasks, each a (form, items): task -> metric -> score."""
    for name, (form, items) in tasks.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + COMMON.format(file=file) + form)
    model_args = (
        f"model={model.name},base_url=http://127.0.0.1:{port}/v1/completions,"
        f"tokenizer_backend=huggingface,tokenizer={model.path},max_length={context + 1}"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "local-completions",
        "--model_args",
        f"{model_args},num_concurrent=16",
        "--tasks",
        ",".join(tasks),
        "--include_path",
        folder,
        "--output_path",
        folder / "out",
        *more,
    ]
    alone = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(list(map(str, command)), env=os.environ | alone, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    [results_file] = (folder / "out").rglob("results_*.json")
    return json.loads(results_file.read_text())["results"]


@pytest.mark.parametrize("name", ["plain", "toy"])
def test_bits_per_byte_and_choices_equal_our_own_evaluation(name, tmp_path, monkeypatch):
    """Bits per byte of texts, and the likeliest of four continuations.

    The tolerance for "toy" is larger: its weights are quantized, and its activations are rounded to 8 bits.
    """
    monkeypatch.setenv("NANOGHOST_HOME", str(make_home(tmp_path / "served")))
    folder, context = ModelFolder(name), 64
    model, tokenizer = load_model(folder.path, torch.float32)
    lines = [line for line in toy_text(60, seed=5).split("\n\n") if line.strip()]
    choices = [
        {"text": line.partition("\n")[2], "choices": [f"\n{who}." for who in NAMES], "answer": i % 4}
        for i, line in enumerate(lines[:24])
    ]
    running = ServerProcess(Path(os.environ["NANOGHOST_HOME"]), name)
    try:
        tasks = {"text": (BITS, [{"text": line} for line in lines]), "choice": (CHOICE, choices)}
        results = lm_eval(tmp_path, tasks, running.port, folder, context)
    finally:
        running.stop()
    beginning = tokenizer.special_id("<|endoftext|>")
    ids = [torch.tensor([beginning, *tokenizer.encode(line)]) for line in lines]
    sizes = [len(line.encode()) for line in lines]
    expected = sum(bits_per_byte(model, some, context, size) * size for some, size in zip(ids, sizes)) / sum(sizes)
    assert results["text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5 if name == "plain" else 0.02)

    def likely(text: str, choice: str) -> float:
        head, whole = tokenizer.encode(text), tokenizer.encode(text + choice)
        return model.logprobs(torch.tensor([whole[:-1]]), torch.tensor([whole[1:]]))[0, len(head) - 1 :].sum().item()

    right = [max(range(4), key=lambda i, c=c: likely(c["text"], c["choices"][i])) == c["answer"] for c in choices]
    assert results["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)


@pytest.mark.skipif(
    not (HOME / "models" / "smollm2" / "card.json").exists(), reason="smollm2 is not adopted: nanoghost adopt smollm2"
)
def test_smollm2_scores_equal_our_own_evaluation(tmp_path, monkeypatch):
    """General knowledge (as in `nanoghost lab sleep`) and test problems (as in `nanoghost eval`), as chats."""
    monkeypatch.setenv("NANOGHOST_HOME", str(HOME))
    folder = ModelFolder("smollm2")
    engine = open_engine(folder, slots=16, slot_tokens=512)  # with quantized weights, as in the server
    counting = all_tasks(folder.card, "smollm2")["counting"]
    problems = distinct_problems(counting, 60)
    (tmp_path / "scoring.py").write_text(SCORING)
    tasks = {
        "knowledge": (
            SKILL.replace("LONGEST", "48").replace("scoring.score", "scoring.knows"),
            [{"text": q, "answer": a} for q, a in GENERAL_KNOWLEDGE],
        ),
        "counting": (
            SKILL.replace("LONGEST", "128"),
            [{"text": p.messages[-1]["content"], "answer": p.answer} for p in problems],
        ),
    }
    with running_server("smollm2", 16) as (port, _):
        results = lm_eval(tmp_path, tasks, port, folder, 2047, "--apply_chat_template")
    answers = RoutedModel(folder, None, None).answer([question for question, _ in GENERAL_KNOWLEDGE])
    knowledge = sum(contains_values(a, [word]) for a, (_, word) in zip(answers, GENERAL_KNOWLEDGE)) / len(
        GENERAL_KNOWLEDGE
    )
    solved, _ = accuracy(engine.runner, engine.tokenizer, counting, problems)
    scores = {name: results[name]["acc,none"] for name in tasks}
    print(f"lm-eval {scores}, our own: knowledge {knowledge}, counting {solved['accuracy']}")
    assert scores["knowledge"] == pytest.approx(knowledge)
    assert 0.3 < knowledge < 1
    assert scores["counting"] == pytest.approx(solved["accuracy"])
