"""The environment in which chat templates run: that of transformers (its utils/chat_template_utils.py).

Templates paste messages into one string, in which the text of a user looks the same as a token of the template. Three
noncharacters of Unicode, which are in no text, mark what must stay visible in the result: ESCAPE in tokens that were
typed, GENERATION_START and GENERATION_END around what the template says that the assistant generates.
"""

import json
import re
from datetime import datetime
from functools import lru_cache

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoghost.errors import UserError

ESCAPE, GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1", "\ufdd2"
PLACEHOLDER = "\ufdd3"
"""A content that has no character in common with what a template writes."""
RESERVED = re.compile(f"[{ESCAPE}{GENERATION_START}{GENERATION_END}{PLACEHOLDER}]")


class GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant generates, between two marks."""

    tags = {"generation"}

    def parse(self, parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return GENERATION_START + caller() + GENERATION_END


def raise_exception(message: str):
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes of HTML that Jinja's own filter writes. ESCAPE stays one character."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:
        text = "".join(c if c.isascii() or c == ESCAPE else json.dumps(c)[1:-1] for c in text)
    return text


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    extensions = [GenerationBlock, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = to_json
    return environment.from_string(source)


def render_template(
    source: str, messages: list[dict], add_generation_prompt: bool = False, tools: list[dict] | None = None, **variables
) -> str:
    """The text of a conversation; `variables` are further names that templates use (bos_token, eos_token).

    Raises UserError if the template rejects the conversation.
    """
    variables |= {"tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt}
    try:
        return compile_template(source).render(messages=messages, **variables)
    except Exception as error:  # a template is a program by somebody else and can raise anything
        raise UserError(f"the model's chat template rejects this conversation: {error}") from None


def split_generation_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of generation blocks, and (start, end) of what was between them."""
    plain, spans = "", []
    for part in re.split(f"({GENERATION_START}|{GENERATION_END})", text):
        if part == GENERATION_START:
            start = len(plain)
        elif part == GENERATION_END:
            spans.append((start, len(plain)))
        else:
            plain += part
    return plain, spans
