"""Chat format: the one place that turns a conversation into tokens and a loss mask.

A conversation is a list of OpenAI messages (roles system, user, assistant, tool; `tool_calls` on assistant messages).
Models trained here use ChatML with a special token for each tag:

    <|im_start|>user
    What is 12 + 30?<|im_end|>
    <|im_start|>assistant
    <tool_call>
    {"name": "calculator", "arguments": {"expression": "12 + 30"}}
    </tool_call><|im_end|>
    <|im_start|>tool
    <tool_response>
    42
    </tool_response><|im_end|>
    <|im_start|>assistant
    12 + 30 = 42.<|im_end|>

The loss mask covers what the assistant writes: its text or tool calls, and the <|im_end|> after them. Everything
between the tags is encoded as plain text, so a user cannot type a special token. A message's content may be a list of
text parts (OpenAI's form). Parts are encoded separately, which lets a training example spell a word letter by letter.

Imported models have a Jinja template instead (jinja_template.py). The way back, from tokens to a message, is
reply_parser.py.
"""

import json
from collections.abc import Iterator

from nanoghost.tokenizer.tokenizer import Tokenizer

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which reasoning is found; this format does not write it."""

TEMPLATE_START = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
"""Every version of the template begins like this."""

# The same text as `render`, for programs that read the model folder: they give arguments as text (OpenAI's form) or as
# objects (that of transformers and vLLM). A test compares the two.
CHAT_TEMPLATE = (
    TEMPLATE_START
    + """\
{%- macro arguments(call) -%}
{%- set value = call.function.arguments -%}
{{ value | tojson if value is not string else value or '{}' }}
{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ '\\n' }}
{%- if message.role == 'tool' -%}
<tool_response>{{ '\\n' }}{{ text(message.content) }}{{ '\\n' }}</tool_response>
{%- else -%}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ '\\n' }}{"name": {{ call.function.name | tojson }}, "arguments": {{ arguments(call) }}}
{{- '\\n' }}</tool_call>
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}"""
)


def is_own_template(template: str | list[dict]) -> bool:
    """Whether a model folder's template, in any version, is the format of this module."""
    return isinstance(template, str) and template.startswith(TEMPLATE_START)


def text_parts(message: dict) -> list[str]:
    """The text parts of a message's content: one for a string, none for empty content."""
    content = message.get("content")
    if not content:
        return []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def text_of(message: dict) -> str:
    """The text of a message's content."""
    return "".join(text_parts(message))


def segments(messages: list[dict]) -> Iterator[tuple[str, bool, bool]]:
    """A conversation as segments (text, is_special, in_loss). A special segment is the name of a special token."""
    for message in messages:
        is_assistant = message["role"] == "assistant"
        yield "<|im_start|>", True, False
        yield message["role"] + "\n", False, False
        if message["role"] == "tool":
            yield "<tool_response>", True, False
            yield "\n" + text_of(message) + "\n", False, False
            yield "</tool_response>", True, False
        else:
            for part in text_parts(message):
                yield part, False, is_assistant
            for call in message.get("tool_calls") or []:
                name = json.dumps(call["function"]["name"], ensure_ascii=False)
                yield "<tool_call>", True, is_assistant
                arguments = call["function"]["arguments"] or "{}"  # clients send "" for no arguments
                yield f'\n{{"name": {name}, "arguments": {arguments}}}\n', False, is_assistant
                yield "</tool_call>", True, is_assistant
        yield "<|im_end|>", True, is_assistant
        yield "\n", False, False


def render(
    messages: list[dict], tokenizer: Tokenizer, add_generation_prompt: bool = False, tools: list[dict] | None = None
) -> tuple[list[int], list[bool]]:
    """(token ids, loss mask) of a conversation.

    `add_generation_prompt` appends the header of an assistant message, so that the model continues with its reply.
    `tools` are function objects (OpenAI's form) for the chat template of an imported model. Models trained here ignore
    them: they learned their tools in training.
    """
    if tokenizer.chat_template:
        return tokenizer.chat_template.render(messages, tokenizer, add_generation_prompt, tools)
    ids, loss_mask = [], []
    for text, is_special, in_loss in segments(messages):
        segment_ids = [tokenizer.special_id(text)] if is_special else tokenizer.encode(text)
        ids += segment_ids
        loss_mask += [in_loss] * len(segment_ids)
    if add_generation_prompt:
        header = [tokenizer.special_id("<|im_start|>"), *tokenizer.encode("assistant\n")]
        ids += header
        loss_mask += [False] * len(header)
    return ids, loss_mask


def render_text(messages: list[dict], add_generation_prompt: bool = False) -> str:
    """A conversation in this format as text, with the names of the special tokens."""
    text = "".join(text for text, _, _ in segments(messages))
    return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")


def tool_response_ids(results: list[dict], tokenizer: Tokenizer) -> list[int]:
    """The tokens of tool results, from the end of the assistant message that calls the tools to the start of the next.

    The results are rendered after a call, because a template may not accept a conversation that begins with them.
    """
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": result["tool_call_id"], "type": "function", "function": function} for result in results]
    context = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    context_ids, _ = render(context, tokenizer)
    ids, _ = render(context + results, tokenizer, add_generation_prompt=True)
    # Templates can write an earlier answer in another way than the last one, but with as many stop tokens.
    num_stops = sum(token_id in tokenizer.stop_ids for token_id in context_ids)
    stops = [i for i, token_id in enumerate(ids) if token_id in tokenizer.stop_ids]
    return ids[stops[num_stops - 1] + 1 :]


def truncate_oldest_turns(
    messages: list[dict],
    tokenizer: Tokenizer,
    max_tokens: int,
    add_generation_prompt: bool = False,
    tools: list[dict] | None = None,
) -> list[dict]:
    """The conversation without its oldest turns, so that the rest takes at most `max_tokens` tokens.

    System messages stay. A turn is a user message with everything up to the next user message. The newest turn always
    stays, so the result can still be too long: the caller cuts or refuses.
    """
    turn_starts = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "user"]
    for start in [0, *turn_starts]:
        remaining = [m for i, m in enumerate(messages) if i >= start or m["role"] == "system"]
        ids, _ = render(remaining, tokenizer, add_generation_prompt, tools)
        if len(ids) <= max_tokens:
            break
    return remaining
