"""What the server adds to the engine's work.

The same questions are asked of the engine in this process and, over HTTP, of a server: with the same seeds both write the
same tokens, so the times compare.
"""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost import hardware
from nanoghost.bench.decode import KINDS, WORDS
from nanoghost.bench.table import tell
from nanoghost.commands.arguments import parse_numbers
from nanoghost.engine.engine import open_engine
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.home import open_model
from nanoghost.tokenizer.chat_format import render


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


# ── a client ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def send(
    port: int, body: bytes, kind: str = "application/json"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def events(port: int, body: dict) -> AsyncIterator[dict]:
    """What is streamed in answer to a request, and at last an empty object. Raises ConnectionError with what went wrong instead."""
    reader, writer = await send(
        port, json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    )
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
                if text and not first:
                    first = time.perf_counter() - start
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return text, tokens, first


@contextlib.contextmanager
def server(model: str, seats: int):
    """A server in a process of its own, ready to answer: (its port, its process)."""
    words = [sys.executable, "-m", "nanoghost", "serve", model, "--port", "0", "--slots", str(seats)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        port = next(
            (int(found[1]) for line in process.stderr if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line))), None
        )
        if port is None:
            raise UserError("the server did not start")
        asyncio.run(answered(port, request(model, "Hello!", 2)))  # the model is loaded then
        threading.Thread(target=process.stderr.read, daemon=True).start()  # what it says more must not fill the pipe
        yield port, process
    finally:
        process.terminate()
        process.wait()


def request(model: str, said: str | list[dict], tokens: int, temperature: float = 0.0, seed: int = 0) -> dict:
    """`said`: a question, or a whole conversation."""
    messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": temperature, "seed": seed}


# ── what HTTP costs ─────────────────────────────────────────────────────────────────────────────────────────────────


def command(settings: ServeBenchSettings) -> None:
    hardware.prepare()
    if settings.tokens < 1 or settings.rounds < 1:
        raise UserError("--tokens and --rounds are at least 1")
    streams, folder = parse_numbers("--streams", settings.streams, 1), open_model(settings.model)
    engine = open_engine(folder, max(streams), settings.tokens + 64)
    asked = [KINDS["story"].format(word=f"{WORDS[i % len(WORDS)]} and the number {i}") for i in range(max(streams))]

    def alone(count: int) -> float:
        start, rows = time.perf_counter(), []
        for i, text in enumerate(asked[:count]):
            prompt, _ = render([{"role": "user", "content": text}], engine.tokenizer, generation=True)
            rows += engine.add(prompt, SamplingParams(settings.tokens, 0.8, seed=i))
        while engine.has_unfinished:
            engine.step()
        return sum(len(row.completion_ids) for row in rows) / (time.perf_counter() - start)

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
