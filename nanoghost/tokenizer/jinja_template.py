"""The chat template of an adopted model: Jinja as its makers wrote it, run in a sandbox.

What people typed stays text: a mark that stands in a message is broken before the template sees it, and mended
afterwards, when marks have been told from text.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import parse_call


@lru_cache(maxsize=16)
def _compiled(source: str):
    def raise_exception(message: str):
        raise TemplateError(message)

    # as transformers sets it up, since templates are written for that
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    return environment.from_string(source)


def render_template(source: str, messages: list[dict], generation: bool = False, **names) -> str:
    """The text of a conversation; `names` are what templates know beside it (bos_token, eos_token, tools).

    A template that refuses the conversation raises UserError.
    """
    try:
        return _compiled(source).render(messages=messages, add_generation_prompt=generation, **names)
    except Exception as e:  # a template is somebody's program: whatever goes wrong in it is its own fault
        raise UserError(f"the model's chat template does not take this conversation: {e}") from None


@dataclass(frozen=True)
class ChatTemplate:
    """How an adopted model writes conversations."""

    source: str
    """The template."""
    special_tokens_map: dict[str, str]
    """What it knows beside the messages: bos_token, eos_token."""
    stop_ids: set[int]
    """Tokens after which an answer is over."""
    tools: tuple[dict, ...] = ()
    """Functions that may be called, in OpenAI's form; told if the template has words for that."""

    @property
    def supports_tools(self) -> bool:
        """Whether its makers taught the model to call functions, in the form that `parse` reads: then the template says so."""
        return re.search(r"\btools\b", self.source) is not None and "<tool_call>" in self.source

    def render(self, messages: list[dict], tokenizer, generation: bool = False) -> tuple[list[int], list[bool]]:
        """As chat.render: token ids, and which of them the model learns to write.

        An answer is what a conversation with it has more than the same conversation up to the header before it. Where a
        template rewrites earlier answers (some drop old thoughts), only the last one can be found, and is learned.
        """
        messages = spoken(messages) if "tool" not in self.source else messages
        mark = re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))))
        sign = _unused(messages)

        def broken(value):
            if isinstance(value, str):
                return mark.sub(lambda m: m[0][0] + sign + m[0][1:], value)
            if isinstance(value, dict):
                return {k: broken(v) for k, v in value.items()}
            return [broken(v) for v in value] if isinstance(value, list) else value

        messages = [broken(m) for m in messages]

        def written(count: int, generation: bool = False) -> str:
            functions = [{"type": "function", "function": tool} for tool in self.tools] or None
            return render_template(
                self.source, messages[:count], generation, tools=functions, **self.special_tokens_map
            )

        text = written(len(messages), generation)
        spans = []
        for i, m in enumerate(messages):
            if m["role"] == "assistant" and not generation:  # whoever writes does not learn
                before, with_it = written(i, generation=True), written(i + 1)
                if text.startswith(before) and text.startswith(with_it.rstrip()):
                    spans.append((len(before), len(with_it.rstrip())))

        ids, learned, at = [], [], 0
        for piece in re.split(f"({mark.pattern})", text):
            if piece in tokenizer.special_tokens:
                ids.append(tokenizer.special_tokens[piece])
                learned.append(any(start <= at < end for start, end in spans))
            elif piece:
                where = [at + i for i, character in enumerate(piece) if character != sign]
                for id, start in tokenizer.encode_with_offsets(piece.replace(sign, "")):
                    ids.append(id)
                    learned.append(any(a <= where[start] < b for a, b in spans))
            at += len(piece)
        return ids, learned

    def parse(self, text: str) -> dict:
        """The assistant message of a text; calls stand between marks: one JSON object, or a list of them."""
        calls = []

        def taken(match: re.Match) -> str:
            inner = match[1].strip()
            found = [parse_call(inner)] if not inner.startswith("[") else [parse_call(c) for c in _elements(inner)]
            if not found or not all(found):
                return match[0]
            calls.extend(
                {"id": f"call_{len(calls) + i}", "type": "function", "function": c} for i, c in enumerate(found, 1)
            )
            return ""

        content = re.sub(r"<tool_call>(.*?)(?:</tool_call>|\Z)", taken, text, flags=re.DOTALL)
        return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


def _elements(text: str) -> list[str]:
    try:
        return [json.dumps(element) for element in json.loads(text)]
    except (ValueError, RecursionError):
        return []


def _unused(messages: list[dict]) -> str:
    """A character of the private use area that no message has."""
    text = json.dumps(messages, ensure_ascii=False)
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)


def spoken(messages: list[dict]) -> list[dict]:
    """Calls and their answers as text, for templates that know of no tools; the form of Hermes and Qwen."""
    plain = []
    for m in messages:
        content = m.get("content") or ""
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        calls = "".join(
            f'<tool_call>\n{{"name": {json.dumps(c["function"]["name"])}, "arguments": {c["function"]["arguments"]}}}\n</tool_call>'
            for c in m.get("tool_calls") or ()
        )
        if m["role"] == "tool":
            plain.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            plain.append({"role": m["role"], "content": content + calls})
    return plain
