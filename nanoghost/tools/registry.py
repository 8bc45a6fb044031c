"""The tools that a model may call, by name; which of them a model gets; and calls of them.

A call of an unknown tool, or with arguments that are not JSON, returns a text that begins with "error: ".
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder
from nanoghost.tasks.base import MIXES
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


def learned_tool_calls(card: ModelCard) -> bool:
    """Whether a stage of its training here taught a model to call tools: RL, or a built-in mix of conversations."""
    return any(
        ancestor.stage == "rl" or ancestor.settings.get("data", "").partition("+")[0] in MIXES
        for ancestor in card.lineage()
        if ancestor.stage in ("sft", "distill", "rl")
    )


def tools_for_model(
    model: ModelFolder, chat_template, documents: Path | None, names: str | None = None
) -> dict[str, Tool]:
    """The tools that a chat offers to a model.

    `names`: those that the user asks for, separated by commas. Otherwise a model that learned here to call tools gets
    all that are available, and any other model only lookup, if there are `documents`. Raises UserError for a name that
    is not available, for documents without lookup, and for an adopted model whose `chat_template` (None for ours)
    cannot offer tools.
    """
    if documents and names is not None and "lookup" not in names.split(","):
        raise UserError("--documents is searched by the tool lookup: add it to --tools, or leave out --documents")
    available = available_tools(documents)
    if names is not None:
        requested = [name for name in names.split(",") if name]
    elif learned_tool_calls(model.card):
        return available
    else:
        requested = ["lookup"] if documents else []
    for name in requested:
        if name not in available:
            raise UserError(f"there is no tool '{name}' here; available: {', '.join(available)} (lookup: --documents)")
    if requested and chat_template and not (chat_template.supports_tools or learned_tool_calls(model.card)):
        raise UserError(f"{model.name} was not trained to call tools, so it cannot call {', '.join(requested)}")
    return {name: available[name] for name in requested}


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
