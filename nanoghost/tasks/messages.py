"""Messages in OpenAI's form: write them, and read what tasks score."""

import json
import re
from collections.abc import Sequence

from nanoghost.tokenizer.chat_format import text_of


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content: str | list[dict]) -> dict:
    return {"role": "assistant", "content": content}


def make_text_parts(texts: Sequence[str]) -> list[dict]:
    """Texts as OpenAI text parts. Each part is tokenized on its own, so no token crosses from one to the next."""
    return [{"type": "text", "text": text} for text in texts]


def tool_call_messages(tool: str, argument: str, value: str, content: str, call_id: str) -> tuple[dict, dict]:
    """The assistant message that calls a tool with one argument, and the tool message with the result."""
    function = {"name": tool, "arguments": json.dumps({argument: value}, ensure_ascii=False)}
    call = {"id": call_id, "type": "function", "function": function}
    return assistant("") | {"tool_calls": [call]}, {"role": "tool", "tool_call_id": call_id, "content": content}


def final_text(reply: Sequence[dict]) -> str:
    """The text of the last message; empty if that is not an assistant message."""
    return text_of(reply[-1]).strip() if reply and reply[-1]["role"] == "assistant" else ""


def tool_results(reply: Sequence[dict], tool: str) -> list[str]:
    """What a tool returned in a reply."""
    tool_of_call, results = {}, []
    for message in reply:  # in order: call ids are numbered from the start in each assistant message
        for call in message.get("tool_calls") or ():
            tool_of_call[call["id"]] = call["function"]["name"]
        if message["role"] == "tool" and tool_of_call[message["tool_call_id"]] == tool:
            results.append(text_of(message))
    return results


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.replace("−", "-"))
    numbers = re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", text)
    return numbers[-1] if numbers else None
