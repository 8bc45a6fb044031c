"""Conversations for finetuning: lists of OpenAI messages. conversation_files.py reads the files."""

import json
import re
from pathlib import Path

from nanoghost.data.conversation_files import check_has_no_media, read_conversations
from nanoghost.data.tagged_calls import parse_tags
from nanoghost.data.text_io import check_unicode, problem_of
from nanoghost.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")


class FileConversation(list):
    """The messages of a conversation from a file."""

    def __init__(self, messages: list[dict], where: str):
        super().__init__(messages)
        self.where = where
        """FILE:LINE, for messages to the user."""


def load_conversations(path: str | Path) -> list[FileConversation]:
    """All conversations of a file, in any form of conversation_files.py. Raises UserError, with the file and line."""
    if re.match(r"hub:|[a-z0-9]+://", str(path)):
        raise UserError(f"{path}: conversations are read from a file on this computer: download it first")
    path = Path(path).expanduser()
    if not path.is_file():
        form = 'conversations are in one file, for example with {"messages": [...]} a line'
        raise UserError(f"{problem_of(path)}: {form}")
    conversations = []
    for where, messages in read_conversations(path):
        messages = parse_tags(check_messages(messages, where), path, where)
        conversations.append(FileConversation(messages, where))
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
    check_has_no_media(message, where)
    if isinstance(content, list) and all(map(is_text_part, content)):
        content = "".join(part["text"] for part in content)
    if isinstance(content, str):
        check_unicode(content, where)
    elif content is not None or not calls:
        raise UserError(f"{where}: 'content' must be a string or text parts (null only together with 'tool_calls')")
    checked = message | {"role": "system" if role == "developer" else role, "content": content}
    if calls is not None:
        if not isinstance(calls, list):
            raise invalid_calls(where)
        checked["tool_calls"] = [check_tool_call(call, where) for call in calls]
    return checked


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
