"""Conversations for finetuning: lists of OpenAI messages. conversation_files.py reads the files."""

from pathlib import Path

from nanoghost.data.conversation_files import read_conversations
from nanoghost.data.text_io import check_unicode
from nanoghost.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


def load_conversations(path: str | Path) -> list[list[dict]]:
    """All conversations of a file, in any form of conversation_files.py. Raises UserError, with the file and line."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f'no file {path}: conversations are in one file, for example with {{"messages": [...]}} a line')
    conversations = []
    for where, messages in read_conversations(path):
        conversations.append(check_messages(messages, where))
    if not conversations:
        raise UserError(f"{path}: it contains no conversation")
    return conversations


def check_messages(messages, where: str) -> list[dict]:
    """Return the messages if each has a valid role, and text or tool calls. Raises UserError otherwise."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list with at least one message")
    for number, message in enumerate(messages, start=1):
        check_message(message, f"{where}: message {number}")
    return messages


def check_message(message, where: str) -> None:
    if not isinstance(message, dict):
        raise UserError(f"{where} is not an object")
    if message.get("role") not in ROLES:
        raise UserError(f"{where}: role {message.get('role')!r:.40} must be one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(map(is_tool_call, calls))):
        example = '{"function": {"name": "NAME", "arguments": "JSON as a string"}}'
        raise UserError(f"{where}: 'tool_calls' must be a list of {example}")
    content = message.setdefault("content", None)
    if isinstance(content, str):
        check_unicode(content, where)
    elif content is not None or not calls:
        raise UserError(f"{where}: 'content' must be a string (null only together with 'tool_calls')")


def is_tool_call(call) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and all(isinstance(function.get(key), str) for key in ("name", "arguments"))
