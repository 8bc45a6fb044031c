"""The chat template of an imported model: the Jinja program of its authors, run in a sandbox.

Templates paste messages into one string, in which the text of a user looks the same as a special token. So the names of
special tokens are escaped in messages before rendering, and unescaped when the rendered text is split into special
tokens and plain text.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import text_of


@dataclass(frozen=True)
class ChatTemplate:
    """How an imported model writes conversations."""

    source: str
    """The Jinja template."""
    special_tokens_map: dict[str, str]
    """Names that the template uses for special tokens: bos_token, eos_token."""
    stop_ids: set[int]
    """Tokens that end a reply."""

    @property
    def supports_tools(self) -> bool:
        """Whether the template lists tools and writes calls in the form that reply_parser.py reads."""
        return re.search(r"\btools\b", self.source) is not None and "<tool_call>" in self.source

    def render(
        self, messages: list[dict], tokenizer, add_generation_prompt: bool = False, tools: list[dict] | None = None
    ) -> tuple[list[int], list[bool]]:
        """(token ids, loss mask) of a conversation; arguments as for chat_format.render.

        The template does not mark what the assistant writes. A reply is found as the difference between the
        conversation with it and the conversation up to the header before it. Some templates rewrite earlier replies
        (they drop old reasoning). Then only the last reply can be found, and the mask covers only that one.
        """
        if "tool" not in self.source:
            messages = tool_messages_as_text(messages)
        special_token_pattern = re.compile(
            "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
        )
        escape_character = unused_character(messages)
        messages = [escape_special_tokens(message, special_token_pattern, escape_character) for message in messages]
        functions = [{"type": "function", "function": tool} for tool in tools or ()] or None
        variables = self.special_tokens_map | {"tools": functions}

        text = render_template(self.source, messages, add_generation_prompt, **variables)
        reply_spans = []
        if not add_generation_prompt:  # a prompt for generation needs no loss mask
            reply_spans = self.find_replies(text, messages, variables)

        ids, loss_mask, position = [], [], 0
        for segment in re.split(f"({special_token_pattern.pattern})", text):
            if segment in tokenizer.special_tokens:
                ids.append(tokenizer.special_tokens[segment])
                loss_mask.append(in_spans(position, reply_spans))
            elif segment:
                positions = [position + i for i, character in enumerate(segment) if character != escape_character]
                for token_id, start in tokenizer.encode_with_offsets(segment.replace(escape_character, "")):
                    ids.append(token_id)
                    loss_mask.append(in_spans(positions[start], reply_spans))
            position += len(segment)
        return ids, loss_mask

    def find_replies(self, text: str, messages: list[dict], variables: dict) -> list[tuple[int, int]]:
        """(start, end) of each assistant message in the rendered text of the conversation."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = render_template(self.source, messages[:i], True, **variables)
            with_reply = render_template(self.source, messages[: i + 1], False, **variables).rstrip()
            if text.startswith(before) and text.startswith(with_reply):
                spans.append((len(before), len(with_reply)))
        return spans


def in_spans(position: int, spans: list[tuple[int, int]]) -> bool:
    return any(start <= position < end for start, end in spans)


def render_template(source: str, messages: list[dict], add_generation_prompt: bool = False, **variables) -> str:
    """The text of a conversation; `variables` are further names that templates use (bos_token, eos_token, tools).

    Raises UserError if the template rejects the conversation.
    """
    try:
        return compile_template(source).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is a program by somebody else and can raise anything
        raise UserError(f"the model's chat template rejects this conversation: {error}") from None


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """The template in the environment of transformers, which templates are written for."""

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(source)


def unused_character(messages: list[dict]) -> str:
    """A character of Unicode's private use area that occurs in no message."""
    text = json.dumps(messages, ensure_ascii=False)
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)


def escape_special_tokens(value, special_token_pattern: re.Pattern, escape_character: str):
    """Insert `escape_character` after the first character of each special token in all strings of a nested value."""
    if isinstance(value, str):
        return special_token_pattern.sub(lambda match: match[0][0] + escape_character + match[0][1:], value)
    if isinstance(value, dict):
        return {
            key: escape_special_tokens(inner, special_token_pattern, escape_character) for key, inner in value.items()
        }
    if isinstance(value, list):
        return [escape_special_tokens(inner, special_token_pattern, escape_character) for inner in value]
    return value


def tool_messages_as_text(messages: list[dict]) -> list[dict]:
    """Tool calls and their results as text in the form of Hermes and Qwen, for templates that do not know tools."""
    converted = []
    for message in messages:
        content = text_of(message)
        if message["role"] == "tool":
            converted.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        for call in message.get("tool_calls") or ():
            name, arguments = json.dumps(call["function"]["name"]), call["function"]["arguments"]
            content += f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'
        converted.append({"role": message["role"], "content": content})
    return converted
