"""The tools that a model may call, by name; which of them a model gets; and calls of them.

A call of an unknown tool, or with arguments that are not JSON, returns a text that begins with "error: ".
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder
from nanoghost.tools import sandbox
from nanoghost.tools.base import Tool, ToolResult
from nanoghost.tools.calculator import calculate
from nanoghost.tools.retrieval import DocumentFolder, Passage

# ── the tools ────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_calculator_tool(expression: str) -> ToolResult:
    return ToolResult(calculate(expression))


def run_python_tool(code: str) -> ToolResult:
    return ToolResult(sandbox.run_python(code) or "nothing was printed")


def python_is_available() -> bool:
    return sandbox.is_installed()


def search_nothing(query: str) -> ToolResult:
    return ToolResult("error: there are no documents here")


def no_documents() -> bool:
    """LOOKUP itself is never available, only what `lookup_tool` makes of it."""
    return False


CALCULATOR = Tool(
    name="calculator",
    description="Work out a sum with + - * / and brackets.",
    argument="expression",
    argument_description="for example 12*(3+4)",
    function=run_calculator_tool,
)
PYTHON = Tool(
    name="python",
    description="Run a Python program. Answers with what it prints and the value of its last line.",
    argument="code",
    argument_description="for example 'strawberry'.count('r')",
    function=run_python_tool,
    is_available=python_is_available,
)
LOOKUP = Tool(
    name="lookup",
    description="Find passages in the user's documents. Cite one by its number, like [1].",
    argument="query",
    argument_description="a few words that it should have in it",
    function=search_nothing,  # `lookup_tool` sets the documents
    is_available=no_documents,
)
TOOLS = {tool.name: tool for tool in (CALCULATOR, PYTHON, LOOKUP)}


def lookup_tool(search: Callable[[str], list[Passage]]) -> Tool:
    """The lookup tool for documents that are searched by this function."""
    return replace(LOOKUP, function=lambda query: numbered_passages(search(query)))


def numbered_passages(passages: list[Passage]) -> ToolResult:
    """Passages with numbers, so that an answer can cite them: [1]."""
    if not passages:
        return ToolResult("nothing was found")
    lines, rows = [], []
    for n, passage in enumerate(passages, 1):
        location = f"{passage.source}, {passage.heading[:60]}" if passage.heading else passage.source
        lines.append(f"[{n}] {location}: {passage.snippet}")
        rows.append({"n": n, "source": passage.source, "text": passage.text})
    return ToolResult("\n".join(lines), rows)


# ── which tools a model gets ─────────────────────────────────────────────────────────────────────────────────────────


def available_tools(documents: Path | None) -> dict[str, Tool]:
    """The tools that can run here: python if its sandbox is installed, lookup if there is a folder of documents.

    Raises UserError if the folder does not exist.
    """
    tools = {name: tool for name, tool in TOOLS.items() if tool.is_available()}
    if documents:
        tools["lookup"] = lookup_tool(DocumentFolder(documents).search)
    return tools


def tools_for_model(model: ModelFolder, chat_template, documents: Path | None) -> dict[str, Tool]:
    """The available tools; none for an adopted model whose chat template (None for ours) has no place for tools.

    Raises UserError if such a model is given documents.
    """
    if model.card.stage == "adopt" and chat_template and not chat_template.supports_tools:
        if documents:
            raise UserError(f"{model.name} was not trained to call tools, so it cannot look anything up in {documents}")
        return {}
    return available_tools(documents)


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def call_tool(call: dict, tools: dict[str, Tool]) -> ToolResult:
    """Run an OpenAI tool call."""
    function = call["function"]
    if function["name"] not in tools:
        return ToolResult(f"error: no tool is called {function['name']}")
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # not JSON; a number of 5000 digits; a thousand opening brackets
        return ToolResult("error: the arguments are not JSON")
    return tools[function["name"]].run(arguments if isinstance(arguments, dict) else {})


def run_tool(call: dict, tools: dict[str, Tool]) -> str:
    """Run an OpenAI tool call; returns the content of the tool message."""
    return call_tool(call, tools).content
