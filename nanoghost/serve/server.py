"""`nanoghost serve`: the chat page and the API, by default for this computer only."""

import asyncio
import errno
import ipaddress
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
import uvicorn

from nanoghost.data.text_io import read_text
from nanoghost.errors import UserError
from nanoghost.serve.app import make_app
from nanoghost.serve.client import EngineClient
from nanoghost.serve.connection import TimeoutProtocol
from nanoghost.serve.engine_messages import Capacity
from nanoghost.serve.guard import Guard
from nanoghost.serve.model_registry import ModelRegistry
from nanoghost.serve.service import Service
from nanoghost.tools.registry import available_tools

KEEP_ALIVE = 30  # seconds that an idle connection stays open


@dataclass(frozen=True)
class ServeSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model to keep loaded; default: the one finished last. Requests may name any other."""
    host: str = "127.0.0.1"
    """Address to listen on. Any address that other computers can reach requires an API key."""
    port: int = 8000
    """Port to listen on; 0 selects a free one."""
    api_key_file: Path | None = None
    """File with the API key in its first line; the environment variable NANOGHOST_API_KEY does the same."""
    allow_host: tuple[str, ...] = ()
    """Further host names under which clients reach this server."""
    documents: Path | None = None
    """Folder of texts for the tool `lookup`."""
    slots: int = 64
    """Sequences generated at the same time. They share memory for a quarter as many full contexts; a model that cannot
    be quantized gets a quarter of the slots."""
    queue: int = 64
    """Sequences that may wait for a slot; further requests get the status 429."""
    context: int = 2048
    """Maximum number of tokens of a conversation."""
    drain: float = 30.0
    """Seconds to complete open requests when the server is stopped."""


def command(settings: ServeSettings) -> None:
    check_settings(settings)
    key = read_api_key(settings)
    listener = open_listener(settings)
    asyncio.run(serve(settings, key, listener))


def check_settings(settings: ServeSettings) -> None:
    """Raises UserError for settings that are out of range."""
    if settings.slots < 1:
        raise UserError("--slots must be at least 1")
    if settings.queue < 0:
        raise UserError("--queue must be at least 0")
    if settings.context < 16:
        raise UserError("--context must be at least 16")
    if settings.drain < 0:
        raise UserError("--drain must be at least 0")
    if not 0 <= settings.port < 65536:
        raise UserError("--port must be from 0 to 65535")


def read_api_key(settings: ServeSettings) -> str | None:
    """The API key. Raises UserError if it is required and missing, or too short."""
    key = os.environ.get("NANOGHOST_API_KEY") or None
    if settings.api_key_file:
        key = read_text(settings.api_key_file).partition("\n")[0].strip()
    if key is not None and (len(key) < 16 or not key.isascii() or " " in key):
        raise UserError("an API key needs at least 16 letters and digits; `openssl rand -hex 24` generates one")
    if key is None and not is_loopback(settings.host):
        raise UserError(f"other computers can reach {settings.host}: serving there requires --api-key-file")
    return key


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_listener(settings: ServeSettings) -> socket.socket:
    """A socket that listens on the address. Raises UserError if that is not possible."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(128)  # connections that arrive before the server is ready wait here
    except OSError as error:
        listener.close()
        address = f"port {settings.port} of {settings.host}"
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{address} is in use: choose another one with --port") from None
        raise UserError(f"cannot listen on {address}: {error}") from None
    return listener


async def serve(settings: ServeSettings, key: str | None, listener: socket.socket) -> None:
    """Run the server until it is stopped."""
    capacity = Capacity(settings.slots, settings.context)
    registry = ModelRegistry(settings.model, capacity)
    engine = EngineClient(capacity, registry.default_ref, settings.slots + settings.queue)
    service = Service(engine, registry, available_tools(settings.documents))
    hosts = (settings.host, *settings.allow_host)
    app = Guard(make_app(service), service.metrics, key, hosts, allow_ip_addresses=not is_loopback(settings.host))
    config = uvicorn.Config(
        app,
        http=TimeoutProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=16_384,
    )
    engine.start()
    watchdog = asyncio.create_task(engine.watch())
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    print(f"{registry.default or 'no model yet'} at http://{address}", file=sys.stderr, flush=True)
    try:
        await Server(config, service, settings.drain).serve(sockets=[listener])
    finally:
        watchdog.cancel()
        engine.stop()
        service.tool_threads.shutdown(wait=False, cancel_futures=True)
        service.chat_log_thread.shutdown()


class Server(uvicorn.Server):
    """uvicorn's server, which a signal first drains: open requests get time to complete, new ones are rejected."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float):
        super().__init__(config)
        self.service = service
        self.drain = drain
        self.deadline = float("inf")
        """Time when the server stops even if requests are open."""

    def handle_exit(self, sig, frame) -> None:
        if self.service.draining:  # a second signal stops the server at once
            self.deadline = 0.0
            return
        self.service.draining = True
        self.deadline = time.monotonic() + self.drain
        message = "stopping when the open requests are complete (repeat the signal to stop at once)"
        print(message, file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        timed_out = time.monotonic() > self.deadline
        if timed_out:
            self.service.engine.stop()  # open requests end with an error that says so
        is_idle = not self.service.engine.requests and not self.num_responding
        done = self.service.draining and is_idle
        return await super().on_tick(counter) or timed_out or done

    @property
    def num_responding(self) -> int:
        """Connections with a response that is not complete."""
        return sum(connection.is_responding for connection in self.server_state.connections)
