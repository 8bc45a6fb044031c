"""How much code there is: python -m tests.support.count_lines

Counts lines of code, without blank lines, comments and docstrings, of the modules that a default speedrun and a chat
load, and of the whole package. Which modules are loaded is measured: a fresh process runs a speedrun with toy sizes,
answers one prompt, and lists `sys.modules`.
"""

import ast
import io
import json
import os
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

from tests.support.source_tree import ROOT
from tests.support.toys import toy_text

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}

# Sizes are replaced, and only the last model is evaluated. The argument is a text file.
TOY_RUN = """
import json, sys
from dataclasses import replace
from nanoghost import cli, speedrun

default_settings = speedrun.stage_settings
evaluate_once = speedrun.evaluate_once

def toy_settings(settings):
    pretrain, sft, rl = default_settings(settings)
    toy = dict(minutes=None, steps=2)
    return (
        replace(pretrain, **toy, dial_minutes=None, depth=1, context=64, batch=2, vocab_size=320),
        replace(sft, **toy, conversations=50, batch=2),
        replace(rl, **toy, problems=2, rollouts=2, max_tokens=4, sft_rows=2, eval_problems=1),
    )

def evaluate_last(name, problems, display):  # once is enough to load what an evaluation needs
    if name == speedrun.FINAL:
        evaluate_once(name, problems, display)

speedrun.stage_settings = toy_settings
speedrun.evaluate_once = evaluate_last
cli.main(["speedrun", "--data", sys.argv[1], "--problems", "1"])
cli.main(["chat", "--prompt", "Hello", "--max-tokens", "4"])
files = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "nanoghost"]
print(json.dumps(sorted(files)))
"""


def code_lines(source: str) -> int:
    """Number of lines that hold code. A string that is a statement of its own is a docstring, wherever it stands."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {line for t in tokens if t.type not in LAYOUT for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def counts(paths: list[Path]) -> dict[str, int]:
    """Lines of code by file."""
    return {str(path.relative_to(ROOT)): code_lines(path.read_text()) for path in paths}


def loaded_files() -> list[Path]:
    """The files of nanoghost that a speedrun and a chat load."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(toy_text())
        process = subprocess.run(
            [sys.executable, "-c", TOY_RUN, text],
            cwd=ROOT,
            env=os.environ | {"NANOGHOST_HOME": str(Path(folder, "home")), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return [Path(file) for file in json.loads(process.stdout.splitlines()[-1])]


def package_files() -> list[Path]:
    return sorted((ROOT / "nanoghost").rglob("*.py"))


if __name__ == "__main__":
    loaded = counts(loaded_files())
    for file, lines in loaded.items():
        print(f"{lines:6,}  {file}")
    print(f"{sum(loaded.values()):6,}  loaded by a default speedrun and chat")
    print(f"{sum(counts(package_files()).values()):6,}  the whole package")
