"""All texts and names of nanoghost, and the checks of their language: python -m tests.support.words [PACKAGE]

Texts are docstrings (those of settings fields are the help of a flag), summaries of commands, and error messages.
Names are classes, functions, parameters, variables, attributes and keys. Comments are not checked.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.source_tree import ROOT

# The left column of the project's glossary: words that grew here, and the field's word for each.
HOME_MADE = {
    "guessing": "speculative decoding",
    "guess": "draft",
    "guesses": "drafts",
    "guessed": "drafted",
    "trust": "draft length",
    "attempts": "rollouts",
    "tries": "rollouts",
    "practice": "RL training",
    "practise": "RL training",
    "practises": "RL training",
    "reinforcement": "RL",
    "examination": "evaluation",
    "examine": "evaluate",
    "examined": "evaluated",
    "lessons": "SFT examples",
    "lesson": "SFT example",
    "rehearsal": "step-time calibration",
    "rehearsals": "step-time calibration",
    "rehearsed": "calibrated",
    "letters": "characters",
    "stretched": "RoPE scaling",
    "dialect": "chat template",
    "seats": "slots",
    "seat": "slot",
    "twins": "sibling samples",
    "watcher": "logits processor",
    "watch": "logits processor",
    "dreams": "synthetic Q&A",
    "dream": "synthetic Q&A",
    "waking": "acceptance test",
    "scribe": "fact extractor",
    "strayed": "false refusals",
    "unheard": "out-of-schema questions",
    "rungs": "recipes (cumulative, leave-one-out, alternatives)",
    "rung": "recipe",
    "ladder": "cumulative ablations",
    "contenders": "baselines",
    "contender": "baseline",
    "rivals": "baselines",
    "rival": "baseline",
    "verbs": "commands",
    "verb": "command",
    "beside": "compared with, next to, with",
    "pupil": "student",
    "anew": "again, from scratch",
}
HOME_MADE_NAMES = {  # words that are fine in a sentence but say nothing as a name
    "said": "a noun for the value",
    "told": "a noun for the value",
    "asked": "a noun for the value",
    "found": "a noun for the value",
    "kept": "a noun for the value",
    "made": "a noun for the value",
    "known": "a noun for the value",
    "own": "a noun for the value",
    "thin": "embedding-row dropout",
    "turned": "permuted (rotary)",
    "voice": "model reference",
    "resting": "free blocks",
    "arriving": "pending",
    "counting": "n-gram baseline",
    "race": "baselines",
    "tried": "alternatives",
    "left_out": "leave_one_out",
    "peers": "baselines",
    "peer": "baseline",
    "ends": "stop ids",
    "marks": "special tokens",
    "packed": "quantized (packing is for sequences)",
    "start_ranks": "init_distributed",
    "mean_over_ranks": "all_reduce_mean",
    "share": "fraction",
}
BRITISH = re.compile(
    r"\b(\w*(token|quanti|optimi|memori|initiali|normali|generali|serial|synchroni|randomi|summari|recogni|organi|modern|"
    r"special|utili|priorit|minimi|maximi|paralleli|emphasi|analy|categori|characteri|finali|visuali|standardi)is(e|es|ed|ing|er|ation)"
    r"|licen[c]e[sd]?|colou?r(?<=our)\w*|behaviou?r(?<=our)\w*|neighbou?r(?<=our)\w*|honou?r(?<=our)\w*|favou?r(?<=our)\w*"
    r"|centre[sd]?|metre|grey|catalogue|travell\w+|labell\w+|modell\w+|cancelling|judgement|practised?|defence|whilst|artefact\w*)\b",
    re.I,
)  # fmt: skip
STIFF = {  # phrases that read as translated
    r"^Of ": "say what it is: a noun, not 'of ...'",
    r"(?<![Tt]here )\bis (none\b|no [a-z])": "'is not a ...' or 'missing'",
    r"\bso many\b": "'N' or 'this many'",
    r"\bby heart\b": "memorized",
    r"\bwith commas between\b": "comma-separated",
    r"\bfor eyes\b": "display",
    r"\bto the letter\b": "exactly",
    r"\bgoes on where\b": "resumes",
    r"\bwrites down\b|\bwritten down\b": "logs, stores",
}


FIELD_PHRASES = re.compile("reinforcement learning|back off", re.I)  # right, though one of their words alone is not


@dataclass(frozen=True)
class Exemption:
    """A word that is right in one place."""

    pattern: str
    """Regular expression of the word or name."""
    where: str
    """Start of the path below nanoghost/."""
    reason: str


EXEMPTIONS = (
    Exemption("letters?", "", "counting letters is a task; character classes are letters"),
    Exemption("counting", "tasks/", "the task of counting the letters of a word"),
    Exemption("practice", "", "the noun in its usual sense"),
    Exemption("ends?", "", "ends of spans and rows"),
    Exemption("packed", "train/", "sequence packing"),
    Exemption("watch", "serve/", "the client watches the engine's process"),
    Exemption("dream", "bench/editions.py", "a play's title"),
    Exemption("is none", "serve/schema.py", "a value of the API: tool_choice is none"),
)


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    kind: str
    text: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kind}: {self.problem}: {' '.join(self.text.split())[:100]}"


def texts(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """(line, kind, text) of docstrings, error messages and command summaries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, "docstring", node.value.value
        elif isinstance(node, ast.Call) and is_message(node):
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                for part in ast.walk(argument):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.lineno, "message", part.value


def is_message(call: ast.Call) -> bool:
    """Whether a call makes an error, prints a line, or defines a command."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name.endswith(("Error", "HTTPException", "Refused")) or name in ("print", "fail", "Command")


def names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that the code defines, and string keys of dicts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and key.value.isidentifier():
                    yield key.lineno, key.value


def words_of_name(name: str) -> list[str]:
    """left_out -> left, out; ModelCard -> model, card"""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def check_text(text: str) -> list[str]:
    """Problems of a docstring or a message."""
    problems = [f"'{match[0]}': {remedy}" for pattern, remedy in STIFF.items() if (match := re.search(pattern, text))]
    for word in re.findall(r"[A-Za-z]+", FIELD_PHRASES.sub("", text)):
        if word.lower() in HOME_MADE:
            problems.append(f"'{word}': {HOME_MADE[word.lower()]}")
    problems += [f"'{match[0]}': American spelling" for match in BRITISH.finditer(text)]
    return problems


def check_name(name: str) -> list[str]:
    problems = []
    words = words_of_name(name)
    if name.lower() in HOME_MADE_NAMES:
        problems.append(f"'{name}': {HOME_MADE_NAMES[name.lower()]}")
    problems += [f"'{word}': {HOME_MADE[word]}" for word in words if word in HOME_MADE]
    problems += [f"'{word}': American spelling" for word in words if BRITISH.fullmatch(word)]
    return problems


def is_exempt(path: str, problem: str) -> bool:
    word = problem.split("'")[1]
    return any(path.startswith(e.where) and re.fullmatch(e.pattern, word, re.I) for e in EXEMPTIONS)


def check_source(source: str, path: str) -> list[Finding]:
    """Findings of one file; `path` is below nanoghost/."""
    tree = ast.parse(source)
    findings = []
    for line, kind, text in texts(tree):
        findings += [Finding(path, line, kind, text.strip(), problem) for problem in check_text(text)]
    for line, name in names(tree):
        findings += [Finding(path, line, "name", name, problem) for problem in check_name(name)]
    return [finding for finding in findings if not is_exempt(finding.path, finding.problem)]


def check_package(package: str = "") -> list[Finding]:
    """Findings in all files of nanoghost, or of one package or root module."""
    findings = []
    for path in sorted((ROOT / "nanoghost").rglob("*.py")):
        relative = str(path.relative_to(ROOT / "nanoghost"))
        if relative.startswith(package):
            findings += check_source(path.read_text(), relative)
    return findings


if __name__ == "__main__":
    print(*check_package(*sys.argv[1:]), sep="\n")
