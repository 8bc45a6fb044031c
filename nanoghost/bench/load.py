"""`nanoghost bench load`: a server with many clients at once, some of them misbehaving, and recovery of its engine.

Every complete reply is compared with the reply to the same request without load. This detects errors, and text of
other conversations. The two may differ only at ties: where two tokens are almost equally probable, rounding decides,
and it depends on which requests share a batch (not with quantized weights).
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from nanoghost.bench.decode import QUESTIONS, WORDS
from nanoghost.bench.http_client import (
    chat_request,
    complete_chat,
    post,
    read_status,
    request_bytes,
    running_server,
    stream_events,
)
from nanoghost.bench.processes import memory_megabytes, process_tree
from nanoghost.commands.arguments import ModelArgument
from nanoghost.errors import UserError
from nanoghost.home import open_model
from nanoghost.progress import JsonFlag

SLOTS = 64
MAX_TOKENS = 16  # of a reply
REFERENCE_CLIENTS = 8  # concurrent conversations while the expected replies are collected
TIE_NATS = 0.01  # two tokens whose log-probabilities differ by less are a tie
STALLED_CLIENTS = 2  # clients that send a request and do not read the response
MEMORY_SECONDS = 2.0  # between two measurements of memory
FOLLOW_UP = "Say that in one sentence."
LONG_REPLY = {  # a response format that forces any model to write a long reply
    "type": "json_schema",
    "json_schema": {"name": "long", "schema": {"type": "string", "minLength": 5000}},
}
TCP_ESTABLISHED = 1  # state of a TCP connection in Linux


@dataclass(frozen=True)
class LoadSettings(ModelArgument, JsonFlag):
    clients: int = 32
    """Number of clients at once."""
    conversations: int = 200
    """Number of different conversations, of two questions each."""
    minutes: float = 5.0
    """Duration."""


@dataclass
class LoadStats:
    """What all clients together observe."""

    first_token_seconds: list[float] = field(default_factory=list)
    """Time to the first text of each complete reply."""
    tokens: int = 0
    """Tokens of all complete replies."""
    counts: Counter = field(default_factory=Counter)
    """Number of requests by outcome."""
    errors: list[str] = field(default_factory=list)
    mismatches: list[tuple[list[dict], str]] = field(default_factory=list)
    """(conversation up to the expected reply, the actual reply)."""
    megabytes: list[float] = field(default_factory=list)
    """Memory of the server, every MEMORY_SECONDS."""
    recovery_seconds: float = 0.0
    """Time from the end of the engine to the next reply."""


# -- replies without load ---------------------------------------------------------------------------------------------


def first_question(number: int) -> str:
    """The first question of a conversation, different for each number."""
    word = WORDS[number % len(WORDS)]
    templates = list(QUESTIONS.values())
    template = templates[number // len(WORDS) % len(templates)]
    return template.format(word=word, text=f"the words of {word}") + f" ({number})"


async def reference_conversations(port: int, model: str, count: int) -> list[list[dict]]:
    """Conversations with the replies that are expected under load."""
    semaphore = asyncio.Semaphore(REFERENCE_CLIENTS)

    async def converse(number: int) -> list[dict]:
        messages: list[dict] = []
        async with semaphore:
            for question in (first_question(number), FOLLOW_UP):
                messages.append({"role": "user", "content": question})
                reply = await complete_chat(port, chat_request(model, messages, MAX_TOKENS))
                messages.append({"role": "assistant", "content": reply.text})
        return messages

    return list(await asyncio.gather(*map(converse, range(count))))


async def is_tie(port: int, model: str, messages: list[dict], reply: str) -> bool:
    """Whether a reply departs from the model's reply at a token that is almost as probable."""
    request = chat_request(model, messages, MAX_TOKENS) | {"logprobs": True, "top_logprobs": 5}
    tokens = []
    async with contextlib.aclosing(stream_events(port, request)) as events:
        async for event in events:
            for choice in event.get("choices", ()):
                tokens += (choice["logprobs"] or {}).get("content", ())
    common = ""
    for token in tokens:
        if not reply.startswith(common + token["token"]):
            tied = [other["token"] for other in token["top_logprobs"] if other["logprob"] > token["logprob"] - TIE_NATS]
            return any(continues_with(reply, common, other) for other in tied)
        common += token["token"]
    return reply == common


def continues_with(reply: str, common: str, token: str) -> bool:
    """Whether a reply begins with the text `common` and this token, or ends after `common` and the token is special."""
    return reply.startswith(common + token) or (reply == common and token.startswith("<|"))


# -- clients ----------------------------------------------------------------------------------------------------------


async def run_client(
    port: int, model: str, conversations: list[list[dict]], until: float, rng: random.Random, stats: LoadStats
) -> None:
    """Send one request after the other: a tenth are malformed, a tenth are cancelled, the others are regular."""
    while time.monotonic() < until:
        draw, conversation = rng.random(), rng.choice(conversations)
        if draw < 0.1:
            await send_malformed(port, model, rng, stats)
        elif draw < 0.2:
            await cancel_early(port, model, conversation, rng, stats)
        else:
            await hold_conversation(port, model, conversation, stats)


def malformed_request(model: str, rng: random.Random) -> tuple[bytes, str]:
    """A random request that the server must refuse: (body, content type)."""
    request = chat_request(model, "Hello!", 4)
    long_message = {"role": "user", "content": "word " * 40_000}
    invalid_fields = [
        {"surprise": 1},
        {"model": "../../etc/passwd"},
        {"max_tokens": -1},
        {"messages": []},
        {"messages": [long_message]},
    ]
    body = json.dumps(request).encode()
    requests = [(body, "text/plain")]
    for content in (body[:-9], b"\xff\xfe{}", b"[" * 5000):
        requests.append((content, "application/json"))
    for fields in invalid_fields:
        requests.append((json.dumps(request | fields).encode(), "application/json"))
    return rng.choice(requests)


async def send_malformed(port: int, model: str, rng: random.Random, stats: LoadStats) -> None:
    body, content_type = malformed_request(model, rng)
    reader, writer = await post(port, body, content_type)
    status = await read_status(reader)
    stats.counts["malformed"] += 1
    if not 400 <= status < 500:
        stats.errors.append(f"a malformed request got status {status}")
    writer.close()


async def cancel_early(port: int, model: str, conversation: list[dict], rng: random.Random, stats: LoadStats) -> None:
    """Send a request and disconnect after a few events."""
    request = chat_request(model, conversation[:1], MAX_TOKENS)
    async with contextlib.aclosing(stream_events(port, request)) as events:
        for _ in range(rng.randrange(1, 12)):
            await anext(events, None)
    stats.counts["cancelled"] += 1


async def hold_conversation(port: int, model: str, conversation: list[dict], stats: LoadStats) -> None:
    """Ask both questions, and compare the replies with those without load."""
    for turn in range(0, len(conversation), 2):
        try:
            reply = await complete_chat(port, chat_request(model, conversation[: turn + 1], MAX_TOKENS))
        except ConnectionError as e:
            stats.errors.append(f"a regular request failed: {e}")
            break
        stats.counts["complete"] += 1
        stats.tokens += reply.tokens
        stats.first_token_seconds.append(reply.first_token_seconds)
        if reply.text != conversation[turn + 1]["content"]:
            stats.mismatches.append((conversation[: turn + 2], reply.text))


async def stall(port: int, model: str, until: float, stats: LoadStats) -> None:
    """Request a reply that is larger than the socket buffers, and do not read it until the server disconnects."""
    request = chat_request(model, "Write a very long story.", 400) | {"response_format": LONG_REPLY}
    request |= {"stream": True, "logprobs": True, "top_logprobs": 20}
    content = request_bytes(port, json.dumps(request).encode())
    while time.monotonic() < until:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.sendall(content)
        stats.counts["stalled"] += 1
        while is_connected(connection) and time.monotonic() < until:
            await asyncio.sleep(0.5)
        if not is_connected(connection):
            stats.counts["stalled, disconnected"] += 1
        connection.close()


def is_connected(connection: socket.socket) -> bool:
    """Whether the other side has not disconnected (Linux)."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_ESTABLISHED


# -- killing the engine -----------------------------------------------------------------------------------------------


async def kill_engine(port: int, model: str, server: subprocess.Popen, clients: int, stats: LoadStats) -> None:
    """Kill the engine while requests are open. Each must get an error event, and the server must reply again."""
    first_event = asyncio.Semaphore(0)
    messages: list[str] = []

    async def request(number: int) -> None:
        body = chat_request(model, first_question(number), 400) | {"response_format": LONG_REPLY}
        try:
            async with contextlib.aclosing(stream_events(port, body)) as events:
                await anext(events)
                first_event.release()
                async for _ in events:
                    pass
            stats.errors.append("a reply was completed although the engine was killed")
        except ConnectionError as e:
            messages.append(str(e))

    requests = [asyncio.create_task(request(number)) for number in range(clients)]
    with contextlib.suppress(TimeoutError):  # requests that wait for a slot have no first event
        for _ in requests:
            await asyncio.wait_for(first_event.acquire(), 5)
    engine = process_tree(server.pid)[-1]  # the youngest generation: a child process of the server forks it
    os.kill(engine, signal.SIGKILL)
    start = time.monotonic()
    await asyncio.gather(*requests)
    for message in messages:
        if "engine stopped" in message:
            stats.counts["open when the engine was killed"] += 1
        else:
            stats.errors.append(f"after the engine was killed, a request failed with {message!r}")
    while not stats.recovery_seconds:
        with contextlib.suppress(ConnectionError):
            await complete_chat(port, chat_request(model, "Hello!", 2))
            stats.recovery_seconds = time.monotonic() - start
        await asyncio.sleep(0.1)


# -- the whole test ---------------------------------------------------------------------------------------------------


async def measure_memory(server: subprocess.Popen, until: float, stats: LoadStats) -> None:
    while time.monotonic() < until:
        stats.megabytes.append(sum(map(memory_megabytes, process_tree(server.pid))))
        await asyncio.sleep(MEMORY_SECONDS)


async def run_load(port: int, server: subprocess.Popen, model: str, settings: LoadSettings) -> LoadStats:
    """All clients at once, then the check of the mismatches, then the end of the engine."""
    stats = LoadStats()
    conversations = await reference_conversations(port, model, settings.conversations)
    until = time.monotonic() + 60 * settings.minutes
    tasks = [measure_memory(server, until, stats)]
    for i in range(settings.clients):
        tasks.append(run_client(port, model, conversations, until, random.Random(i), stats))
    for _ in range(STALLED_CLIENTS):
        tasks.append(stall(port, model, until, stats))
    await asyncio.gather(*tasks)
    for conversation, reply in stats.mismatches:
        question, expected = conversation[-2]["content"], conversation[-1]["content"]
        if await is_tie(port, model, conversation[:-1], reply):
            stats.counts["different at a tie"] += 1
        else:
            stats.errors.append(f"the reply to {question!r} was {reply!r}, without load it was {expected!r}")
    await kill_engine(port, model, server, settings.clients, stats)
    return stats


def summarize(stats: LoadStats, minutes: float) -> dict:
    """The figures of the table."""
    first_token = sorted(stats.first_token_seconds) or [0.0]
    after_a_minute = stats.megabytes[int(60 / MEMORY_SECONDS) :] or stats.megabytes
    return dict(stats.counts) | {
        "tokens_per_second": round(stats.tokens / (60 * minutes), 1),
        "first_token_median_seconds": round(first_token[len(first_token) // 2], 3),
        "first_token_p95_seconds": round(first_token[len(first_token) * 95 // 100], 3),
        "megabytes_after_a_minute": round(after_a_minute[0]),
        "megabytes_min_after_a_minute": round(min(after_a_minute)),
        "megabytes_max_after_a_minute": round(max(after_a_minute)),
        "recovery_seconds": round(stats.recovery_seconds, 2),
        "errors": len(stats.errors),
    }


def command(settings: LoadSettings) -> None:
    if settings.clients < 1 or settings.conversations < 1 or settings.minutes <= 0:
        raise UserError("--clients and --conversations must be at least 1, --minutes above 0")
    if sys.platform != "linux":
        raise UserError("bench load needs Linux: it reads /proc and the state of TCP connections")
    model = open_model(settings.model).name
    with running_server(model, SLOTS) as (port, server):
        stats = asyncio.run(run_load(port, server, model, settings))
    figures = summarize(stats, settings.minutes)
    table = Table("figure", "")
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    console = Console(stderr=True)
    console.print(table)
    for error in stats.errors[:10]:
        console.print(error, markup=False)
    if settings.json:
        print(json.dumps(figures | {"examples": stats.errors[:20]}))
    if stats.errors:
        sys.exit(1)
