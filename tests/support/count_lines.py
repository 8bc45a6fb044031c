"""How much there is to read from `speedrun.py` to the chat: python -m tests.support.count_lines

Counts lines of code, without blank lines, comments and docstrings, of every file that `nanoghost/speedrun.py` and
`nanoghost/serve/terminal.py` import, directly or through others. What only some runs need (your own files, the Hub, models
that others trained) is imported inside the functions that need it, and does not count.
"""

import ast
import io
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
STARTS = ("nanoghost.speedrun", "nanoghost.serve.terminal")
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def path_of(module: str) -> Path | None:
    """The file of a module or package of ours, None if there is none."""
    base = ROOT.joinpath(*module.split("."))
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def imports_of(path: Path, inside: bool = True) -> set[str]:
    """The modules of ours that a file imports; with `inside`, also what is imported inside functions."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide where a file stands"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if path_of(name)}  # the others are names in a module
            found |= modules | ({node.module} if modules != names else set())
    return {name for name in found if name.partition(".")[0] == "nanoghost"}


def reachable(starts=STARTS) -> set[str]:
    """Modules that are imported from the starts, and these themselves."""
    found, waiting = set(), list(starts)
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            path = path_of(module)
            assert path, f"there is no module {module}"
            waiting += imports_of(path, inside=False)
    return found


def code_lines(source: str) -> int:
    """Lines that hold code: a string that stands alone is a docstring, wherever it stands."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in LAYOUT for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def table() -> dict[str, int]:
    """Lines of code by file."""
    paths = sorted(path_of(module) for module in reachable())
    return {str(path.relative_to(ROOT)): code_lines(path.read_text()) for path in paths}


if __name__ == "__main__":
    counts = table()
    for file, count in [*counts.items(), ("in all", sum(counts.values()))]:
        print(f"{count:6,}  {file}")
