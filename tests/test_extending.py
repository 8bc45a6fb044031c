"""docs/extending.md: its examples are added to a copy of the package, and its commands run there at toy size."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.support.documents import apply_diff, code_blocks, stated_output
from tests.support.source_tree import ROOT
from tests.support.toys import TOY_FLAGS, toy_text

BLOCKS = code_blocks("extending.md")
TOY_SIZE = {  # flags that a command of the document gets in addition
    "pretrain": ("--data", "notes.txt", "--steps", 2, *TOY_FLAGS),
    "sft": ("--conversations", 40, "--batch", 2, "--steps", 2),
    "rl": (*"--steps 1 --problems 2 --rollouts 2 --max-tokens 4 --eval-problems 4 --sft-rows 0".split(),),
    "eval": ("--problems", 2),
    "chat": ("--max-tokens", 4, "--temperature", 0),
    "tokens": (),
}


class ExtendedCopy:
    """A copy of the package and its tests with all examples of the document, and a home folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("nanoghost", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for block in BLOCKS:
            file = folder / block.path
            if block.language == "diff":
                file.write_text(apply_diff(file.read_text(), block.code))
            elif block.path:
                assert not file.exists(), f"{block.path} exists already"
                file.write_text(block.code)
        (folder / "notes.txt").write_text(toy_text())
        self.nanoghost("pretrain --name ghost-base", "sft ghost-base --name ghost-sft")

    def python(self, *arguments) -> str:
        """Run Python in the copy; returns its standard output."""
        environment = os.environ | {"NANOGHOST_HOME": str(self.folder / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr or done.stdout
        return done.stdout

    def nanoghost(self, *commands: str) -> str:
        """Run commands at toy size, all in one process because importing torch takes seconds."""
        arguments = []
        for command in commands:
            words = shlex.split(command)
            arguments.append([*words, *map(str, TOY_SIZE[words[0]])])
        return self.python("-c", f"from nanoghost import cli\nfor words in {arguments}: cli.main(words)")

    def pytest(self, arguments: str) -> str:
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(arguments))


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    return ExtendedCopy(tmp_path_factory.mktemp("extended"))


def run_section(extended: ExtendedCopy, section: str) -> list[str]:
    """Run the shell blocks of a section; returns the output of each."""
    outputs = []
    for block in BLOCKS:
        if block.section == section and block.language == "sh":
            programs, arguments = zip(*(line.split(maxsplit=1) for line in block.code.splitlines()))
            assert len(set(programs)) == 1
            run = {"nanoghost": extended.nanoghost, "pytest": extended.pytest}[programs[0]]
            outputs.append(run(*arguments))
    return outputs


def test_a_task_is_trained_and_evaluated(extended):
    run_section(extended, "A task")
    card = (extended.folder / "home/models/months-rl/card.json").read_text()
    assert '"months"' in card
    events = (extended.folder / "home/models/months-rl/events.jsonl").read_text()
    assert '"months in order"' in events


def test_a_policy_loss_trains(extended):
    run_section(extended, "A policy loss")
    assert (extended.folder / "home/models/ghost-grpo/model.safetensors").exists()


def test_a_model_family_passes_the_tests_of_all_families_and_trains(extended):
    outputs = run_section(extended, "A model family")
    assert '"nope"' in (extended.folder / "home/models/nope-sft/config.json").read_text()
    assert " passed" in outputs[-1]


def test_a_command_runs_and_is_listed(extended):
    [output] = run_section(extended, "A command")
    assert output.replace(" | ", "").strip() == "The king sees the sea."
    assert "\n  tokens " in extended.python("-m", "nanoghost", "--help")


def test_a_tool_is_called(extended):
    [block] = [block for block in BLOCKS if block.section == "A tool" and block.language == "python" and not block.path]
    output = extended.python("-c", block.code)
    assert output.splitlines() == stated_output(block.code)


def test_an_extension_is_at_most_one_new_file_and_one_file_with_a_table():
    sections = {block.section for block in BLOCKS}
    assert len(sections) == 5
    for section in sections:
        paths = [b.path for b in BLOCKS if b.section == section and b.path.startswith("nanoghost/")]
        changed = [b.path for b in BLOCKS if b.section == section and b.language == "diff" and b.path in paths]
        assert len(changed) == 1
        assert len(paths) <= 2
