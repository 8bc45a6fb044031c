"""The tools a model may call, by name. Each takes one text and answers with one; a mistake of the model's comes back as a text
that begins with "error: "."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.tools import sandbox
from nanoghost.tools.calculator import calculate
from nanoghost.tools.retrieval import Documents, Passage


@dataclass(frozen=True)
class Result:
    content: str
    """What the model reads."""
    passages: list[dict] = field(default_factory=list)
    """What was looked up, for people: "n", the number it is cited by, "source" and "text"."""


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    argument: str
    """Name of the text that it takes."""
    explained: str
    """What that text is, for models."""
    answer: Callable[[str], Result]

    @property
    def schema(self) -> dict:
        """OpenAI's function object."""
        properties = {self.argument: {"type": "string", "description": self.explained}}
        parameters = {"type": "object", "properties": properties, "required": [self.argument]}
        return {"name": self.name, "description": self.description, "parameters": parameters}

    def run(self, arguments: dict) -> Result:
        """Answer a call with these arguments."""
        text = arguments.get(self.argument)
        return (
            self.answer(text)
            if isinstance(text, str)
            else Result(f'error: the arguments need a text "{self.argument}"')
        )


def found(passages: list[Passage]) -> Result:
    """Passages under numbers, so that an answer can cite them: [1]."""
    if not passages:
        return Result("nothing was found")
    names = [f"{p.source}, {p.heading[:60]}" if p.heading else p.source for p in passages]
    lines = [f"[{n}] {name}: {p.shown}" for n, (name, p) in enumerate(zip(names, passages), 1)]
    return Result("\n".join(lines), [{"n": n, "source": p.source, "text": p.text} for n, p in enumerate(passages, 1)])


def lookup(search: Callable[[str], list[Passage]]) -> Tool:
    """The tool that searches with this function."""
    return replace(TOOLS["lookup"], answer=lambda query: found(search(query)))


TOOLS = {
    tool.name: tool
    for tool in (
        Tool("calculator", "Work out a sum with + - * / and brackets.", "expression", "for example 12*(3+4)",
             lambda expression: Result(calculate(expression))),
        Tool("python", "Run a Python program. Answers with what it prints and the value of its last line.", "code",
             "for example 'strawberry'.count('r')", lambda code: Result(sandbox.run_python(code) or "nothing was printed")),
        Tool("lookup", "Find passages in the user's documents. Cite one by its number, like [1].", "query",
             "a few words that it should have in it", lambda query: Result("error: there are no documents here")),
    )
}  # fmt: skip


def available(documents: Path | None) -> dict[str, Tool]:
    """The tools that can run here: Python where its sandbox is installed, lookup where there is a folder to look in.

    Raises UserError if there is no such folder.
    """
    tools = {"calculator": TOOLS["calculator"]}
    if sandbox.available():
        tools["python"] = TOOLS["python"]
    if documents:
        tools["lookup"] = lookup(Documents(documents).search)
    return tools


def offer(tokenizer: Tokenizer, model: ModelFolder, documents: Path | None) -> Callable[[dict], str] | None:
    """What runs the calls of a model in a conversation, told of its tools if its template has words for that.

    None where nobody taught it to call anything, neither its makers nor a stage here. Raises UserError if it should look things
    up nevertheless.
    """
    dialect = tokenizer.dialect
    if dialect and not dialect.knows_tools and model.card.stage == "adopt":
        if documents:
            raise UserError(f"{model.name} was not taught to call tools, so it cannot look anything up in {documents}")
        return None
    tools = available(documents)
    if dialect:
        tokenizer.dialect = replace(dialect, tools=tuple(tool.schema for tool in tools.values()))
    return lambda call: run_tool(call, tools)


def run_tool(call: dict, tools: dict[str, Tool]) -> str:
    """What goes into the conversation as the answer to an OpenAI tool call."""
    return answer_call(call, tools).content


def answer_call(call: dict, tools: dict[str, Tool]) -> Result:
    """The same with what was looked up."""
    function = call["function"]
    if function["name"] not in tools:
        return Result(f"error: no tool is called {function['name']}")
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):  # no JSON; a number of 5000 digits; a thousand opening brackets
        return Result("error: the arguments are not JSON")
    return tools[function["name"]].run(arguments if isinstance(arguments, dict) else {})
