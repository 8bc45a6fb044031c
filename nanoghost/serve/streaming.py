"""Responses that end when the client disconnects: a stream of server-sent events, or one JSON object."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from nanoghost.errors import UserError
from nanoghost.serve.client import EngineError
from nanoghost.serve.http_errors import ClientDisconnected, response_for_exception


async def cancel_on_disconnect(request: Request, work: Awaitable) -> Any:
    """The result of the work. It is cancelled if the client disconnects, which raises ClientDisconnected."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnected
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def event_stream(request: Request, events: AsyncIterator[dict]) -> Response:
    """A response with server-sent events. An error before the first event becomes an ordinary error response."""
    first = await cancel_on_disconnect(request, anext(events))

    async def lines() -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(events):
                yield event_line(first)
                async for event in events:
                    # Writing to a closed connection never waits in uvicorn. Without this sleep its tasks would not run
                    # and the disconnect would go unnoticed.
                    await asyncio.sleep(0)
                    yield event_line(event)
        except (EngineError, UserError) as error:
            yield b"data: " + response_for_exception(error).body + b"\n\n"
        yield b"data: [DONE]\n\n"

    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def event_line(event: dict) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
