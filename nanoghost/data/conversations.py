"""Conversations for finetuning: lists of OpenAI messages. conversation_files.py reads the files."""

import json
import re
from pathlib import Path

from nanoghost.data.conversation_files import read_conversations
from nanoghost.data.text_io import check_unicode
from nanoghost.errors import UserError

CALL_TAGS = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
RESPONSE_TAGS = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
ROLES = ("system", "developer", "user", "assistant", "tool")


class FileConversation(list):
    """The messages of a conversation from a file."""

    def __init__(self, messages: list[dict], where: str):
        super().__init__(messages)
        self.where = where
        """FILE:LINE, for messages to the user."""


def load_conversations(path: str | Path) -> list[FileConversation]:
    """All conversations of a file, in any form of conversation_files.py. Raises UserError, with the file and line."""
    path = Path(path).expanduser()
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is no ordinary file" if path.exists() else "does not exist"
        raise UserError(
            f'{path} {problem}: conversations are in one file, for example with {{"messages": [...]}} a line'
        )
    conversations = []
    for where, messages in read_conversations(path):
        conversations.append(FileConversation(check_messages(messages, where), where))
    if not conversations:
        raise UserError(f"{path}: it contains no conversation")
    return conversations


def check_messages(messages, where: str) -> list[dict]:
    """The messages in OpenAI's form. Raises UserError unless each has a valid role, and text or tool calls."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: 'messages' must be a list with at least one message")
    return [check_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def check_message(message, where: str) -> dict:
    """The message with the role system for developer, text for a list of text parts, arguments of calls as text."""
    if not isinstance(message, dict):
        raise UserError(f"{where} is not an object")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if calls is None and message.get("function_call"):  # OpenAI's older form of a tool call
        calls = [{"function": message["function_call"]}]
    if role == "assistant" and message.get("weight") == 0:
        raise UserError(f"{where} has 'weight' 0: every answer is learned, so remove those that must not be")
    if role not in ROLES:
        raise UserError(f"{where}: role {role!r:.40} must be one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(map(is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if isinstance(content, str):
        check_unicode(content, where)
        if role == "assistant" and calls is None:
            content, calls = split_calls(content)
        elif role == "tool" and (response := RESPONSE_TAGS.fullmatch(content)):
            content = response[1]
    elif content is not None or not calls:
        raise UserError(f"{where}: 'content' must be a string or text parts (null only together with 'tool_calls')")
    checked = message | {"role": "system" if role == "developer" else role, "content": content}
    if calls is not None:
        if not isinstance(calls, list):
            raise invalid_calls(where)
        checked["tool_calls"] = [check_tool_call(call, where) for call in calls]
    return checked


def split_calls(text: str) -> tuple[str, list | None]:
    """(the text before the calls, the calls) of an answer that writes them as text between tags, as Hermes does.

    Without such calls, or with something else between or after the tags, the text stays as it is.
    """
    calls = []
    for match in CALL_TAGS.finditer(text):
        try:
            calls.append(json.loads(match[1]))
        except (ValueError, RecursionError):
            return text, None
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return text, None
    before, _, after = CALL_TAGS.sub("\0", text).partition("\0")
    return (text, None) if after.strip("\0 \n") else (before, calls)


def is_text_part(part) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def check_tool_call(call, where: str) -> dict:
    """OpenAI's form. Many data sets have the arguments as an object (transformers' form), or no "function" around."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid_calls(where)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise invalid_calls(where)
    others = {key: call[key] for key in ("id", "type") if key in call}
    return others | {"function": {"name": function["name"], "arguments": arguments}}


def invalid_calls(where: str) -> UserError:
    example = '{"function": {"name": "NAME", "arguments": {...} or the same as text}}'
    return UserError(f"{where}: 'tool_calls' must be a list of {example}")
