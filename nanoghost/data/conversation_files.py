"""Conversations in the forms that people have them, as lists of OpenAI messages.

    name                    keys of a row                                     of
    messages                messages (role, content)                          OpenAI, TRL
    ShareGPT                conversations (from, value; or role, content)     ShareGPT, axolotl, LLaMA-Factory
    prompt and completion   prompt, completion: texts or lists of messages    TRL, older OpenAI
    Alpaca                  instruction, input, output                        Stanford Alpaca, LLaMA-Factory
    prompt                  prompt                                            TRL

A row may also have a `system` or `system_prompt` text. conversations.py checks what the messages contain.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from nanoghost.data.rows import DECODER, Row, read_rows
from nanoghost.data.text_io import check_unicode, note
from nanoghost.errors import UserError

ROLES_OF_SENDERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function-response": "tool",
}
CALL_SENDERS = ("function_call", "function-call")


def read_conversations(file: Path) -> Iterator[tuple[str, list]]:
    """Yield ("FILE:LINE" for error messages, messages) for each row. Says on standard error which form it reads."""
    for row in read_rows(file, COLUMNS):
        yield row.where, messages_of(row, file)


def messages_of(row: Row, file: Path) -> list:
    """The messages of a row. Raises UserError if it has none of the forms."""
    name = form_of(row.value)
    if name is None:
        raise no_form(row, f"'messages' (or {OTHER_FORMS})")
    if name != "messages" or file.suffix != ".jsonl":
        note(f"{file}: read as conversations of the form {name}")
    if row.value.get("label") is False:
        raise UserError(f"{row.where}: 'label' is false: every answer is learned, so remove those that must not be")
    check_has_no_media(row.value, row.where)
    keys, convert = FORMS[name]
    unread = [key for key in row.value if key not in (*keys, *OPTIONAL_KEYS)]
    if unread:
        note(f"{file}: not read: {', '.join(map(repr, unread)):.200}")
    return with_system_message(convert(row.value, row.where), row, file)


def form_of(value) -> str | None:
    """The first form whose keys the row has. None if there is none, or if a prompt has two answers to choose from."""
    if not isinstance(value, dict):
        return None
    for name, (keys, _) in FORMS.items():
        if all(value.get(key) is not None for key in keys):
            return None if name == "prompt" and value.get("chosen") else name
    return None


def no_form(row: Row, expected: str) -> UserError:
    """The error for a row that is not a conversation. `expected`: the keys that it should have."""
    keys = list(row.value) if isinstance(row.value, dict) else []
    if "chosen" in keys and "rejected" in keys:
        return UserError(
            f"{row.where}: pairs of a 'chosen' and a 'rejected' answer (DPO) are not learned here; to learn the chosen"
            " answers by SFT, rename 'chosen' to 'completion', or to 'messages' if it is a whole conversation"
        )
    present = f", not with {', '.join(map(repr, keys)):.200}" if keys else ""
    return UserError(f"{row.where}: expected an object with {expected}{present}")


# ── the forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def from_messages(row: dict, where: str) -> list:
    return turns(row, "messages", where)


def from_sharegpt(row: dict, where: str) -> list:
    return turns(row, "conversations", where)


def from_prompt(row: dict, where: str) -> list:
    return text_or_turns(row, "prompt", "user", where)


def from_prompt_and_completion(row: dict, where: str) -> list:
    return from_prompt(row, where) + text_or_turns(row, "completion", "assistant", where)


def from_alpaca(row: dict, where: str) -> list:
    question = text(row, "instruction", where)
    if row.get("input"):
        question += "\n" + text(row, "input", where)
    return [message("user", question), message("assistant", text(row, "output", where))]


FORMS: dict[str, tuple[tuple[str, ...], Callable[[dict, str], list]]] = {
    "messages": (("messages",), from_messages),
    "ShareGPT": (("conversations",), from_sharegpt),
    "prompt and completion": (("prompt", "completion"), from_prompt_and_completion),
    "Alpaca": (("instruction", "output"), from_alpaca),
    "prompt": (("prompt",), from_prompt),
}
"""{name: (keys that a row must have, function that makes messages of it)}."""

OTHER_FORMS = ", or ".join(" and ".join(map(repr, keys)) for keys, _ in list(FORMS.values())[1:])
SYSTEM_KEYS = ("system", "system_prompt")
MEDIA_KEYS = ("image", "images", "video", "videos", "audio", "audios")
OPTIONAL_KEYS = (*SYSTEM_KEYS, *MEDIA_KEYS, "input", "label")
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "output", *OPTIONAL_KEYS)
COLUMNS += ("chosen", "rejected")


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


def with_system_message(messages: list, row: Row, file: Path) -> list:
    """The messages after the row's system prompt, unless they begin with one themselves."""
    key = next((key for key in SYSTEM_KEYS if row.value.get(key)), None)
    if key is None:
        return messages
    prompt, first = text(row.value, key, row.where), messages[0]
    if not isinstance(first, dict) or first.get("role") not in ("system", "developer"):
        return [message("system", prompt), *messages]
    if first.get("content") != prompt:
        note(f"{file}: {key!r} is not read where the messages begin with another system message")
    return messages


def check_has_no_media(value: dict, where: str) -> None:
    """Raise UserError if a row, or a message, has more than text."""
    for key in MEDIA_KEYS:
        if value.get(key):
            raise UserError(f"{where}: {key!r} is not empty: models read text only, so remove what has {key}")
    content = value.get("content")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise UserError(f"{where}: 'content' has a part of the type {kind!r:.40}: models read text only")


def text(row: dict, key: str, where: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f"{where}: {key!r} is {row[key]!r:.40}, not a string")
    return row[key]


def text_or_turns(row: dict, key: str, role: str, where: str) -> list:
    return [message(role, row[key])] if isinstance(row[key], str) else turns(row, key, where)


def turns(row: dict, key: str, where: str) -> list:
    """The messages under a key, with `role` and `content` in place of ShareGPT's `from` and `value`."""
    if not isinstance(row[key], list) or not row[key]:
        raise UserError(f"{where}: {key!r} must be a list with at least one message")
    return [turn(item, f"{where}: message {number}") for number, item in enumerate(row[key], start=1)]


def turn(item, where: str):
    sender = item.get("from") if isinstance(item, dict) else None
    if not isinstance(sender, str):
        return item
    if sender in CALL_SENDERS:
        return message("assistant", None) | {"tool_calls": tool_calls(item.get("value"), where)}
    return message(ROLES_OF_SENDERS.get(sender, sender), item.get("value"))


def tool_calls(value, where: str) -> list:
    """The calls in a text of JSON: one, or a list of them."""
    try:
        calls = DECODER.decode(value)
    except (TypeError, ValueError, RecursionError):
        raise UserError(f'{where}: a call must be JSON: {{"name": "NAME", "arguments": {{...}}}}') from None
    check_unicode(json.dumps(calls, ensure_ascii=False), where)
    return calls if isinstance(calls, list) else [calls]
