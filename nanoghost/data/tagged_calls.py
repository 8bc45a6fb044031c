"""Tool calls and their results that are written as text between tags, as Hermes and Qwen write them.

    an answer      I look it up.\\n<tool_call>\\n{"name": "f", "arguments": {"x": 1}}\\n</tool_call>
    a result       <tool_response>\\n2\\n</tool_response>, in a message of the tool or of the user

Learned as text, the tags would not become the special tokens that a model writes around its calls.
"""

import ast
import json
import re
from pathlib import Path

from nanoghost.data.rows import DECODER
from nanoghost.data.text_io import check_unicode, note
from nanoghost.errors import UserError

CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
RESPONSE = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)


def parse_tags(messages: list[dict], file: Path, where: str) -> list[dict]:
    """Checked messages with `tool_calls` and messages of tools in place of the tags.

    Calls with text after them, and text between tags that does not begin like a call, stay text. Standard error says
    so once for each file. Raises UserError for a call that cannot be read.
    """
    parsed = []
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and not message.get("tool_calls"):
            parsed.append(parse_calls(message, file, f"{where}: message {number}"))
        elif message["role"] == "tool" or (message["role"] == "user" and parsed and parsed[-1].get("tool_calls")):
            parsed += parse_responses(message)
        else:
            parsed.append(message)
    return parsed


def parse_calls(message: dict, file: Path, where: str) -> dict:
    """An assistant message without calls, with those that its text ends with."""
    content = message["content"] or ""
    before, tag, _ = content.partition("<tool_call>")
    bodies = CALL.findall(content)
    text_after = CALL.sub("", content[len(before) :]).strip()
    are_calls = all(re.match(r"\{|\[\s*\{", body) for body in bodies)
    if not bodies or text_after or not are_calls:
        if tag:
            note(f"{file}: <tool_call> is learned as text where an answer does not end with calls between such tags")
        return message
    calls = [call for body in bodies for call in calls_of(body, where)]
    return message | {"content": before.rstrip(), "tool_calls": calls}


def calls_of(body: str, where: str) -> list[dict]:
    """The calls in OpenAI's form: one, or a list of them, in JSON or as Python prints it."""
    error = UserError(f'{where}: {body!r:.60} is not a call: {{"name": "NAME", "arguments": {{...}}}}')
    try:
        value = DECODER.decode(body)
    except (ValueError, RecursionError):
        try:
            value = DECODER.decode(json.dumps(ast.literal_eval(body)))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise error from None
    check_unicode(json.dumps(value, ensure_ascii=False), where)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise error
        arguments = call.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append({"function": {"name": call["name"], "arguments": arguments}})
    return calls


def parse_responses(message: dict) -> list[dict]:
    """A message of a tool for each result between tags, if the message contains nothing else."""
    content = message["content"] or ""
    results = RESPONSE.findall(content)
    if not results or RESPONSE.sub("", content).strip():
        return [message]
    return [message | {"role": "tool", "content": result} for result in results]
