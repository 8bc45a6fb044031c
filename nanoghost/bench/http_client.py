"""A server in its own process and a small streaming client, for `bench serve` and `bench load`."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from nanoghost.errors import UserError

REQUEST_HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: {content_type}\r\n"
    "content-length: {length}\r\nconnection: close\r\n\r\n"
)


@dataclass(frozen=True)
class Reply:
    """A complete reply of the server."""

    text: str
    tokens: int
    """Length in tokens, as the server reports it."""
    first_token_seconds: float
    """Time from the request to the first text."""


def chat_request(
    model: str, conversation: str | list[dict], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> dict:
    """The body of a request. `conversation`: messages, or the text of a single user message."""
    messages = conversation
    if isinstance(conversation, str):
        messages = [{"role": "user", "content": conversation}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}


async def post(
    port: int, body: bytes, content_type: str = "application/json"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request. The caller reads the response from the reader and closes the writer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(port, body, content_type))
    await writer.drain()
    return reader, writer


def request_bytes(port: int, body: bytes, content_type: str = "application/json") -> bytes:
    """A complete HTTP request."""
    return REQUEST_HEAD.format(port=port, content_type=content_type, length=len(body)).encode() + body


async def read_status(reader: asyncio.StreamReader) -> int:
    """The HTTP status of a response; 0 if the connection was closed without one."""
    status_line = (await reader.readline()).split()
    return int(status_line[1]) if len(status_line) > 1 else 0


async def stream_events(port: int, body: dict) -> AsyncIterator[dict]:
    """Stream the reply to a chat request: its events, then an empty one. Raises ConnectionError if it is incomplete."""
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    reader, writer = await post(port, json.dumps(body | streaming).encode())
    try:
        if await read_status(reader) != 200:
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
        raise ConnectionError("the stream ended without [DONE]")
    finally:
        writer.close()


async def complete_chat(port: int, body: dict) -> Reply:
    """The whole reply to a chat request. Raises ConnectionError if it is incomplete."""
    start = time.perf_counter()
    text, tokens, first_token_seconds = "", 0, 0.0
    async with contextlib.aclosing(stream_events(port, body)) as events:
        async for event in events:
            for choice in event.get("choices", ()):
                text += choice["delta"].get("content") or ""
                if text and not first_token_seconds:
                    first_token_seconds = time.perf_counter() - start
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return Reply(text, tokens, first_token_seconds)


@contextlib.contextmanager
def running_server(model: str, slots: int) -> Iterator[tuple[int, subprocess.Popen]]:
    """(port, process) of `nanoghost serve`, once its model is loaded."""
    command = [sys.executable, "-m", "nanoghost", "serve", model, "--port", "0", "--slots", str(slots)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    try:
        port = printed_port(process)
        asyncio.run(complete_chat(port, chat_request(model, "Hello!", 2)))  # waits until the model is loaded
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that its log does not fill the pipe
        yield port, process
    finally:
        process.terminate()
        process.wait()


def printed_port(process: subprocess.Popen) -> int:
    """The port in the address that the server prints."""
    for line in process.stderr:
        if match := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return int(match[1])
    raise UserError("the server did not start")
