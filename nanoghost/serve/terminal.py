"""Talk to a model in the terminal.

The upper half turns the engine's steps into fragments (text as it grows, tool lines), and knows no terminal; the lower
half prints them and understands slash commands.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from nanoghost import hardware
from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.sequence import Sequence
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.home import home, open_model, write_atomic
from nanoghost.tokenizer.chat_format import parse_call, render, truncate_oldest_turns
from nanoghost.tokenizer.tokenizer import StreamDecoder
from nanoghost.tools.registry import run_tool, tools_for_model

HELP = """/help           this list
/reset          forget the conversation
/system TEXT    what the model is told before the conversation (without TEXT: nothing)
/save [FILE]    append the conversation to a file of conversations (JSON lines)
Ctrl-C stops an answer and keeps what was said; Ctrl-D leaves."""


LEAST = 8  # tokens of the context that a message must leave for its answer


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
    person: str | None = None
    """Who is talking: what is said goes into their journal, and the model knows what their nights made of it (`nanoghost sleep`)."""
    lookup: bool = False
    """With --person: look the ledger up too, and let the model read what has to do with the question."""
    documents: Path | None = None
    """A folder of text that the model may look things up in, if it knows how to call tools."""


@dataclass(frozen=True)
class Said:
    """A piece of an answer: text as it comes, or a tool's line once it is known."""

    text: str
    is_tool: bool = False


class Conversation:
    """A model, what was said so far, and how to answer."""

    def __init__(self, name: str | None, sampling: SamplingParams, system: str | None, documents: Path | None = None):
        self.folder = open_model(name)
        self.engine = open_engine(self.folder, adapter=self.adapter())
        self.tokenizer = self.engine.tokenizer
        self.sampling, self.answers = sampling, 0
        self.messages: list[dict] = []
        self.forgotten: list[dict] = []  # turns that no longer fit; /save has them still
        self.set_system(system)
        tools = tools_for_model(self.folder, self.tokenizer.chat_template, documents)
        if tools and self.tokenizer.chat_template:
            schemas = tuple(tool.schema for tool in tools.values())
            self.tokenizer.chat_template = replace(self.tokenizer.chat_template, tools=schemas)
        self.run_tool = partial(run_tool, tools=tools) if tools else None

    def adapter(self) -> Path | None:
        """The folder of an adapter to speak through, besides the model's own."""

    def set_system(self, text: str | None) -> None:
        rest = [m for m in self.messages if m["role"] != "system"]
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest

    @property
    def transcript(self) -> list[dict]:
        """All that was said, also what the model no longer sees."""
        starts = sum(m["role"] == "system" for m in self.messages)
        return self.messages[:starts] + self.forgotten + self.messages[starts:]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [m for m in self.messages if m["role"] == "system"]
        self.forgotten = []

    def ask(self, text: str) -> int:
        """Add a user's message; returns how many old messages no longer fit. Raises UserError if this one alone doesn't."""
        context = self.engine.runner.context
        room = context - max(LEAST, min(self.sampling.max_tokens, context // 2))
        text = text.encode(errors="replace").decode()  # bytes typed that are no UTF-8 arrive as lone surrogates
        longer = [*self.messages, {"role": "user", "content": text}]
        kept = truncate_oldest_turns(longer, self.tokenizer, room, generation=True)
        used = len(render(kept, self.tokenizer, generation=True)[0])
        if used > context - LEAST:
            raise UserError(
                f"that message takes {used} tokens, system text included; this model's context holds {context}"
            )
        dropped = len(longer) - len(kept)
        self.forgotten += [m for m in longer if m["role"] != "system"][:dropped]
        self.messages = kept
        return dropped

    def answer(self, read: list[dict] | None = None) -> Iterator[Said]:
        """Stream the answer and keep it; closing the iterator early keeps what was said until then.

        `read`: what the model reads, if not the conversation alone.
        """
        prompt, _ = render(read or self.messages, self.tokenizer, generation=True)
        sampling = replace(self.sampling, seed=self.sampling.seed + self.answers)
        self.answers += 1
        begun = len(self.messages)
        [row] = self.engine.add(prompt, sampling, run_tool=self.run_tool)
        row.max_len = self.engine.runner.context  # nobody else needs the room, and what was looked up may be long
        try:
            for said in fragments(self.engine, row):
                if said.text:
                    yield said
        finally:
            self.engine.cancel(row)
            finished = row.messages
            rest = row.completion_ids[row.message_start :]
            if (opening := self.tokenizer.special_tokens.get("<tool_call>")) in rest:
                rest = rest[: rest.index(opening)]  # half a call is nothing that was said
            text = self.tokenizer.decode(rest)
            partial = [{"role": "assistant", "content": text}] if text else []
            self.messages = self.messages[:begun] + finished + partial


def fragments(engine: Engine, row: Sequence) -> Iterator[Said]:
    """What to show of a row, as it grows. Marks are never text, and calls only if they don't parse."""
    tokenizer = engine.tokenizer
    opening, closing = (tokenizer.special_tokens.get(mark) for mark in ("<tool_call>", "</tool_call>"))
    decoder, call, shown, seen, calls, in_line = StreamDecoder(tokenizer), [], 0, 0, {}, False
    while not row.finish_reason:
        engine.step()
        ids = [token for token, own in zip(row.completion_ids[shown:], row.sampled_mask[shown:]) if own]
        new, text, shown, seen = row.messages[seen:], "", len(row.completion_ids), len(row.messages)
        for i, token in enumerate(ids):
            if call or token == opening:
                call.append(token)
            else:
                text += decoder.feed(token)
            if call and (
                token == closing or (new and i == len(ids) - 1)
            ):  # as parse_reply: the end of the message ends it too
                written = tokenizer.decode(call)
                text += "" if parse_call(written) else written
                call = []
        if new:
            text += decoder.flush()
        in_line = in_line or bool(text)
        yield Said(text)
        for message in new:
            if message["role"] == "assistant":
                calls = {c["id"]: c["function"] for c in message.get("tool_calls", ())}
            else:
                if in_line:
                    yield Said("\n")
                in_line = False
                function = calls[message["tool_call_id"]]
                yield Said(f"{function['name']}({arguments(function)}) → {message['content']}", is_tool=True)


def arguments(call: dict) -> str:
    """A call's arguments for eyes."""
    values = json.loads(call["arguments"])
    return ", ".join(map(str, values.values())) if isinstance(values, dict) else str(values)


# ── the terminal ──────────────────────────────────────────────────────────────────────────────────────────────────────


def command(settings: ChatSettings) -> None:
    hardware.prepare()
    if not settings.temperature >= 0 or settings.top_k < 0 or not 0 < settings.top_p <= 1 or settings.max_tokens < 1:
        raise UserError("--temperature and --top-k are at least 0, --top-p above 0 up to 1, --max-tokens at least 1")
    once = settings.prompt is not None
    seed = settings.seed if settings.seed is not None else 0 if once else int(time.time())
    sampling = SamplingParams(settings.max_tokens, settings.temperature, settings.top_k, settings.top_p, seed)
    if settings.person is None:
        conversation = Conversation(settings.model, sampling, settings.system, settings.documents)
    else:
        from nanoghost.serve.personal_chat import PersonalConversation

        conversation = PersonalConversation(
            settings.person, settings.lookup, settings.model, sampling, settings.system, settings.documents
        )
    try:
        if not once:
            talk(conversation)
            return
        conversation.ask(sys.stdin.read().strip() if settings.prompt == "-" else settings.prompt)
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text") from None
    for said in conversation.answer():
        where = sys.stderr if said.is_tool else sys.stdout
        print(harmless(said.text), end="\n" if said.is_tool else "", flush=True, file=where)
    print()


def dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text


def harmless(text: str) -> str:
    """Text without control characters: a model of bytes may write what would move a terminal's cursor."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)


def talk(conversation: Conversation) -> None:
    """Read, answer, until the end of input."""
    card = conversation.folder.card
    taught = (
        "Ask who it is, for a sum, or speak like a play."
        if card.data[0]["name"] == "plays"
        else "Ask who it is, or for a sum."
    )
    about = f"{taught} " if card.arch == "ghost" else ""
    print(dim(f"{card.name}, {card.parameters / 1e6:.1f}M parameters. {about}/help"))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    save_history = edit_lines() if interactive else lambda: None
    while True:
        try:
            line = input("\x01\x1b[1m\x02> \x01\x1b[0m\x02" if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if not interactive:
            print(f"> {line}")  # nobody typed it here
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
    if dropped and dropped == len(conversation.forgotten):  # say it the first time
        print(dim("(the context is full: from here on the model no longer sees the oldest turns)"))
    answer = conversation.answer()
    try:
        for said in answer:
            print(dim(harmless(said.text)) + "\n" if said.is_tool else harmless(said.text), end="", flush=True)
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
        conversation.reset()
        return "the conversation is forgotten"
    if word == "/system":
        conversation.set_system(rest.strip() or None)
        return "noted" if rest.strip() else "the model is told nothing"
    if word == "/save":
        return save(conversation.transcript, Path(os.path.expanduser(rest.strip() or "conversations.jsonl")).resolve())
    return f"{word} is not a command; /help lists them"


def save(messages: list[dict], path: Path) -> str:
    """Append a conversation to a file of them, whole or not at all; returns what to print."""
    if not any(m["role"] == "user" for m in messages):
        return "there is nothing to save yet"
    if path.exists() and not path.is_file():
        return f"{path} is not a file"
    try:
        before = path.read_bytes() if path.exists() else b""
        line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
        write_atomic(path, before + (b"" if before[-1:] in (b"", b"\n") else b"\n") + line)
    except OSError as e:  # a mistyped path must not end the conversation
        return f"cannot save to {path}: {e.strerror}"
    return f"saved to {path}"


def edit_lines():
    """Line editing with a history kept over sessions; returns what saves it."""
    import readline

    path = home() / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    return lambda: readline.write_history_file(path)
