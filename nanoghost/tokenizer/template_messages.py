"""Conversations for chat templates: OpenAI's messages in the form that transformers' apply_chat_template hands over.

    OpenAI's message                        what a template gets
    content: text, parts or null            text
    arguments of a tool call: JSON text     an object
    reasoning, thinking                     also reasoning_content

Templates differ in what they know. `TemplateTraits` are learned by rendering tiny conversations. What a template does
not know is written in another place: a system message at the start of the next user message, tool calls as text.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from nanoghost.errors import UserError
from nanoghost.tokenizer.chat_format import REASONING_KEYS, text_of
from nanoghost.tokenizer.jinja_environment import ESCAPE, RESERVED, render_template
from nanoghost.tokenizer.reply_parser import TOOL_CALL_END, TOOL_CALL_START, parse_functions

THINK_START, THINK_END = "<think>", "</think>"


def normalize(messages: list[dict]) -> list[dict]:
    """The messages in the form of transformers; without the characters that jinja_environment.py reserves."""
    return [without_reserved(normalize_message(message)) for message in messages]


def normalize_message(message: dict) -> dict:
    normalized = {key: value for key, value in message.items() if value is not None} | {"content": text_of(message)}
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if reasoning:
        normalized = {"thinking": reasoning, **normalized, "reasoning_content": reasoning}
    if message.get("tool_calls"):
        normalized["tool_calls"] = [with_arguments(call, parse_arguments) for call in message["tool_calls"]]
    return normalized


def with_arguments(call: dict, convert: Callable) -> dict:
    """The tool call with its arguments converted."""
    function = call["function"]
    return call | {"function": function | {"arguments": convert(function["arguments"])}}


def parse_arguments(text: str):
    """The arguments as a value. No text stands for no arguments; what is not JSON stays text."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):  # not JSON; a number of 5000 digits; a thousand opening brackets
        return text


def map_strings(value, convert: Callable[[str], str]):
    """A nested value with all its strings converted, keys included."""
    if isinstance(value, str):
        return convert(value)
    if isinstance(value, dict):
        return {convert(key): map_strings(inner, convert) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_strings(inner, convert) for inner in value]
    return value


def without_reserved(value):
    return map_strings(value, lambda text: RESERVED.sub("", text))


def escape_tokens(value, pattern: re.Pattern, allowed: tuple[str, ...] = ()):
    """Insert ESCAPE after the first character of each match in all strings of a nested value, except `allowed`."""

    def escape(match: re.Match) -> str:
        token = match[0]
        return token if token in allowed else token[0] + ESCAPE + token[1:]

    return map_strings(value, lambda text: pattern.sub(escape, text))


def escape_message(message: dict, pattern: re.Pattern) -> dict:
    """No token that somebody typed is a token of the template. Only the assistant's thinking is between tokens."""
    thinking = (THINK_START, THINK_END) if message["role"] == "assistant" else ()
    return escape_tokens(message, pattern) | {"content": escape_tokens(message["content"], pattern, thinking)}


# ── what a template knows ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TemplateTraits:
    """What a template can write."""

    content_is_parts: bool
    """Content must be a list of parts."""
    first_system: bool
    """It writes a system message at the beginning,"""
    later_system: bool
    """and also after other messages."""
    repeated_users: bool
    """It writes two user messages in a row."""
    calls: bool
    """It writes tool calls so that reply_parser.py reads them, and the results of tools."""
    arguments_are_text: bool
    """The arguments of tool calls must be text."""
    offers_tools: bool
    """It tells the model which tools there are, and to call them so that reply_parser.py reads it."""


TOOL_PARAMETERS = {"type": "object", "properties": {"near": {"type": "string", "description": "A place."}}}
TOOL = {"name": "find_place", "description": "Find a place.", "parameters": TOOL_PARAMETERS}
ARGUMENTS = {"near": "Rome"}
RULE, QUESTION, RESULT = "wombat", "quokka", "numbat"  # words that no template says of itself


@lru_cache(maxsize=16)
def template_traits(
    source: str, special_tokens: tuple[tuple[str, str], ...], needs_tools: bool = False
) -> TemplateTraits:
    """`special_tokens`: the items of special_tokens_map; `needs_tools`: it is not used for conversations without."""
    functions = [{"type": "function", "function": TOOL}]

    def render(*messages: dict, tools: bool = needs_tools) -> str:
        """The text; empty if the template rejects the messages."""
        try:
            return render_template(source, list(messages), True, functions if tools else None, **dict(special_tokens))
        except UserError:
            return ""

    def message(role: str, content: str) -> dict:
        return as_parts({"role": role, "content": content}) if content_is_parts else {"role": role, "content": content}

    def reads_calls(arguments) -> bool:
        call = {"id": "call_1", "type": "function", "function": {"name": TOOL["name"], "arguments": arguments}}
        caller = message("assistant", "") | {"tool_calls": [call]}
        text = render(user, caller, message("tool", RESULT) | {"tool_call_id": "call_1"})
        return RESULT in text and calls_in(text) == [{"name": TOOL["name"], "arguments": arguments_text}]

    plain_user = {"role": "user", "content": QUESTION}
    content_is_parts = QUESTION not in render(plain_user) and QUESTION in render(as_parts(plain_user))
    system, user, answer = message("system", RULE), message("user", QUESTION), message("assistant", "Yes.")
    listing = render(user, tools=True)
    arguments_text = json.dumps(ARGUMENTS)
    takes_objects, takes_text = reads_calls(ARGUMENTS), reads_calls(arguments_text)
    return TemplateTraits(
        content_is_parts=content_is_parts,
        first_system=RULE in render(system, user),
        later_system=RULE in render(user, answer, system, user),
        repeated_users=render(user, user).count(QUESTION) == 2,
        calls=takes_objects or takes_text,
        arguments_are_text=takes_text and not takes_objects,
        offers_tools=TOOL["name"] in listing and (takes_objects or takes_text or TOOL_CALL_START in listing),
    )


def calls_in(text: str) -> list[dict]:
    bodies = re.findall(f"{TOOL_CALL_START}(.*?){TOOL_CALL_END}", text, re.DOTALL)
    return [function for body in bodies for function in parse_functions(body, allow_list=True)]


# ── other places for what a template does not know ───────────────────────────────────────────────────────────────────


def adapt(messages: list[dict], traits: TemplateTraits) -> list[dict]:
    """Normalized messages without what the template cannot write."""
    if not traits.calls:
        messages = calls_as_text(messages)
    elif traits.arguments_are_text:
        messages = [with_text_arguments(message) for message in messages]
    messages = move_system_messages(messages, traits)
    if not traits.repeated_users:
        messages = join_user_messages(messages)
    return [as_parts(message) for message in messages] if traits.content_is_parts else messages


def as_parts(message: dict) -> dict:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def with_text_arguments(message: dict) -> dict:
    calls = [with_arguments(call, to_json_text) for call in message.get("tool_calls", ())]
    return message | ({"tool_calls": calls} if calls else {})


def to_json_text(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_as_text(messages: list[dict]) -> list[dict]:
    """Tool calls and their results as text in the form of Hermes and Qwen."""
    converted = []
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            converted.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
            continue
        for call in message.get("tool_calls", ()):
            name, arguments = (to_json_text(call["function"][key]) for key in ("name", "arguments"))
            content += f'{TOOL_CALL_START}\n{{"name": {name}, "arguments": {arguments}}}\n{TOOL_CALL_END}'
        others = {key: value for key, value in message.items() if key != "tool_calls"}
        converted.append(others | {"content": content})
    return converted


def move_system_messages(messages: list[dict], traits: TemplateTraits) -> list[dict]:
    """A system message that the template does not write goes to the start of the user message that follows it. If
    another message follows, it becomes a user message."""
    placed, moved = [], []
    for i, message in enumerate(messages):
        stays = traits.first_system if i == 0 else traits.later_system
        if message["role"] == "system" and not stays:
            moved.append(message["content"])
            continue
        if moved and message["role"] == "user":
            message = message | {"content": "\n\n".join([*moved, message["content"]])}
        elif moved:
            placed.append({"role": "user", "content": "\n\n".join(moved)})
        placed.append(message)
        moved = []
    if moved:
        placed.append({"role": "user", "content": "\n\n".join(moved)})
    return placed


def join_user_messages(messages: list[dict]) -> list[dict]:
    joined = messages[:1]
    for message in messages[1:]:
        if message["role"] == joined[-1]["role"] == "user":
            joined[-1] = joined[-1] | {"content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined
