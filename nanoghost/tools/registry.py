"""The tools that a server can run for a model, by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanoghost.tools import calculator


@dataclass(frozen=True)
class Result:
    """What a tool answers; what a model got wrong comes back as a text that begins with "error: "."""

    content: str
    passages: list[dict] = field(default_factory=list)
    """Of the user's documents: n, source, text."""


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    schema: dict
    """OpenAI's function object: name, description, parameters."""
    run: Callable[[dict], Result]


def _calculate(arguments: dict) -> Result:
    expression = arguments.get("expression")
    return Result(calculator.calculate(expression) if isinstance(expression, str) else 'error: the arguments need a text "expression"')


FUNCTION = calculator.TOOL["function"]
TOOLS = {"calculator": Tool("calculator", FUNCTION["description"], FUNCTION, _calculate)}


def available(documents: Path | None) -> dict[str, Tool]:
    """The tools that can run here; lookup only in a folder of documents."""
    return dict(TOOLS)


def run_tool(call: dict, tools: dict[str, Tool]) -> str:
    """Answer one OpenAI tool call."""
    function = call["function"]
    if function["name"] not in tools:
        return f"error: no tool is called {function['name']}"
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return "error: the arguments are not JSON"
    return tools[function["name"]].run(arguments if isinstance(arguments, dict) else {}).content
