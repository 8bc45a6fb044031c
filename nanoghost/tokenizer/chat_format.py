"""The one place that turns a conversation into tokens and a loss mask, and tokens back into messages.

A conversation is a list of OpenAI messages (roles system, user, assistant, tool; `tool_calls` on assistant messages).
From-scratch models use ChatML, with one token for each of its marks:

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

Only what the assistant writes is learned: its text or call and the <|im_end|> after it. Text between the marks is
encoded as plain text, so nobody can type a mark. A message's content may be a list of text parts (OpenAI's form);
parts are encoded one by one, which lets a lesson write a word letter by letter.
"""

import json

from nanoghost.tokenizer.tokenizer import Tokenizer

# The same text as `render`, for programs that read the model folder (tested equal)
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}{{ '\\n' }}
{%- if message.role == 'tool' -%}
<tool_response>{{ '\\n' }}{{ text(message.content) }}{{ '\\n' }}</tool_response>
{%- else -%}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ '\\n' }}{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments }}}
{{- '\\n' }}</tool_call>
{%- endfor -%}
{%- endif -%}
<|im_end|>{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}"""


def parts_of(message: dict) -> list[str]:
    """The texts of a message's content: one, or several parts, or none."""
    content = message.get("content")
    if not content:
        return []
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def text_of(message: dict) -> str:
    return "".join(parts_of(message))


def segments(messages: list[dict]):
    """(text, is_special, is_learned) of a conversation, in order; marks are special tokens."""
    for message in messages:
        learned = message["role"] == "assistant"
        yield "<|im_start|>", True, False
        yield message["role"] + "\n", False, False
        if message["role"] == "tool":
            yield "<tool_response>", True, False
            yield "\n" + text_of(message) + "\n", False, False
            yield "</tool_response>", True, False
        else:
            for part in parts_of(message):
                yield part, False, learned
            for call in message.get("tool_calls") or []:
                name, arguments = call["function"]["name"], call["function"]["arguments"]
                yield "<tool_call>", True, learned
                written = f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}\n'
                yield written, False, learned
                yield "</tool_call>", True, learned
        yield "<|im_end|>", True, learned
        yield "\n", False, False


def render(messages: list[dict], tokenizer: Tokenizer, generation: bool = False) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether the model learns to write it.

    With `generation` the assistant's header is appended, so that the model's next token begins its answer.
    """
    if tokenizer.chat_template:
        return tokenizer.chat_template.render(messages, tokenizer, generation)
    ids, learned = [], []
    for text, is_special, is_learned in segments(messages):
        new = [tokenizer.special_id(text)] if is_special else tokenizer.encode(text)
        ids += new
        learned += [is_learned] * len(new)
    if generation:
        header = [tokenizer.special_id("<|im_start|>"), *tokenizer.encode("assistant\n")]
        ids += header
        learned += [False] * len(header)
    return ids, learned


def tool_response_ids(answers: list[dict], tokenizer: Tokenizer) -> list[int]:
    """What stands between the end of an assistant's message that called tools and its next: the tools' answers."""
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = render(before, tokenizer)[0]
    last = max(i for i, token in enumerate(ids) if token in tokenizer.stop_ids)
    return render(before + answers, tokenizer, generation=True)[0][last + 1 :]


def render_text(messages: list[dict], generation: bool = False) -> str:
    return "".join(p[0] for p in segments(messages)) + ("<|im_start|>assistant\n" if generation else "")


def truncate_oldest_turns(
    messages: list[dict], tokenizer: Tokenizer, room: int, generation: bool = False
) -> list[dict]:
    """The conversation without its oldest turns, as many as must go for the rest to take at most `room` tokens.

    System messages stay. A turn is a user message with all that follows it; the newest turn always stays, so the
    result can still be too long: the caller cuts or refuses.
    """
    for start in [0] + [i for i, m in enumerate(messages) if i and m["role"] == "user"]:
        kept = [m for i, m in enumerate(messages) if i >= start or m["role"] == "system"]
        if len(render(kept, tokenizer, generation)[0]) <= room:
            break
    return kept


def parse_reply(ids: list[int], tokenizer: Tokenizer) -> dict:
    """The assistant message that these generated tokens spell (an <|im_end|> at the end is dropped).

    A call whose JSON does not parse stays in the text: it is the model's mistake, and the reader should see it.
    """
    ids = ids[:-1] if ids and ids[-1] in tokenizer.stop_ids else ids
    if tokenizer.chat_template:
        return tokenizer.chat_template.parse(tokenizer.decode(ids))
    opening, closing = tokenizer.special_id("<tool_call>"), tokenizer.special_id("</tool_call>")
    text, calls = [], []
    while opening in ids:
        i = ids.index(opening)
        j = ids.index(closing, i) if closing in ids[i:] else len(ids)
        call = parse_call(tokenizer.decode(ids[i + 1 : j]))
        text += ids[:i] if call else ids[: j + 1]
        if call:
            calls.append({"id": f"call_{len(calls) + 1}", "type": "function", "function": call})
        ids = ids[j + 1 :]
    message = {"role": "assistant", "content": tokenizer.decode(text + ids)}
    return message | ({"tool_calls": calls} if calls else {})


def parse_call(text: str) -> dict | None:
    """{"name", "arguments" (JSON text)} of one call, or None if it is not one."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):  # no JSON; a number of 5000 digits; a thousand opening brackets
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        return None
    return {"name": call["name"], "arguments": json.dumps(call["arguments"])}
