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
        keys = f", not with {', '.join(map(repr, row.value)):.200}" if isinstance(row.value, dict) else ""
        raise UserError(f"{row.where}: expected an object with 'messages' (or {OTHER_FORMS}){keys}")
    if name != "messages" or file.suffix != ".jsonl":
        note(f"{file}: read as conversations of the form {name}")
    if row.value.get("label") is False:
        raise UserError(f"{row.where}: 'label' is false: every answer is learned, so remove those that must not be")
    for key in ("image", "images"):
        if row.value.get(key):
            raise UserError(
                f"{row.where}: {key!r} is not empty: models learn from text only, so remove rows with images"
            )
    for key in ("tools", "history"):
        if row.value.get(key):
            note(f"{file}: '{key}' is not read")
    _, convert = FORMS[name]
    return convert(row.value, row.where)


def form_of(value) -> str | None:
    """The first form whose keys the row has. None if there is none, or if a prompt has two answers to choose from."""
    if not isinstance(value, dict):
        return None
    for name, (keys, _) in FORMS.items():
        if all(value.get(key) is not None for key in keys):
            return None if name == "prompt" and value.get("chosen") else name
    return None


# ── the forms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def from_messages(row: dict, where: str) -> list:
    messages = turns(row, "messages", where)
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    return messages if has_system else system_message(row, where) + messages


def from_sharegpt(row: dict, where: str) -> list:
    return system_message(row, where) + turns(row, "conversations", where)


def from_prompt(row: dict, where: str) -> list:
    return system_message(row, where) + text_or_turns(row, "prompt", "user", where)


def from_prompt_and_completion(row: dict, where: str) -> list:
    return from_prompt(row, where) + text_or_turns(row, "completion", "assistant", where)


def from_alpaca(row: dict, where: str) -> list:
    question = text(row, "instruction", where)
    if row.get("input"):
        question += "\n" + text(row, "input", where)
    return [*system_message(row, where), message("user", question), message("assistant", text(row, "output", where))]


FORMS: dict[str, tuple[tuple[str, ...], Callable[[dict, str], list]]] = {
    "messages": (("messages",), from_messages),
    "ShareGPT": (("conversations",), from_sharegpt),
    "prompt and completion": (("prompt", "completion"), from_prompt_and_completion),
    "Alpaca": (("instruction", "output"), from_alpaca),
    "prompt": (("prompt",), from_prompt),
}
"""{name: (keys that a row must have, function that makes messages of it)}."""

OTHER_FORMS = ", or ".join(" and ".join(map(repr, keys)) for keys, _ in list(FORMS.values())[1:])
COLUMNS = ("messages", "conversations", "prompt", "completion", "instruction", "output")
COLUMNS += ("system", "system_prompt", "input", "history", "chosen", "label", "tools", "image", "images")


# ── messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


def system_message(row: dict, where: str) -> list:
    keys = [key for key in ("system", "system_prompt") if row.get(key)]
    return [message("system", text(row, keys[0], where))] if keys else []


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
