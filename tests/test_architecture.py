"""The house: who may import whom, how much there is to read, and a door that opens at once."""

import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
import time

import pytest

from nanoghost import cli
from tests.support.count_lines import ROOT, code_lines, imports_of, table

# From the ground up; a file imports from its own row and the rows below it. A folder stands for all in it.
ROWS = (
    ("foundations", "errors lists runs people licenses machine tokenizer bpe chat template progress model"),
    ("machinery", "optim data tasks tools engine"),
    ("stages", "train evals models doctor plan adopt export bench"),
    ("rooms", "serve sleep"),
    ("experiments", "lab"),
    ("speedrun", "speedrun"),
    ("commands", "cli __main__"),
)
ROW = {name: number for number, (_, names) in enumerate(ROWS) for name in names.split()}
FILES = sorted((ROOT / "nanoghost").rglob("*.py"))


def house_name(module: str) -> str:
    """nanoghost.train.rl -> train; the package itself, which holds the version, has no name."""
    return (module.split(".") + [""])[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "nanoghost")))
def test_nothing_imports_from_above(path):
    own = path.relative_to(ROOT).with_suffix("").parts[1]
    if own == "__init__":
        assert not imports_of(path)
        return
    assert own in ROW, f"{own} has no row in the table above: where does it stand?"
    above = {module for module in imports_of(path) if ROW[house_name(module) or "errors"] > ROW[own]}
    assert not above, f"{own} stands in row '{ROWS[ROW[own]][0]}'"


def test_foundations_are_not_a_heap():
    """Inside the lowest row the order is: errors; runs, machine, tokenizer; chat; model."""
    order = ["errors", "lists progress machine runs people", "tokenizer", "chat template", "model"]
    level = {name: number for number, names in enumerate(order) for name in names.split()}
    for path in FILES:
        own = path.relative_to(ROOT).with_suffix("").parts[1]
        if own in level:
            assert all(level[house_name(m) or "errors"] <= level[own] for m in imports_of(path)), path


# ── how much there is to read ───────────────────────────────────────────────────────────────────────────────────────


def test_code_lines_counts_code():
    source = '"""Title."""\n\nimport x  # why\n# note\n\n\ndef f(a):\n    """Does\n    f."""\n    return g(\n        "text",\n    )\n'
    assert code_lines(source) == 5


def test_from_an_empty_folder_to_a_chat_in_4000_lines():
    counts = table()
    assert "nanoghost/model/ghost.py" in counts and "nanoghost/tokenizer/chat_format.py" in counts
    assert sum(counts.values()) <= 4000, counts


# -- the command line ------------------------------------------------------------------------------------------------


def test_help_answers_at_once_without_torch():
    command = [sys.executable, "-X", "importtime", "-m", "nanoghost", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "nanoghost" in imported and not imported & {"torch", "numpy", "tyro", "tokenizers"}
    seconds = []
    while len(seconds) < 3 and min(seconds, default=1) > 0.5:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nanoghost", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_a_command_parse(name):
    settings, function = cli.load(name)
    assert callable(function)
    assert cli.COMMANDS[name].examples
    for example in cli.COMMANDS[name].examples:
        program, *words = shlex.split(example)
        assert [program, *words[: len(name.split())]] == ["nanoghost", *name.split()]
        assert isinstance(cli.parse(settings, name, words[len(name.split()) :]), settings)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_setting_of_a_command_has_help(name):
    settings, _ = cli.load(name)
    source = "\n".join(inspect.getsource(part) for part in settings.__mro__[:-1])
    for field in dataclasses.fields(settings):
        assert re.search(rf'^    {field.name}: (.|\n    [ )])*\n    """', source, re.M), f"{field.name} has no docstring"


@pytest.mark.parametrize("path", sorted((ROOT / "runs").glob("*.sh")), ids=lambda path: path.name)
def test_the_commands_of_a_run_script_parse(path):
    lines = path.read_text().replace("\\\n", " ").splitlines()
    commands = [
        shlex.split(line) for line in lines if "nanoghost" in line and not line.startswith(("#", "export", "pip"))
    ]
    assert commands
    for words in commands:
        arguments = words[words.index("nanoghost") + 1 :]
        name = cli.command_name(arguments)
        settings, _ = cli.load(name)
        assert isinstance(cli.parse(settings, name, arguments[len(name.split()) :]), settings)
    assert subprocess.run(["sh", "-n", path]).returncode == 0


def test_help_of_a_command_shows_its_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "--help"])
    assert not stopped.value.code
    assert "nanoghost pretrain --data ./my_notes" in capsys.readouterr().out
