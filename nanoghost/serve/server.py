"""`nanoghost serve`: the page and the API on this computer, for this computer."""

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

from nanoghost.errors import UserError
from nanoghost.serve.app import Service, make_app
from nanoghost.serve.client import EngineClient
from nanoghost.serve.connection import PatientProtocol
from nanoghost.serve.guard import Guard
from nanoghost.serve.model_registry import Registry
from nanoghost.serve.worker import Capacity
from nanoghost.tools.registry import available_tools

KEEP_ALIVE = 30  # seconds that an idle connection stays open


@dataclass(frozen=True)
class ServeSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model to keep ready; default: the one finished last. Requests may name any other."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but this computer's own needs an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key_file: Path | None = None
    """File whose first line is the key that requests must bring; NANOGHOST_API_KEY does the same."""
    allow_host: tuple[str, ...] = ()
    """Further names by which browsers and clients reach this server."""
    documents: Path | None = None
    """Folder of texts that the tool `lookup` searches."""
    seats: int = 64
    """Answers written at once; they share room for a quarter of as many whole contexts (a model that is not packed has a quarter of them)."""
    queue: int = 64
    """Answers that may wait for a seat; more are refused (429)."""
    context: int = 2048
    """Most tokens of one conversation."""
    drain: float = 30.0
    """Seconds that open answers have when the server is told to stop."""


class Server(uvicorn.Server):
    """Told to stop, it takes no more questions, and stays until those it has are answered or the time is up."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float):
        super().__init__(config)
        self.service, self.drain = service, drain

    def handle_exit(self, sig, frame) -> None:
        if self.service.draining:  # the second time does not wait
            self.until = 0.0
            return
        self.service.draining = True
        self.until = time.monotonic() + self.drain
        print("stopping when open answers are finished (again: at once)", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        late = self.service.draining and time.monotonic() > self.until
        if late:
            self.service.engine.stop()  # what is open ends with an error that says so
        done = self.service.draining and not self.service.engine.jobs and not self.answering
        return await super().on_tick(counter) or late or done

    @property
    def answering(self) -> int:
        return sum(connection.answering for connection in self.server_state.connections)


def loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_of(settings: ServeSettings) -> str | None:
    """The API key. Raises UserError for none where one is needed, and for one that protects nothing."""
    key = os.environ.get("NANOGHOST_API_KEY") or None
    if settings.api_key_file:
        lines = settings.api_key_file.read_text().splitlines()
        key = lines[0].strip() if lines else ""
    if key is not None and (len(key) < 16 or not key.isascii() or " " in key):
        raise UserError("an API key needs at least 16 letters and digits: `openssl rand -hex 24` makes one")
    if key is None and not loopback(settings.host):
        raise UserError(f"{settings.host} can be reached from other computers: serving there needs --api-key-file")
    return key


def listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(128)  # who comes before all is ready waits
    except (OSError, OverflowError) as e:
        listener.close()
        why = (
            "is in use: choose another with --port"
            if getattr(e, "errno", 0) == errno.EADDRINUSE
            else f"cannot be listened on ({e})"
        )
        raise UserError(f"port {settings.port} of {settings.host} {why}") from None
    return listener


async def serve(settings: ServeSettings, key: str | None, listener: socket.socket) -> None:
    capacity = Capacity(settings.seats, settings.context)
    registry = Registry(settings.model, capacity)
    engine = EngineClient(capacity, registry.ready_voice, settings.seats + settings.queue)
    service = Service(engine, registry, available_tools(settings.documents))
    host, port = listener.getsockname()[:2]
    app = Guard(
        make_app(service),
        service.metrics,
        key,
        (settings.host, *settings.allow_host),
        numbers=not loopback(settings.host),
    )
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False, date_header=False,
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=1, h11_max_incomplete_event_size=16_384,
    )  # fmt: skip
    engine.start()
    watching = asyncio.create_task(engine.watch())
    shown = f"[{host}]" if ":" in host else host
    print(f"{registry.default or 'no model yet'} at http://{shown}:{port}", file=sys.stderr, flush=True)
    try:
        await Server(config, service, settings.drain).serve(sockets=[listener])
    finally:
        watching.cancel()
        engine.stop()
        service.pool.shutdown(wait=False, cancel_futures=True)
        service.journals.shutdown()


def command(settings: ServeSettings) -> None:
    if (
        settings.seats < 1
        or settings.queue < 0
        or settings.context < 16
        or settings.drain < 0
        or not 0 <= settings.port < 65536
    ):
        raise UserError(
            "--seats is at least 1, --queue and --drain at least 0, --context at least 16, --port from 0 to 65535"
        )
    key = key_of(settings)
    listener = listen(settings)
    asyncio.run(serve(settings, key, listener))
