"""The modules of nanoghost and the graph of their imports, read from the source (for test_architecture.py)."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Module:
    path: Path
    tree: ast.Module
    imports: set[str] = field(default_factory=set)
    """Modules of nanoghost that this one imports, function-level imports included."""
    inner_imports: dict[int, str] = field(default_factory=dict)
    """Line -> module of nanoghost that is imported inside a function."""

    @property
    def package(self) -> str:
        """nanoghost/train/rl.py -> train; nanoghost/home.py -> home."""
        return self.path.relative_to(ROOT / "nanoghost").with_suffix("").parts[0]

    @property
    def lines(self) -> int:
        return self.path.read_text().count("\n")

    def functions(self) -> Iterable[tuple[str, int]]:
        """(name, number of lines) of every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name, node.end_lineno - node.lineno + 1


@cache
def source_tree() -> dict[str, Module]:
    """All modules of nanoghost by their dotted names."""
    modules = {}
    for path in sorted((ROOT / "nanoghost").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(path, ast.parse(path.read_text()))
    for module in modules.values():
        top_level = {id(node) for node in module.tree.body}
        for node in ast.walk(module.tree):
            for name in imported_modules(node, modules):
                module.imports.add(name)
                if id(node) not in top_level:
                    module.inner_imports[node.lineno] = name
    return modules


def imported_modules(node: ast.AST, modules: Iterable[str]) -> list[str]:
    """Modules of nanoghost that an import statement names; no other node imports any."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in modules]
    if not isinstance(node, ast.ImportFrom):
        return []
    assert not node.level, "a relative import hides from which package it comes"
    names = [f"{node.module}.{alias.name}" for alias in node.names]  # a module of a package, or a name in a module
    return [name if name in modules else node.module for name in names if name in modules or node.module in modules]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected components, Tarjan 1972)."""
    numbers = count()
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = next(numbers)
        stack.append(node)
        for neighbor in sorted(graph[node]):
            if neighbor not in index:
                visit(neighbor)
                lowest[node] = min(lowest[node], lowest[neighbor])
            elif neighbor in stack:
                lowest[node] = min(lowest[node], index[neighbor])
        if lowest[node] == index[node]:
            position = stack.index(node)
            component = stack[position:]
            del stack[position:]
            if len(component) > 1 or node in graph[node]:
                components.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return components


def reachable(graph: dict[str, set[str]], starts: Iterable[str]) -> set[str]:
    """The starts and every node that they reach."""
    seen: set[str] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen
