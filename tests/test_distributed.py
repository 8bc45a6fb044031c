"""Every stage and the evaluation with one process and with two: same losses, same samples, and the work is shared."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanoghost import cli, distributed, hardware
from nanoghost.evals import evaluate
from nanoghost.home import ModelFolder
from nanoghost.model.llama import Llama
from nanoghost.progress import Display
from nanoghost.tasks.registry import all_tasks
from tests.support.ranks import in_ranks
from tests.support.toys import toy_text

TOY = "--arch llama --depth 2 --context 160 --batch 6 --vocab-size 320 --learning-rate 0.3".split()
STAGES = {
    "sft": "sft toy --conversations 200 --batch 4 --steps 4",
    "rl": "rl toy --steps 2 --problems 6 --rollouts 4 --max-tokens 6 --eval-problems 6 --sft-rows 2",
    "sequence": "distill toy --teacher toy-talker --examples 24 --max-tokens 24 --batch 6 --steps 3 --data talk.jsonl",
    "token": "distill toy --teacher toy --kind token --examples 20 --batch 6 --steps 3 --data notes.txt",
    "on-policy": "distill toy --teacher toy-talker --kind on-policy --examples 20 --batch 6 --steps 2 --max-tokens 8"
    " --data notes.txt",
}
WORLD_SIZES = (1, 2)
COMPARED = ("loss", "reward", "entropy", "length", "groups_with_signal", "sft_loss")  # keys of events


def stage_commands(world_size: int) -> dict[str, list[str]]:
    commands = {name: [*words.split(), "--name", f"toy-{name}"] for name, words in STAGES.items()}
    commands["pretrain"] = ["pretrain", "--data", "notes.txt", "--name", "again", "--steps", "3", *TOY]
    if world_size > 1:
        for stage in ("pretrain", "sft"):
            sharded = [*commands[stage], "--shard", "model"]
            sharded[sharded.index("--name") + 1] = f"toy-sharded-{stage}"
            commands[f"sharded {stage}"] = sharded
    return commands


def two_tasks(base_card, name: str) -> dict:
    tasks = all_tasks(base_card, name)
    return {task: tasks[task] for task in ("sums", "chain_sum")}


def run_all_stages(home: str) -> None:
    """Run every stage in the home `home`/WORLD_SIZE, in fp32; count the tokens that models process here."""
    hardware.cpu_dtype = lambda flags: torch.float32
    rank, world_size = distributed.rank_and_world_size()
    os.chdir(home)
    os.environ["NANOGHOST_HOME"] = f"{home}/{world_size}"
    original_hidden, tokens_read = Llama.hidden, [0]

    def counting_hidden(self, tokens, *rest, **named):
        tokens_read[0] += tokens.numel()
        return original_hidden(self, tokens, *rest, **named)

    Llama.hidden = counting_hidden
    work = {}
    for name, words in stage_commands(world_size).items():
        tokens_read[0] = 0
        cli.main(words)
        work[name] = tokens_read[0]
    evaluate.evaluated_tasks = two_tasks
    tokens_read[0] = 0
    figures = evaluate.evaluate(ModelFolder("toy-sft"), 8, Display())
    work["eval"] = tokens_read[0]
    result = {"work": work, "tasks": figures["tasks"], "bpb": figures["bpb"]}
    Path(f"{home}/{world_size}-{rank}.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the homes 1 and 2, in which all stages have run with that many processes."""
    home = tmp_path_factory.mktemp("ranks")
    (home / "notes.txt").write_text(toy_text(400))
    answer = {"role": "assistant", "content": "The king sees."}
    talk = [[{"role": "user", "content": f"king {i}?"}, answer] for i in range(24)]
    (home / "talk.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    data = str(home / "talk.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", str(home / "first"))
        cli.main(["pretrain", "--data", str(home / "notes.txt"), "--name", "toy", "--steps", "30", *TOY])
        cli.main(["sft", "toy", "--name", "toy-talker", "--data", data, "--steps", "60", "--batch", "4"])
    for world_size in WORLD_SIZES:
        shutil.copytree(home / "first", home / str(world_size))
    in_ranks("tests.test_distributed:run_all_stages", WORLD_SIZES, home)
    return home


def step_events(home, world_size: int, name: str) -> list[dict]:
    """Training steps of the last stage of a model."""
    lines = (home / str(world_size) / "models" / name / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if "loss" in event]
    return [event for event in events if event["stage"] == events[-1]["stage"]]


@pytest.mark.parametrize("name", ["again", *(f"toy-{stage}" for stage in STAGES)])
def test_a_stage_has_the_same_losses_with_one_process_and_with_two(finished, name):
    one, two = (step_events(finished, world_size, name) for world_size in WORLD_SIZES)
    assert one
    assert [e["step"] for e in two] == [e["step"] for e in one]
    assert [e["tokens"] for e in two] == [e["tokens"] for e in one]
    for key in set(COMPARED) & set(one[0]):
        assert [e[key] for e in two] == pytest.approx([e[key] for e in one], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name, sharded", [("again", "toy-sharded-pretrain"), ("toy-sft", "toy-sharded-sft")])
def test_with_sharded_weights_losses_and_model_are_the_same(finished, name, sharded):
    """FSDP2, which wraps the model from outside, against whole weights in each process."""
    whole_losses, sharded_losses = ([e["loss"] for e in step_events(finished, 2, n)] for n in (name, sharded))
    assert len(whole_losses) > 2
    assert sharded_losses == pytest.approx(whole_losses, rel=1e-5)
    whole_tensors, sharded_tensors = (
        safetensors.torch.load_file(finished / "2" / "models" / n / "model.safetensors") for n in (name, sharded)
    )
    for key, tensor in whole_tensors.items():
        torch.testing.assert_close(sharded_tensors[key], tensor, rtol=1e-3, atol=1e-4)


def results_of_rank(home, world_size: int, rank: int) -> dict:
    return json.loads((home / f"{world_size}-{rank}.json").read_text())


def test_the_evaluation_has_the_same_figures_on_every_rank_and_world_size(finished):
    results = [results_of_rank(finished, size, rank) for size in WORLD_SIZES for rank in range(size)]
    assert all(result["tasks"] == results[0]["tasks"] for result in results)
    assert [result["bpb"] for result in results] == pytest.approx([results[0]["bpb"]] * len(results), rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", *STAGES, "eval"])
def test_two_processes_share_the_work(finished, stage):
    """Each reads about half of the tokens: rollouts and rows differ in length, so the parts are not quite equal."""
    alone = results_of_rank(finished, 1, 0)["work"][stage]
    parts = [results_of_rank(finished, 2, rank)["work"][stage] for rank in range(2)]
    assert max(parts) < 0.8 * alone, (alone, parts)
