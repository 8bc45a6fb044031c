"""What a tool is: a function from one text to one text that a model may call, with a description for the model.

To add a tool, write one file with a `Tool`, and add it to TOOLS in registry.py. If the model made a
mistake, the tool returns a text that begins with "error: ", for the model to read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ToolResult:
    content: str
    """What the model reads."""
    passages: list[dict] = field(default_factory=list)
    """Passages that were retrieved, for display: "n" (the number to cite), "source" and "text"."""


def always() -> bool:
    return True


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    argument: str
    """Name of the argument, a text."""
    argument_description: str
    function: Callable[[str], ToolResult]
    is_available: Callable[[], bool] = always
    """Whether the tool can run on this machine."""

    @property
    def schema(self) -> dict:
        """OpenAI's function object."""
        properties = {self.argument: {"type": "string", "description": self.argument_description}}
        parameters = {"type": "object", "properties": properties, "required": [self.argument]}
        return {"name": self.name, "description": self.description, "parameters": parameters}

    def run(self, arguments: dict) -> ToolResult:
        """Call the tool with the arguments that a model wrote."""
        text = arguments.get(self.argument)
        if not isinstance(text, str):
            return ToolResult(f'error: the arguments need a text "{self.argument}"')
        return self.function(text)
