"""What the server adds to the engine's work, and how it bears many clients at once, some of them bad.

`bench serve` asks the same questions of the engine in this process and, over HTTP, of a server: with the same seeds both write the
same tokens, so the times compare. `bench load` lets many clients talk to a server for some minutes; what an honest one is
answered must be, to the letter, what it is answered when nobody else is there.
"""

import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost import machine
from nanoghost.bench.decode import KINDS, WORDS
from nanoghost.bench.table import tell
from nanoghost.chat import render
from nanoghost.engine.generate import open_engine
from nanoghost.engine.sampler import Sampling
from nanoghost.errors import UserError
from nanoghost.lists import numbers
from nanoghost.runs import open_model

TOKENS = 48  # of an answer under load
NEVER_READ = 2  # clients that ask and do not read
MEMORY_EVERY = 2.0  # seconds


@dataclass(frozen=True)
class ServeBenchSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    streams: str = "1,16,64"
    """How many conversations are written at once; several numbers with commas."""
    tokens: int = 128
    """Most tokens that each writes."""
    rounds: int = 3
    """Times that everything is measured."""
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass(frozen=True)
class LoadSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    clients: int = 32
    """How many ask at the same time."""
    minutes: float = 5.0
    """For how long."""
    json: bool = False
    """Print the figures as JSON on standard output."""


# ── a client ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def send(port: int, body: bytes, kind: str = "application/json") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def events(port: int, body: dict) -> AsyncIterator[dict]:
    """What is streamed in answer to a request, and at last an empty object. Raises ConnectionError with what went wrong instead."""
    reader, writer = await send(port, json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode())
    try:
        status = (await reader.readline()).split()
        if status[1:2] != [b"200"]:
            raise ConnectionError((await reader.read()).decode(errors="replace")[-300:])
        async for line in reader:
            if line.strip() == b"data: [DONE]":
                yield {}
                return
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ConnectionError(event["error"]["message"])
                yield event
        raise ConnectionError("the stream ended before its end")
    finally:
        writer.close()


async def answered(port: int, body: dict) -> tuple[str, int, float]:
    """(text, tokens, seconds to the first of it)."""
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async with contextlib.aclosing(events(port, body)) as stream:
        async for event in stream:
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
                first = first or (text and time.perf_counter() - start)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens, first


@contextlib.contextmanager
def server(model: str, seats: int):
    """A server in a process of its own, ready to answer: (its port, its process)."""
    words = [sys.executable, "-m", "nanoghost", "serve", model, "--port", "0", "--seats", str(seats)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        port = next((int(found[1]) for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line))), None)
        if port is None:
            raise UserError("the server did not start")
        asyncio.run(answered(port, request(model, "Hello!", 2)))  # the model is loaded then
        threading.Thread(target=process.stderr.read, daemon=True).start()  # what it says more must not fill the pipe
        yield port, process
    finally:
        process.terminate()
        process.wait()


def request(model: str, text: str, tokens: int, temperature: float = 0.0, seed: int = 0) -> dict:
    message = {"role": "user", "content": text}
    return {"model": model, "messages": [message], "max_tokens": tokens, "temperature": temperature, "seed": seed}


# ── what HTTP costs ─────────────────────────────────────────────────────────────────────────────────────────────────


def command(settings: ServeBenchSettings) -> None:
    machine.prepare()
    if settings.tokens < 1 or settings.rounds < 1:
        raise UserError("--tokens and --rounds are at least 1")
    streams, folder = numbers("--streams", settings.streams, 1), open_model(settings.model)
    engine = open_engine(folder, max(streams), settings.tokens + 64)
    engine.runner.drafts = False
    asked = [KINDS["story"].format(word=f"{WORDS[i % len(WORDS)]} and the number {i}") for i in range(max(streams))]

    def alone(count: int) -> float:
        start, rows = time.perf_counter(), []
        for i, text in enumerate(asked[:count]):
            prompt, _ = render([{"role": "user", "content": text}], engine.tokenizer, generation=True)
            rows += engine.add(prompt, Sampling(settings.tokens, 0.8, seed=i))
        while engine.running or engine.waiting:
            engine.step()
        return sum(len(row.ids) for row in rows) / (time.perf_counter() - start)

    async def together(port: int, count: int) -> float:
        start = time.perf_counter()
        bodies = [request(folder.name, text, settings.tokens, 0.8, i) for i, text in enumerate(asked[:count])]
        found = await asyncio.gather(*(answered(port, body) for body in bodies))
        return sum(tokens for _, tokens, _ in found) / (time.perf_counter() - start)

    with server(folder.name, max(streams)) as (port, _):
        works = []
        for count in streams:
            works.append(("engine", "answers", count, lambda count=count: alone(count)))
            works.append(("server", "answers", count, lambda count=count: asyncio.run(together(port, count))))
        tell(settings, {}, works, None)


# ── many clients ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Seen:
    """What the clients of a load test met."""

    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)


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


async def client(port: int, model: str, expected: dict[str, str], until: float, rng, seen: Seen) -> None:
    """One after the other: mostly honest questions, a tenth given up, a tenth malformed."""
    while time.monotonic() < until:
        kind, text = rng.random(), rng.choice(list(expected))
        if kind < 0.1:
            reader, writer = await send(port, *malformed(model, rng))
            status = (await reader.readline()).split()[1:2]
            seen.counts["malformed"] += 1
            if not status or not status[0].startswith(b"4"):
                seen.wrong.append(f"malformed: answered {status}")
            writer.close()
        elif kind < 0.2:
            async with contextlib.aclosing(events(port, request(model, text, TOKENS))) as stream:
                for _ in range(rng.randrange(1, 12)):
                    await anext(stream, None)
            seen.counts["given up"] += 1
        else:
            try:
                said, tokens, first = await answered(port, request(model, text, TOKENS))
            except ConnectionError as e:
                seen.wrong.append(f"honest: {e}")
                continue
            seen.counts["answered"] += 1
            seen.tokens += tokens
            seen.firsts.append(first)
            if said != expected[text]:
                seen.wrong.append(f"honest: {text!r} was answered {said!r}, alone it was {expected[text]!r}")


async def never_reads(port: int, model: str, until: float, seen: Seen) -> None:
    while time.monotonic() < until:
        body = request(model, "Write a very long story.", 1500) | {"stream": True}
        reader, writer = await send(port, json.dumps(body).encode())
        writer.transport.pause_reading()
        for _ in range(60):
            await asyncio.sleep(1)
            if writer.is_closing() or time.monotonic() > until:
                break
        seen.counts["never read"] += 1
        writer.transport.abort()


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


def load(settings: LoadSettings) -> None:
    if settings.clients < 1 or settings.minutes <= 0:
        raise UserError("--clients is at least 1, --minutes above 0")
    model, seen = open_model(settings.model).name, Seen()
    questions = [kind.format(word=word, text=f"the words of {word}") + f" ({i})" for i, word in enumerate(WORDS) for kind in KINDS.values()]

    async def run(port: int, process) -> None:
        expected = {text: (await answered(port, request(model, text, TOKENS)))[0] for text in questions}
        until = time.monotonic() + 60 * settings.minutes
        clients = [client(port, model, expected, until, random.Random(i), seen) for i in range(settings.clients)]
        silent = [never_reads(port, model, until, seen) for _ in range(NEVER_READ)]
        await asyncio.gather(*clients, *silent, watch(process, until, seen))

    with server(model, 64) as (port, process):
        asyncio.run(run(port, process))
    firsts = sorted(seen.firsts) or [0.0]
    minute = int(60 / MEMORY_EVERY)
    early, late = seen.megabytes[minute : minute + 10] or seen.megabytes, seen.megabytes[-10:]
    figures = dict(seen.counts) | {
        "tokens_per_second": round(seen.tokens / (60 * settings.minutes), 1),
        "first_token_median_seconds": round(firsts[len(firsts) // 2], 3), "first_token_p95_seconds": round(firsts[len(firsts) * 95 // 100], 3),
        "megabytes_after_a_minute": round(sum(early) / len(early)), "megabytes_at_the_end": round(sum(late) / len(late)),
        "wrong": len(seen.wrong),
    }  # fmt: skip
    table = Table("what", "")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console(stderr=True).print(table)
    for text in seen.wrong[:10]:
        Console(stderr=True).print(text, markup=False)
    if settings.json:
        print(json.dumps(figures | {"examples": seen.wrong[:20]}))
