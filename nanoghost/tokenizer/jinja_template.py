"""The chat template of an imported model: the Jinja program of its authors.

    messages --template_messages.py--> what the template expects --jinja_environment.py--> text --here--> tokens

In messages, the tokens of the template are escaped before rendering, so that what a person types stays text when the
rendered text is split into tokens and plain text.
"""

import os
from dataclasses import dataclass

from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import text_of
from nanoghost.tokenizer.jinja_environment import ESCAPE, PLACEHOLDER, render_template, split_generation_marks
from nanoghost.tokenizer.template_messages import (
    THINK_END,
    THINK_START,
    TemplateTraits,
    adapt,
    as_parts,
    escape_message,
    escape_tokens,
    normalize,
    template_traits,
    without_reserved,
)

Span = tuple[int, int]
"""(start, end) in a text."""


@dataclass(frozen=True)
class ChatTemplate:
    """How an imported model writes conversations."""

    source: str
    """The Jinja template."""
    special_tokens_map: dict[str, str]
    """Names that the template uses for special tokens: bos_token, eos_token."""
    stop_ids: set[int]
    """Tokens that end a reply."""
    tool_use_source: str = ""
    """Another template for conversations with tools; empty if there is none."""

    @classmethod
    def from_json(cls, value: str | list[dict], special_tokens_map: dict[str, str], stop_ids: set[int]):
        """`value`: chat_template of tokenizer_config.json, one template or a list of named ones."""
        sources = (
            {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else {"default": value}
        )
        return cls(sources["default"], special_tokens_map, stop_ids, sources.get("tool_use", ""))

    def to_json(self) -> str | list[dict]:
        """The value of chat_template in tokenizer_config.json."""
        if not self.tool_use_source:
            return self.source
        sources = {"default": self.source, "tool_use": self.tool_use_source}
        return [{"name": name, "template": source} for name, source in sources.items()]

    def traits(self, with_tools: bool) -> TemplateTraits:
        """What the template for conversations with or without tools can write."""
        source = self.source_for(with_tools)
        return template_traits(source, tuple(self.special_tokens_map.items()), source == self.tool_use_source)

    def source_for(self, with_tools: bool) -> str:
        return self.tool_use_source if with_tools and self.tool_use_source else self.source

    @property
    def supports_tools(self) -> bool:
        """Whether the template offers tools to the model, whose calls reply_parser.py reads."""
        return self.traits(with_tools=True).offers_tools

    def render(
        self, messages: list[dict], tokenizer, add_generation_prompt: bool = False, tools: list[dict] | None = None
    ) -> tuple[list[int], list[bool]]:
        """(token ids, loss mask) of a conversation; arguments as for chat_format.render."""
        pattern = tokenizer.template_token_pattern
        traits = self.traits(with_tools=bool(tools))
        messages = adapt([escape_message(message, pattern) for message in normalize(messages)], traits)
        functions = [{"type": "function", "function": tool} for tool in tools or ()]
        program = Program(
            self.source_for(bool(tools)),
            escape_tokens(without_reserved(functions), pattern) or None,
            self.special_tokens_map,
            traits,
        )
        if add_generation_prompt:  # a prompt for generation needs no loss mask
            text, spans = program.render(messages, True), []
        else:
            text, spans = program.render_with_answers(messages)
        return tokenize(text, spans, tokenizer)


@dataclass(frozen=True)
class Program:
    """A template with everything that it is given apart from the messages."""

    source: str
    tools: list[dict] | None
    special_tokens_map: dict[str, str]
    traits: TemplateTraits

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        text, _ = self.render_with_blocks(messages, add_generation_prompt)
        return text

    def render_with_blocks(self, messages: list[dict], add_generation_prompt: bool) -> tuple[str, list[Span]]:
        """The text, and the spans of its generation blocks."""
        text = render_template(self.source, messages, add_generation_prompt, self.tools, **self.special_tokens_map)
        return split_generation_marks(text)

    def generation_prompt(self, messages: list[dict]) -> str | None:
        """The messages and the header of an answer; None if the template has no answer there (to no message at all)."""
        try:
            return self.render(messages, True)
        except UserError:
            return None

    def render_with_answers(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """The text of a conversation, and the span of each answer: what follows the generation prompt before it.

        Templates mark what the assistant generates, or an answer is the difference between two renderings. Some
        templates rewrite earlier answers (they drop old reasoning): then only the last one is found.
        """
        text, spans = self.render_with_blocks(messages, False)
        if spans:
            return text, spans
        for i, message in enumerate(messages):
            prompt = self.generation_prompt(messages[:i]) if message["role"] == "assistant" else None
            if prompt is None:
                continue
            is_last = i == len(messages) - 1
            with_answer = text if is_last else self.render(messages[: i + 1], False)
            end = len(with_answer.rstrip())
            if text.startswith(prompt) and text.startswith(with_answer[:end]):
                spans.append((len(prompt), end))
            elif is_last and (answer := self.continuation(prompt, messages, text[:end])):
                spans.append((len(prompt), len(prompt) + len(answer)))
                text = prompt + answer + text[end:]
        return text, spans

    def continuation(self, prompt: str, messages: list[dict], text: str) -> str:
        """The last answer of a conversation, where the generation prompt says more than the header of the answer does.

        `text` ends with the answer. A prompt that opens <think> is continued with the reasoning, whether the template
        writes it or drops it. Empty if the template writes the messages before the answer in another way.
        """
        answer = messages[-1]
        placeholder = {"role": "assistant", "content": PLACEHOLDER}
        placeholder = as_parts(placeholder) if self.traits.content_is_parts else placeholder
        header = os.path.commonprefix([prompt, text, self.render([*messages[:-1], placeholder], False)])
        if len(header) < len(self.render(messages[:-1], False).rstrip()):
            return ""
        content, opened = text[len(header) :], prompt[len(header) :]
        if THINK_START not in opened or THINK_END in opened:
            return content
        written = text_of(answer)
        reasoning = written.partition(THINK_END)[0].removeprefix(THINK_START) if THINK_END in written else ""
        reasoning = answer.get("reasoning_content", reasoning).strip("\n")
        return f"{reasoning}\n{THINK_END}\n\n" + content.rpartition(THINK_END)[2].lstrip("\n")


def tokenize(text: str, spans: list[Span], tokenizer) -> tuple[list[int], list[bool]]:
    """(token ids, whether each begins in one of the spans) of a rendered conversation."""
    ids, mask, position = [], [], 0
    for segment in tokenizer.template_token_pattern.split(text):
        if segment in tokenizer.template_tokens:
            ids.append(tokenizer.template_tokens[segment])
            mask.append(in_spans(position, spans))
            position += len(segment)
            continue
        for part in segment.split(ESCAPE):  # encoded apart, they cannot be a token again
            for token_id, start in tokenizer.encode_with_offsets(part):
                ids.append(token_id)
                mask.append(in_spans(position + start, spans))
            position += len(part) + len(ESCAPE)
        position -= len(ESCAPE)
    return ids, mask


def in_spans(position: int, spans: list[Span]) -> bool:
    return any(start <= position < end for start, end in spans)
