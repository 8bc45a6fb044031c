"""Every stage and the examination, at one process and at several: the same losses, the same attempts, and the work shared out."""

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nanoghost import distributed, hardware
from nanoghost.home import ModelFolder
from tests.support.ranks import in_ranks

TOY = (
    "--arch",
    "llama",
    "--depth",
    "2",
    "--context",
    "160",
    "--batch",
    "6",
    "--vocab-size",
    "320",
    "--learning-rate",
    "0.3",
)
STAGES = {
    "sft": ("sft", "toy", "--lessons", "200", "--batch", "4", "--steps", "4"),
    "rl": ("rl", "toy", "--steps", "2", "--problems", "6", "--rollouts", "4", "--max-tokens", "6", "--eval-problems", "6", "--sft-rows", "2"),
    "sequence": ("distill", "toy", "--teacher", "toy-talker", "--examples", "24", "--max-tokens", "8", "--batch", "6", "--steps", "3",
                 "--data", "talk.jsonl"),
    "token": ("distill", "toy", "--teacher", "toy", "--kind", "token", "--examples", "20", "--batch", "6", "--steps", "3",
              "--data", "notes.txt"),
    "on-policy": ("distill", "toy", "--teacher", "toy-talker", "--kind", "on-policy", "--examples", "20", "--batch", "6", "--steps", "2",
                  "--max-tokens", "8", "--data", "notes.txt"),
}  # fmt: skip


def all_stages(home: str) -> None:
    """In a copy of `home` for so many processes, in fp32; how many tokens this process read and wrote is noted."""
    hardware.cpu_dtype = lambda flags: torch.float32
    rank, world = distributed.rank_and_world_size()
    os.chdir(home)
    os.environ["NANOGHOST_HOME"] = f"{home}/{world}"
    from nanoghost import cli
    from nanoghost.model.llama import Llama

    hidden, read = Llama.hidden, [0]

    def counting(self, tokens, *rest, **named):
        read[0] += tokens.numel()
        return hidden(self, tokens, *rest, **named)

    Llama.hidden = counting
    work = {}
    commands = {name: [*words, "--name", f"toy-{name}"] for name, words in STAGES.items()}
    commands["pretrain"] = ["pretrain", "--data", "notes.txt", "--name", "again", "--steps", "3", *TOY]
    if world == 2:
        for stage in ("pretrain", "sft"):
            commands[f"sharded {stage}"] = [*commands[stage], "--shard", "model"]
            commands[f"sharded {stage}"][commands[stage].index("--name") + 1] = f"toy-sharded-{stage}"
    for name, words in commands.items():
        cli.main(words)
        work[name], read[0] = read[0], 0
    from nanoghost.evals import evaluate

    evaluate.SKILLS = ("sums", "chain_sum")
    figures = evaluate.evaluate(ModelFolder("toy-sft"), 8, cli.importlib.import_module("nanoghost.progress").Display())
    work["eval"] = read[0]
    Path(f"{home}/{world}-{rank}.json").write_text(
        json.dumps({"work": work, "tasks": figures["tasks"], "bpb": figures["bpb"]})
    )


WORLDS = (1, 2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    from nanoghost import cli
    from tests.support.toys import toy_text

    home = tmp_path_factory.mktemp("ranks")
    (home / "notes.txt").write_text(toy_text(400))
    talk = [
        [{"role": "user", "content": f"king {i}?"}, {"role": "assistant", "content": "The king sees."}]
        for i in range(24)
    ]
    (home / "talk.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOGHOST_HOME", str(home / "first"))
        cli.main(["pretrain", "--data", str(home / "notes.txt"), "--name", "toy", "--steps", "30", *TOY])
        cli.main(
            ["sft", "toy", "--name", "toy-talker", "--data", str(home / "talk.jsonl"), "--steps", "60", "--batch", "4"]
        )
    for world in WORLDS:
        shutil.copytree(home / "first", home / str(world))
    in_ranks("tests.test_distributed:all_stages", WORLDS, home)
    return home


def events(home, world, name) -> list[dict]:
    lines = (home / str(world) / "models" / name / "events.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["stage"] != "pretrain" or name in ("again", "toy-sharded-pretrain")]


@pytest.mark.parametrize("name", ["again", *(f"toy-{stage}" for stage in STAGES)])
def test_a_stage_learns_the_same_at_one_process_and_at_two(done, name):
    alone = [e for e in events(done, 1, name) if "loss" in e]
    assert alone
    for world in WORLDS[1:]:
        together = [e for e in events(done, world, name) if "loss" in e]
        assert [e["step"] for e in together] == [e["step"] for e in alone]
        assert [e["tokens"] for e in together] == [e["tokens"] for e in alone]
        for key in {"loss", "reward", "entropy", "length", "groups", "lesson_loss"} & set(alone[0]):
            assert [e[key] for e in together] == pytest.approx([e[key] for e in alone], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name, sharded", [("again", "toy-sharded-pretrain"), ("toy-sft", "toy-sharded-sft")])
def test_weights_that_are_shared_out_learn_the_same(done, name, sharded):
    """FSDP2 from outside: the losses, the model that is written, and what is held meanwhile."""
    one, other = (
        [e["loss"] for e in events(done, 2, n) if "loss" in e and e["stage"] == ("pretrain", "sft")["sft" in n]]
        for n in (name, sharded)
    )
    assert len(one) > 2 and other == pytest.approx(one, rel=1e-5)
    models = [safetensors.torch.load_file(done / "2" / "models" / n / "model.safetensors") for n in (name, sharded)]
    for key, tensor in models[0].items():
        torch.testing.assert_close(models[1][key], tensor, rtol=1e-3, atol=1e-4)


def test_the_examination_comes_out_the_same(done):
    found = [json.loads((done / f"{world}-{rank}.json").read_text()) for world in WORLDS for rank in range(world)]
    assert all(f["tasks"] == found[0]["tasks"] for f in found)
    assert [f["bpb"] for f in found] == pytest.approx([found[0]["bpb"]] * len(found), rel=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", *STAGES, "eval"])
def test_the_work_is_shared_out(done, stage):
    """None reads much more than its part; attempts and rows differ in length, so parts are not quite equal."""
    (alone,) = [json.loads((done / "1-0.json").read_text())["work"][stage]]
    for world in WORLDS[1:]:
        parts = [json.loads((done / f"{world}-{rank}.json").read_text())["work"][stage] for rank in range(world)]
        assert max(parts) < 0.8 * alone, (alone, parts)
