"""`nanoghost chat`: chat with a model in the terminal, or answer one prompt."""

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanoghost import hardware
from nanoghost.commands.arguments import ModelArgument
from nanoghost.engine.sampler import SamplingParams, check_sampling
from nanoghost.errors import UserError
from nanoghost.home import write_atomic
from nanoghost.serve.conversation import Conversation, ReplyFragment
from nanoghost.serve.personal_chat import PersonalConversation

HELP = """/help           show this list
/reset          start a new conversation
/system TEXT    set the system message (without TEXT: remove it)
/save [FILE]    append the conversation to a JSON Lines file (default: conversations.jsonl)
Ctrl-C stops a reply and keeps its text so far; Ctrl-D quits."""

NOT_UTF8 = "standard input is not UTF-8 text"
MAX_HISTORY = 1000  # lines
# Bold "> ". Between \x01 and \x02 stand characters that do not move the cursor, so that readline counts the width.
BOLD_PROMPT = "\x01\x1b[1m\x02> \x01\x1b[0m\x02"


@dataclass(frozen=True)
class ChatSettings(ModelArgument):
    prompt: str | None = None
    """Answer this prompt on standard output and exit; - reads the prompt from standard input."""
    system: str | None = None
    """System message."""
    temperature: float = 0.7
    """Sampling temperature; 0 always takes the most probable token."""
    top_k: int = 0
    """Sample from the k most probable tokens; 0: from all."""
    top_p: float = 0.95
    """Sample from the most probable tokens that together have this probability."""
    max_tokens: int = 160
    """Maximum number of tokens of a reply."""
    seed: int | None = None
    """Random seed; default: 0 with --prompt, otherwise the current time."""
    person: str | None = None
    """Name of the person who is chatting. Messages go to their chat log, and the model uses the adapter that
    `nanoghost sleep` trained on their facts."""
    lookup: bool = False
    """With --person: also search their stored facts and show the model the one that fits the message best."""
    documents: Path | None = None
    """Folder of texts that the model may search, if it can call tools."""
    tools: str | None = None
    """Tools that the model may call, comma-separated: calculator, python, lookup (with --documents); "" for none.
    Default: all, if it learned here to call tools; otherwise only lookup, if --documents is given."""


def command(settings: ChatSettings) -> None:
    hardware.prepare()
    conversation = open_conversation(settings)
    if settings.prompt is None:
        talk(conversation)
    else:
        answer_once(conversation, settings.prompt)


def open_conversation(settings: ChatSettings) -> Conversation:
    seed = settings.seed
    if seed is None:
        seed = int(time.time()) if settings.prompt is None else 0
    sampling = SamplingParams(settings.max_tokens, settings.temperature, settings.top_k, settings.top_p, seed)
    check_sampling(sampling)
    if settings.person is None:
        if settings.lookup:
            raise UserError("--lookup searches the stored facts of a person: it needs --person")
        return Conversation(settings.model, sampling, settings.system, settings.documents, settings.tools)
    return PersonalConversation(
        settings.person,
        settings.lookup,
        settings.model,
        sampling,
        settings.system,
        settings.documents,
        settings.tools,
    )


def answer_once(conversation: Conversation, prompt: str) -> None:
    """Print the reply to standard output, and the tool calls to standard error."""
    conversation.ask(read_standard_input() if prompt == "-" else prompt)
    for fragment in conversation.answer():
        text = without_control_characters(fragment.text)
        if fragment.is_tool_call:
            print(text, flush=True, file=sys.stderr)
        else:
            print(text, end="", flush=True)
    print()


def read_standard_input() -> str:
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError:
        raise UserError(NOT_UTF8) from None


def has_escape_codes() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if has_escape_codes() else text


def without_control_characters(text: str) -> str:
    """The text without control characters other than tab and newline: they could move the cursor of the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


# ── interactive chat ─────────────────────────────────────────────────────────────────────────────────────────────────


def talk(conversation: Conversation) -> None:
    """Read messages and slash commands and print replies until the end of the input."""
    print(dim(greeting(conversation)))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    prompt = ""
    if interactive:
        prompt = BOLD_PROMPT if has_escape_codes() else "> "
        load_line_history(conversation.line_history)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        except UnicodeDecodeError:
            raise UserError(NOT_UTF8) from None
        if not interactive:
            print(f"> {line}")  # piped input does not show up in the output by itself
        if line.startswith("/"):
            print(dim(run_slash_command(conversation, line)))
        elif line:
            print_reply(conversation, line)
    if interactive:
        save_line_history(conversation.line_history)


def greeting(conversation: Conversation) -> str:
    card = conversation.folder.card
    hint = ""
    if card.arch == "ghost":
        hint = "Ask who it is, or for a sum. "
        if card.data[0]["name"] == "plays":
            hint = "Ask who it is, for a sum, or speak like a play. "
    return f"{card.name}, {card.parameters / 1e6:.1f}M parameters. {hint}/help"


def print_reply(conversation: Conversation, line: str) -> None:
    try:
        num_dropped = conversation.ask(line)
    except UserError as error:
        print(dim(str(error)))
        return
    first_time = num_dropped == len(conversation.dropped_messages)
    if num_dropped and first_time:
        print(dim("(the context is full: from here on the model no longer sees the oldest turns)"))
    reply = conversation.answer()
    try:
        for fragment in reply:
            print(format_fragment(fragment), end="", flush=True)
    except KeyboardInterrupt:
        print(dim(" (stopped)"), end="")
    finally:
        reply.close()
    print("\n")


def format_fragment(fragment: ReplyFragment) -> str:
    text = without_control_characters(fragment.text)
    return dim(text) + "\n" if fragment.is_tool_call else text


def run_slash_command(conversation: Conversation, line: str) -> str:
    """Run a slash command; returns what to print."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/help":
        return HELP
    if name == "/reset":
        conversation.reset()
        return "new conversation"
    if name == "/system":
        conversation.set_system(argument or None)
        return "system message set" if argument else "system message removed"
    if name == "/save":
        path = Path(os.path.expanduser(argument or "conversations.jsonl")).resolve()
        return save_conversation(conversation.transcript, path)
    return f"{name} is not a command; /help lists them"


def save_conversation(messages: list[dict], path: Path) -> str:
    """Append a conversation to a JSON Lines file, completely or not at all; returns what to print."""
    if not any(m["role"] == "user" for m in messages):
        return "nothing to save yet"
    if path.exists() and not path.is_file():
        return f"{path} is not a file"
    try:
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):
            content += b"\n"
        line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
        write_atomic(path, content + line)
    except OSError as error:  # a mistyped path must not end the conversation
        return f"cannot save to {path}: {error.strerror}"
    return f"saved to {path}"


def load_line_history(path: Path) -> None:
    """Enable line editing, with the lines of earlier sessions."""
    import readline  # `input` then uses it

    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(MAX_HISTORY)


def save_line_history(path: Path) -> None:
    import readline

    path.parent.mkdir(parents=True, exist_ok=True)
    readline.write_history_file(path)
