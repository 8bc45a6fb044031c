"""Talk to a model in the terminal.

The upper half turns the engine's steps into fragments (text as it grows, tool lines), and knows no terminal; the lower
half prints them and understands slash commands.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanoghost import machine
from nanoghost.chat import render, shortened
from nanoghost.engine.generate import Sampling, steps
from nanoghost.errors import UserError
from nanoghost.model.weights import load_model
from nanoghost.runs import home, open_model
from nanoghost.tokenizer import StreamDecoder
from nanoghost.tools.calculator import run_tool

HELP = """/help           this list
/reset          forget the conversation
/system TEXT    what the model is told before the conversation (without TEXT: nothing)
/save [FILE]    append the conversation to a file of conversations (JSON lines)
Ctrl-C stops an answer and keeps what was said; Ctrl-D leaves."""


@dataclass(frozen=True)
class ChatSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    prompt: str | None = None
    """Answer this once on standard output and exit; - reads it from standard input."""
    system: str | None = None
    """What the model is told before the conversation."""
    temperature: float = 0.7
    """0 always takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 0.95
    """Only the most probable tokens that together reach this probability."""
    max_tokens: int = 160
    """Longest answer."""
    seed: int | None = None
    """For answers that can be repeated; default: 0 with --prompt, otherwise another each time."""


@dataclass(frozen=True)
class Said:
    """A piece of an answer: text as it comes, or a tool's line once it is known."""

    text: str
    is_tool: bool = False


class Conversation:
    """A model, what was said so far, and how to answer."""

    def __init__(self, name: str | None, sampling: Sampling, system: str | None):
        self.folder = open_model(name)
        self.model, self.tokenizer = load_model(self.folder.path, machine.compute_dtype(), machine.device())
        self.sampling, self.answers = sampling, 0
        self.messages: list[dict] = []
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    def ask(self, text: str) -> int:
        """Add a user's message; returns how many old messages no longer fit. Raises UserError if this one alone doesn't."""
        context = self.model.config.context
        room = context - min(self.sampling.max_tokens, context // 2)
        longer = [*self.messages, {"role": "user", "content": text}]
        kept = shortened(longer, self.tokenizer, room, generation=True)
        used = len(render(kept, self.tokenizer, generation=True)[0])
        if used > context - 8:
            raise UserError(f"that message takes {used} tokens; this model's context holds {context}")
        self.messages = kept
        return len(longer) - len(kept)

    def answer(self) -> Iterator[Said]:
        """Stream the answer and keep it; closing the iterator early keeps what was said until then."""
        prompt, _ = render(self.messages, self.tokenizer, generation=True)
        sampling = Sampling(**(vars(self.sampling) | {"seed": self.sampling.seed + self.answers}))
        self.answers += 1
        begun, row = len(self.messages), None
        engine = steps(self.model, self.tokenizer, [prompt], sampling, run_tool=run_tool)
        try:
            for said, row in fragments(engine, self.tokenizer):  # noqa: B007 (`row` is read below)
                if said.text:
                    yield said
        finally:
            finished = row.messages if row else []
            rest = self.tokenizer.decode(row.ids[row.message_start :]) if row and not row.given else ""
            partial = [{"role": "assistant", "content": rest}] if rest else []
            self.messages = self.messages[:begun] + finished + partial


def fragments(engine_steps, tokenizer):
    """(what to show, the row) after each step of a single row; marks and calls are not text."""
    opening, closing = tokenizer.special("<tool_call>"), tokenizer.special("</tool_call>")
    decoder, inside, shown, calls = StreamDecoder(tokenizer), False, 0, {}
    for (row,) in engine_steps:
        token = row.ids[-1]
        if token == opening:
            inside = True
        if row.sampled[-1] and not inside:
            yield Said(decoder.feed(token)), row
        if token == closing:
            inside = False
        for message in row.messages[shown:]:
            shown += 1
            if message["role"] == "assistant":
                calls = {c["id"]: c["function"] for c in message.get("tool_calls", ())}
            else:
                call = calls[message["tool_call_id"]]
                yield Said(f"{call['name']}({arguments(call)}) → {message['content']}", is_tool=True), row
    yield Said(decoder.flush()), row


def arguments(call: dict) -> str:
    """A call's arguments for eyes."""
    values = json.loads(call["arguments"])
    return ", ".join(map(str, values.values())) if isinstance(values, dict) else str(values)


# ── the terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────


def command(settings: ChatSettings) -> None:
    machine.prepare()
    if settings.temperature < 0 or not 0 < settings.top_p <= 1 or settings.max_tokens < 1:
        raise UserError("--temperature is at least 0, --top-p above 0 and at most 1, --max-tokens at least 1")
    once = settings.prompt is not None
    seed = settings.seed if settings.seed is not None else 0 if once else int(time.time())
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_k, settings.top_p, seed)
    conversation = Conversation(settings.model, sampling, settings.system)
    if once:
        conversation.ask(sys.stdin.read() if settings.prompt == "-" else settings.prompt)
        for said in conversation.answer():
            print(
                said.text, end="\n" if said.is_tool else "", flush=True, file=sys.stderr if said.is_tool else sys.stdout
            )
        print()
        return
    talk(conversation)


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


def talk(conversation: Conversation) -> None:
    """Read, answer, until the end of input."""
    card = conversation.folder.card
    print(
        dim(
            f"{card['name']}, {card['parameters'] / 1e6:.1f}M parameters. Ask who it is, for a sum, or speak like a play. /help"
        )
    )
    save_history = edit_lines() if sys.stdin.isatty() else lambda: None
    while True:
        try:
            line = input("\x01\x1b[1m\x02> \x01\x1b[0m\x02" if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if line.startswith("/"):
            print(dim(slash(conversation, line)))
        elif line:
            reply(conversation, line)
    save_history()


def reply(conversation: Conversation, line: str) -> None:
    try:
        dropped = conversation.ask(line)
    except UserError as e:
        print(dim(str(e)))
        return
    if dropped:
        print(dim(f"(the context is full: the oldest {dropped} messages are no longer seen)"))
    answer = conversation.answer()
    try:
        for said in answer:
            print(dim(said.text) + "\n" if said.is_tool else said.text, end="", flush=True)
    except KeyboardInterrupt:
        print(dim(" (stopped)"), end="")
    finally:
        answer.close()
    print("\n")


def slash(conversation: Conversation, line: str) -> str:
    """Do what a slash command says; returns what to print."""
    word, _, rest = line.partition(" ")
    if word == "/help":
        return HELP
    if word == "/reset":
        system = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
        conversation.messages = []
        conversation.set_system(system)
        return "the conversation is forgotten"
    if word == "/system":
        conversation.set_system(rest.strip() or None)
        return "noted" if rest.strip() else "the model is told nothing"
    if word == "/save":
        path = Path(rest.strip() or "conversations.jsonl").expanduser()
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
        return f"saved to {path}"
    return f"{word} is not a command; /help lists them"


def edit_lines():
    """Line editing with a history kept over sessions; returns what saves it."""
    import readline

    path = home() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    return lambda: readline.write_history_file(path)
