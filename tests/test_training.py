"""The stages at toy size, as a user runs them: from text to a chat, resumed after kill -9, determinism, errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nanoghost.home import ModelFolder
from nanoghost.speedrun import SpeedrunSettings, stage_settings
from tests.support.toys import TOY_FLAGS


def losses(name, stage):
    return {e["step"]: e["loss"] for e in ModelFolder(name).events if e["stage"] == stage and "loss" in e}


def start(*words):
    command = [sys.executable, "-m", "nanoghost", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)


KILLS_ITSELF = """
import os, signal, sys, time
from nanoghost import cli
from nanoghost.home import ModelFolder

append, steps = ModelFolder.append_event, []

def append_or_die(folder, event):
    if "loss" in event:
        steps.append(event)
        while len(steps) == 4 and not list(folder.path.glob("state/*/manifest.json")):
            time.sleep(0.01)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
    return append(folder, event)

ModelFolder.append_event = append_or_die
cli.main(sys.argv[1:])
"""


def killed_after_checkpoint(*words):
    """Run a command that gets SIGKILL in its seventh step, after a checkpoint of the first four steps was saved."""
    command = [sys.executable, "-c", KILLS_ITSELF, *map(str, words), "--checkpoint-seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_own_text_becomes_a_chat(nanoghost, toy_file):
    code, out, err = nanoghost("pretrain", "--data", toy_file, "--name", "mine", "--steps", 150, *TOY_FLAGS, "--json")
    assert code == 0, err
    figures = json.loads(out)
    assert {"name", "parameters", "tokens", "seconds", "tokens_per_second", "flops_per_second", "bpb"} <= set(figures)
    first, *_, last = losses("mine", "pretrain").values()
    assert last < first - 2, "the loss hardly decreased"
    assert figures["bpb"] < 3
    code, out, err = nanoghost(
        "sft", "mine", "--name", "mine-sft", "--steps", 8, "--conversations", 300, "--batch", 4, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["tokens"] == 8 * 4 * 64
    code, out, err = nanoghost("chat", "mine-sft", "--prompt", "Who are you?")
    assert code == 0, err
    assert "<|" not in out
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "mine", "--steps", 150, *TOY_FLAGS)
    assert code == 0, "a finished model with the same settings is shown, not trained again"


def test_own_conversations_can_replace_the_built_in_mix(nanoghost, toy_base, tmp_path):
    chats = tmp_path / "chats.jsonl"
    turn = [{"role": "user", "content": "king?"}, {"role": "assistant", "content": "The king sees."}]
    chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for _ in range(20)))
    code, out, err = nanoghost("sft", toy_base, "--name", "own", "--data", chats, "--steps", 60, "--batch", 4, "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] < 0.5, "the same answer, twenty times, must be learned"
    code, out, err = nanoghost("chat", "own", "--prompt", "king?", "--temperature", 0)
    assert (code, out) == (0, "The king sees."), err


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(nanoghost, toy_file):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert (
            nanoghost("pretrain", "--data", toy_file, "--name", name, "--steps", 6, "--seed", seed, *TOY_FLAGS)[0] == 0
        )
    assert losses("a", "pretrain") == losses("b", "pretrain")
    assert losses("a", "pretrain")[5] != losses("c", "pretrain")[5]


def test_pretraining_resumes_after_kill_9_bit_for_bit(nanoghost, toy_file):
    common = ("--data", toy_file, "--steps", 80, *TOY_FLAGS)
    assert nanoghost("pretrain", "--name", "whole", *common)[0] == 0
    folder = ModelFolder("killed")
    killed_after_checkpoint("pretrain", "--name", "killed", *common)
    assert not folder.is_finished
    assert nanoghost("pretrain", "--name", "killed", *common)[0] == 0
    assert losses("killed", "pretrain") == losses("whole", "pretrain")
    whole = (ModelFolder("whole").path / "model.safetensors").read_bytes()
    assert (folder.path / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_finetuning_resumes_after_kill_9_bit_for_bit(nanoghost, toy_file, stage):
    toy = (
        "--depth",
        2,
        "--context",
        160,
        "--batch",
        4,
        "--vocab-size",
        320,
    )  # the questions of the reasoning gym are long
    assert nanoghost("pretrain", "--data", toy_file, "--name", "toy", "--steps", 6, *toy)[0] == 0
    common = {
        "sft": ("toy", "--steps", 40, "--conversations", 200, "--batch", 2),
        "rl": ("toy", "--steps", 12, "--problems", 2, "--rollouts", 4, "--max-tokens", 6, "--eval-problems", 4),
    }[stage]  # fmt: skip
    # the SFT examples contain the name of the model up to the hyphen, which must be the same
    code, _, err = nanoghost(stage, *common, "--name", "same-whole")
    assert code == 0, err
    killed_after_checkpoint(stage, *common, "--name", "same-killed")
    assert nanoghost(stage, *common, "--name", "same-killed")[0] == 0
    assert losses("same-killed", stage) == losses("same-whole", stage)


def test_ctrl_c_saves_and_the_same_command_resumes(nanoghost, toy_file):
    common = ("--data", toy_file, "--steps", 150, *TOY_FLAGS)
    process = start("pretrain", "--name", "stopped", *common)
    folder = ModelFolder("stopped")
    while len(folder.events) < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 0
    assert "is saved at step" in stderr
    assert list((folder.path / "state").iterdir())
    assert not folder.is_finished
    assert nanoghost("pretrain", "--name", "stopped", *common)[0] == 0
    assert sorted(losses("stopped", "pretrain")) == list(range(150))


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(nanoghost, toy_file):
    code, _, err = nanoghost(
        "pretrain", "--data", toy_file, "--name", "wild", "--steps", 50, *TOY_FLAGS, "--learning-rate", 1e30
    )
    assert code == 2
    line = err.strip().splitlines()[-1]
    for text in ("at step", "examples", "--learning-rate"):
        assert text in line
    assert all(abs(loss) < float("inf") for loss in losses("wild", "pretrain").values())


def test_without_a_compiler_training_works_unless_compile_is_on(nanoghost, toy_file, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "plain", "--steps", 3, *TOY_FLAGS)
    assert code == 0 and "torch.compile is off (there is no C++ compiler)" in err
    code, _, err = nanoghost(
        "pretrain", "--data", toy_file, "--name", "p2", "--steps", 3, *TOY_FLAGS, "--compile", "on"
    )
    assert code == 2 and "compiler" in err


def one_line(err: str) -> str:
    line = err.strip().splitlines()[-1]
    assert line.startswith("nanoghost: ") and "Traceback" not in err
    return line


@pytest.mark.parametrize(
    "words, hints",
    [
        (("pretrain", "--stepz", 3), ["--stepz"]),
        (("pretrain", "--steps", "many"), ["--steps", "many"]),
        (("dance",), ["dance"]),
        (("pretrain", "--data", "nowhere.txt", "--steps", 2), ["nowhere.txt"]),
        (("pretrain", "--data", "bad.jsonl", "--steps", 2), ["bad.jsonl", "2"]),
        (("pretrain", "--data", "empty.txt", "--steps", 2), ["empty"]),
        (("pretrain", "--data", "short.txt", "--steps", 2), ["tokens"]),
        (("chat", "nobody", "--prompt", "hello"), ["nobody"]),
        (("sft", "nobody"), ["nobody"]),
        (("report", "nobody"), ["nobody"]),
        (("chat", "../etc", "--prompt", "hello"), ["../etc"]),
        (("pretrain", "--data", "notes.txt", "--minutes", -1), ["--minutes"]),
        (("pretrain", "--data", "notes.txt", "--steps", 0), ["--steps"]),
        (("pretrain", "--data", "notes.txt", "--steps", 2, "--depth", 0), ["--depth"]),
        (("pretrain", "--data", "notes.txt", "--steps", 2, "--batch", 0), ["--batch"]),
        (("pretrain", "--data", "notes.txt", "--steps", 2, "--micro-batch", 0), ["--micro-batch"]),
        (("pretrain", "--data", "notes.txt", "--steps", 2, "--dial-minutes", 0), ["--dial-minutes"]),
    ],
)
def test_a_mistake_ends_in_one_clear_line(nanoghost, toy_file, tmp_path, monkeypatch, words, hints):
    monkeypatch.chdir(tmp_path)  # where toy_file is, as notes.txt
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("To be, or not to be.")
    code, _, err = nanoghost(*words)
    assert code == 2, err
    line = one_line(err)
    assert len(line) < 400
    for hint in hints:
        assert hint in line
    assert not (ModelFolder("ghost-base").path / "model.safetensors").exists()


def test_other_settings_need_force_which_replaces_the_model(nanoghost, toy_file, toy_base):
    again = ("pretrain", "--data", toy_file, "--name", toy_base, "--steps", 5, *TOY_FLAGS)
    code, _, err = nanoghost(*again)
    assert code == 2 and "--force" in one_line(err) and "steps" in err
    assert nanoghost(*again, "--force")[0] == 0
    assert ModelFolder(toy_base).card.steps == 5


def test_a_corpus_shorter_than_a_batch_still_trains(nanoghost, tmp_path):
    path = tmp_path / "small.txt"
    path.write_text("The king sees the sea. " * 60)
    code, _, err = nanoghost("pretrain", "--data", path, "--name", "small", "--steps", 2, "--depth", 2, "--context", 16,
                             "--batch", 64, "--vocab-size", 280)  # fmt: skip
    assert code == 0, err


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small tmpfs needs root on Linux")
def test_a_full_disk_leaves_nothing_half_written(nanoghost, toy_file, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        monkeypatch.setenv("NANOGHOST_HOME", str(disk))
        code, _, err = nanoghost("pretrain", "--data", toy_file, "--name", "full", "--steps", 3, *TOY_FLAGS)
        assert code == 2 and "No space left" in one_line(err)
        left = [p for p in disk.rglob("*") if p.is_file()]
        assert not [p for p in left if p.suffix == ".tmp" or p.name == "model.safetensors"]
        assert not ModelFolder("full").is_finished
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def run_with_two_processes(*words) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nanoghost"]
    done = subprocess.run([sys.executable, *torchrun, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_two_processes_have_the_losses_of_one(nanoghost, toy_file):
    # small steps: the first ones of Adam amplify rounding
    common = ("--data", toy_file, "--steps", 8, *TOY_FLAGS, "--context", 160, "--json", "--learning-rate", 0.1)
    code, out, err = nanoghost("pretrain", "--name", "one", *common)
    assert code == 0, err
    figures = run_with_two_processes("pretrain", "--name", "two", *common)
    assert figures["tokens"] == json.loads(out)["tokens"]
    one, two = losses("one", "pretrain"), losses("two", "pretrain")
    assert len(two) == 8
    for step, loss in one.items():  # bf16 sums in another order; test_distributed.py tests fp32 to 1e-4
        assert two[step] == pytest.approx(loss, rel=5e-3)
    words = "rl two --name two-rl --steps 2 --problems 4 --rollouts 4 --max-tokens 6 --eval-problems 4 --json"
    figures = run_with_two_processes(*words.split())
    assert set(figures["accuracy"]) == {"chain_sum", "spell_backward"}


def test_the_speedrun_divides_its_minutes_and_each_stage_starts_from_the_one_before():
    stages = stage_settings(SpeedrunSettings(minutes=10, data="notes", seed=7, force=True))
    assert sum(settings.minutes for settings in stages) == pytest.approx(10)
    assert [settings.name for settings in stages] == ["ghost-base", "ghost-sft", "ghost"]
    assert [settings.parent for settings in stages[1:]] == ["ghost-base", "ghost-sft"]
    assert stages[0].data == "notes"
    assert stages[0].depth is None
    assert all(settings.seed == 7 and settings.force for settings in stages)
