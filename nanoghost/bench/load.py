"""How a server bears many clients at once, some of them bad, and what happens when its engine is killed under them.

What an honest client is answered must be, to the letter, what it was answered in peace: so no error, and nothing of one
conversation in another, goes unseen. Only where two tokens are as good as equally probable may rounding, which follows what is
multiplied together, choose the other (it never does with packed weights).
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.bench.decode import KINDS, WORDS
from nanoghost.bench.serve import answered, events, request, send, server
from nanoghost.errors import UserError
from nanoghost.home import open_model

TOKENS = 16  # of an answer
PEACE = 8  # conversations at once while nobody does harm
TIE = 0.01  # nats by which two tokens are as good as equally probable
NEVER_READ = 2  # clients that ask and do not read
MEMORY_EVERY = 2.0  # seconds
FOLLOW = "Say that in one sentence."
LONG = {
    "type": "json_schema",
    "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 5000}},
}  # whatever the model would say
ESTABLISHED = 1  # of a TCP connection


@dataclass(frozen=True)
class LoadSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    clients: int = 32
    """How many ask at the same time."""
    conversations: int = 200
    """How many different ones, of two questions each, they have."""
    minutes: float = 5.0
    """For how long."""
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass
class Seen:
    """What the clients met."""

    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    otherwise: list[tuple[list[dict], str]] = field(default_factory=list)
    """Conversations to their answer in peace, and what was answered instead."""
    megabytes: list[float] = field(default_factory=list)
    recovered: float = 0.0


def malformed(model: str, rng) -> tuple[bytes, str]:
    good = request(model, "Hello!", 4)
    whole = json.dumps(good).encode()
    return rng.choice([
        (whole[:-9], "application/json"), (b"\xff\xfe{}", "application/json"), (b"[" * 5000, "application/json"),
        (whole, "text/plain"), (json.dumps(good | {"surprise": 1}).encode(), "application/json"),
        (json.dumps(good | {"model": "../../etc/passwd"}).encode(), "application/json"),
        (json.dumps(good | {"max_tokens": -1}).encode(), "application/json"),
        (json.dumps(good | {"messages": []}).encode(), "application/json"),
        (json.dumps(good | {"messages": [{"role": "user", "content": "word " * 40_000}]}).encode(), "application/json"),
    ])  # fmt: skip


def opening(number: int) -> str:
    """The first question of a conversation: another one for each number."""
    word = WORDS[number % len(WORDS)]
    kind = list(KINDS.values())[number // len(WORDS) % len(KINDS)]
    return kind.format(word=word, text=f"the words of {word}") + f" ({number})"


async def in_peace(port: int, model: str, count: int) -> list[list[dict]]:
    """What each conversation is, asked among a few others, while nobody does harm."""
    places = asyncio.Semaphore(PEACE)

    async def one(number: int) -> list[dict]:
        said: list[dict] = []
        async with places:
            for question in (opening(number), FOLLOW):
                said.append({"role": "user", "content": question})
                said.append({"role": "assistant", "content": (await answered(port, request(model, said, TOKENS)))[0]})
        return said

    return list(await asyncio.gather(*map(one, range(count))))


async def is_a_tie(port: int, model: str, messages: list[dict], said: str) -> bool:
    """Whether an answer leaves that which the model gives alone only where another token was as good as equally probable."""
    text = ""
    asked = request(model, messages, TOKENS) | {"logprobs": True, "top_logprobs": 5}
    async with contextlib.aclosing(events(port, asked)) as stream:
        tokens = [
            t
            async for event in stream
            for choice in event.get("choices", ())
            for t in (choice["logprobs"] or {}).get("content", ())
        ]
    for token in tokens:
        if not said.startswith(text + token["token"]):
            others = [o for o in token["top_logprobs"] if o["logprob"] > token["logprob"] - TIE]
            return any(
                said.startswith(text + o["token"]) or (said == text and o["token"].startswith("<|")) for o in others
            )
        text += token["token"]
    return said == text


async def client(port: int, model: str, conversations: list[list[dict]], until: float, rng, seen: Seen) -> None:
    """One after the other: mostly honest questions, a tenth given up, a tenth malformed."""
    while time.monotonic() < until:
        kind, whole = rng.random(), rng.choice(conversations)
        if kind < 0.1:
            reader, writer = await send(port, *malformed(model, rng))
            status = (await reader.readline()).split()[1:2]
            seen.counts["malformed"] += 1
            if not status or not status[0].startswith(b"4"):
                seen.wrong.append(f"malformed: answered {status}")
            writer.close()
        elif kind < 0.2:
            async with contextlib.aclosing(events(port, request(model, whole[:1], TOKENS))) as stream:
                for _ in range(rng.randrange(1, 12)):
                    await anext(stream, None)
            seen.counts["given up"] += 1
        else:
            for turn in range(0, len(whole), 2):
                try:
                    said, tokens, first = await answered(port, request(model, whole[: turn + 1], TOKENS))
                except ConnectionError as e:
                    seen.wrong.append(f"honest: {e}")
                    break
                seen.counts["answered"] += 1
                seen.tokens += tokens
                seen.firsts.append(first)
                if said != whole[turn + 1]["content"]:
                    seen.otherwise.append((whole[: turn + 2], said))


async def never_reads(port: int, model: str, until: float, seen: Seen) -> None:
    """Asks for more than the buffers of both sides hold, and waits to be thrown out (Linux tells)."""
    body = request(model, "Write a very long story.", 400) | {
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
        "response_format": LONG,
    }
    content = json.dumps(body).encode()
    while time.monotonic() < until:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        seen.counts["never read"] += 1
        while (
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == ESTABLISHED and time.monotonic() < until
        ):
            await asyncio.sleep(0.5)
        seen.counts["never read, thrown out"] += (
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED
        )
        connection.close()


async def killed(port: int, model: str, process, clients: int, seen: Seen) -> None:
    """The engine is killed while all are being answered: each must be told so, and the next must be answered soon."""
    write_lock, told = asyncio.Semaphore(0), []

    async def one(number: int) -> None:
        try:
            async with contextlib.aclosing(
                events(port, request(model, opening(number), 400) | {"response_format": LONG})
            ) as stream:
                await anext(stream)
                writing.release()
                async for _ in stream:
                    pass
            seen.wrong.append("killed: an answer went on to its end")
        except ConnectionError as e:
            told.append(str(e))

    open_ones = [asyncio.create_task(one(number)) for number in range(clients)]
    with contextlib.suppress(TimeoutError):  # those who wait for a seat have not begun
        for _ in open_ones:
            await asyncio.wait_for(writing.acquire(), 5)
    engine = family(process.pid)[-1]  # a child of the helper that forks it
    os.kill(engine, signal.SIGKILL)
    start = time.monotonic()
    await asyncio.gather(*open_ones)
    seen.counts["killed under, and told so"] = sum("engine stopped" in text for text in told)
    seen.wrong += [f"killed: told {text!r}" for text in told if "engine stopped" not in text]
    while not seen.recovered:
        with contextlib.suppress(ConnectionError):
            await answered(port, request(model, "Hello!", 2))
            seen.recovered = time.monotonic() - start
        await asyncio.sleep(0.1)


async def watch(process, until: float, seen: Seen) -> None:
    while time.monotonic() < until:
        seen.megabytes.append(sum(map(resident, family(process.pid))))
        await asyncio.sleep(MEMORY_EVERY)


def family(pid: int) -> list[int]:
    """A process and its descendants (Linux)."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as f:
            parents[int(name)] = int(f.read().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def resident(pid: int) -> float:
    """Megabytes of memory in use."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0


def command(settings: LoadSettings) -> None:
    if settings.clients < 1 or settings.conversations < 1 or settings.minutes <= 0:
        raise UserError("--clients and --conversations are at least 1, --minutes above 0")
    if sys.platform != "linux":
        raise UserError("bench load looks at processes and connections as Linux shows them")
    model, seen = open_model(settings.model).name, Seen()

    async def run(port: int, process) -> None:
        conversations = await in_peace(port, model, settings.conversations)
        until = time.monotonic() + 60 * settings.minutes
        clients = [client(port, model, conversations, until, random.Random(i), seen) for i in range(settings.clients)]
        silent = [never_reads(port, model, until, seen) for _ in range(NEVER_READ)]
        await asyncio.gather(*clients, *silent, watch(process, until, seen))
        for whole, said in seen.otherwise:
            tie = await is_a_tie(port, model, whole[:-1], said)
            seen.counts["at a tie answered otherwise"] += tie
            if not tie:
                seen.wrong.append(
                    f"honest: {whole[-2]['content']!r} was answered {said!r}, in peace it was {whole[-1]['content']!r}"
                )
        await killed(port, model, process, settings.clients, seen)

    with server(model, 64) as (port, process):
        asyncio.run(run(port, process))
    firsts = sorted(seen.firsts) or [0.0]
    later = seen.megabytes[int(60 / MEMORY_EVERY) :] or seen.megabytes
    figures = dict(seen.counts) | {
        "tokens_per_second": round(seen.tokens / (60 * settings.minutes), 1),
        "first_token_median_seconds": round(firsts[len(firsts) // 2], 3), "first_token_p95_seconds": round(firsts[len(firsts) * 95 // 100], 3),
        "megabytes_after_a_minute": round(later[0]), "megabytes_least_then": round(min(later)), "megabytes_most_then": round(max(later)),
        "recovered_seconds": round(seen.recovered, 2), "wrong": len(seen.wrong),
    }  # fmt: skip
    table = Table("what", "")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console(stderr=True).print(table)
    for text in seen.wrong[:10]:
        Console(stderr=True).print(text, markup=False)
    if settings.json:
        print(json.dumps(figures | {"examples": seen.wrong[:20]}))
    if seen.wrong:
        sys.exit(1)
