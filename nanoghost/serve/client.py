"""The server's side of the engine process: starts it, sends requests, distributes its tokens, restarts it when it dies.

Two threads read and write the pipe, so that neither a long message nor a full pipe blocks the event loop.
"""

import asyncio
import multiprocessing
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import count
from multiprocessing.process import BaseProcess

from nanoghost.serve.engine_messages import (
    PROMPT_SAMPLE,
    Cancel,
    Capacity,
    EngineRequest,
    LoadModel,
    ModelRef,
    ModelStatus,
    RequestFailed,
    TokenDelta,
)
from nanoghost.serve.worker import run_worker

SILENCE_TIMEOUT = 60.0  # seconds without a message, while there are requests, after which the engine counts as stuck
LOADING_TIMEOUT = 900.0  # the same while it loads a model
MIN_LIFETIME = 1.0  # seconds; if the engine died sooner, the next start is delayed by this time


class QueueFull(Exception):
    """The maximum number of sequences is running or waiting."""


class EngineError(Exception):
    """The engine did not complete a request."""


class EngineStopped(EngineError):
    """The engine process ended before the request was complete."""


class EngineRejected(EngineError):
    """The engine cannot serve this request."""


class RequestHandle:
    """A submitted request: iterates over the new tokens of each sample, and cancels samples."""

    def __init__(self, request: EngineRequest, cancel: Callable[["RequestHandle", int | None], None]):
        self.request = request
        self._cancel = cancel
        samples = list(range(request.num_sequences))
        if request.prompt_logprobs:
            samples.append(PROMPT_SAMPLE)
        self.queues: dict[int, asyncio.Queue] = {sample: asyncio.Queue() for sample in samples}
        self.open_samples = set(samples)
        """Samples that are not finished and not cancelled."""

    async def deltas(self, sample: int) -> AsyncIterator[TokenDelta]:
        """The deltas of one sample, until it is finished. Raises EngineError."""
        while True:
            item = await self.queues[sample].get()
            if isinstance(item, EngineError):
                raise item
            yield item
            if item.finish_reason:
                return

    def cancel(self, sample: int | None = None) -> None:
        """Cancel a sample, or all of them, unless they are finished."""
        self._cancel(self, sample)

    def put(self, sample: int, item: TokenDelta | EngineError) -> None:
        if sample in self.open_samples:
            self.queues[sample].put_nowait(item)


class EngineClient:
    def __init__(self, capacity: Capacity, default_model: Callable[[], ModelRef | None], max_sequences: int):
        """`default_model`: the model to load at each start; `max_sequences`: running and waiting ones together."""
        self.capacity = capacity
        self.default_model = default_model
        self.max_sequences = max_sequences
        # The engine must not be a fork of this process, whose threads may hold locks. On Linux, a helper process is
        # forked that has only imported the engine. So a new engine starts in a second; importing takes two or three.
        self.context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self.context.set_forkserver_preload(["nanoghost.serve.worker"])
        self.requests: dict[int, RequestHandle] = {}
        self.request_ids = count(1)
        self.num_starts = 0
        self.ready = False
        """The default model is loaded."""
        self.loading = False
        """The engine is loading a model."""
        self.stopping = False
        self.last_message = time.monotonic()
        """Time of the engine's last message."""
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()
        """Messages to the engine; None ends the thread that sends them."""
        # Set by `start`:
        self.loop: asyncio.AbstractEventLoop
        self.process: BaseProcess
        self.started: float

    # ── the process ───────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the process. An event loop must be running."""
        self.loop = asyncio.get_running_loop()
        pipe, engine_pipe = self.context.Pipe()
        arguments = (engine_pipe, self.capacity)
        self.process = self.context.Process(target=run_worker, args=arguments, name="engine", daemon=True)
        self.process.start()
        engine_pipe.close()
        self.num_starts += 1
        self.started = self.last_message = time.monotonic()
        self.ready = self.loading = False
        threading.Thread(target=self._read_pipe, args=(pipe,), daemon=True).start()
        threading.Thread(target=self._write_pipe, args=(pipe, self.outbox), daemon=True).start()
        model = self.default_model()
        if model:
            self.loading = True
            self.outbox.put(LoadModel(model))
        else:
            self.ready = True

    def _read_pipe(self, pipe) -> None:
        try:
            while True:
                self._call_in_loop(self._handle, pipe.recv())
        except (EOFError, OSError):
            self._call_in_loop(self._on_exit)

    def _call_in_loop(self, function, *arguments) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    @staticmethod
    def _write_pipe(pipe, outbox: queue.SimpleQueue) -> None:
        try:
            while (message := outbox.get()) is not None:
                pipe.send(message)
        except OSError:  # the process is gone, which _read_pipe reports
            pass

    def _on_exit(self) -> None:
        self.outbox.put(None)
        self.outbox = queue.SimpleQueue()  # for the next process
        self.ready = False
        for handle in list(self.requests.values()):
            self._fail(handle, EngineStopped("the engine stopped during this request and is restarting; please retry"))
        if not self.stopping:
            lifetime = time.monotonic() - self.started
            self.loop.call_later(MIN_LIFETIME if lifetime < MIN_LIFETIME else 0, self._restart)

    def _restart(self) -> None:
        if not self.stopping:
            self.start()

    async def watch(self) -> None:
        """Watchdog: kill the process when it hangs. `_on_exit` then starts another one."""
        while not self.stopping:
            await asyncio.sleep(1)
            timeout = LOADING_TIMEOUT if self.loading else SILENCE_TIMEOUT
            silent = time.monotonic() - self.last_message > timeout
            if silent and (self.requests or self.loading) and self.process.is_alive():
                self.last_message = time.monotonic()  # do not kill it again every second until it is gone
                self.process.kill()

    def stop(self) -> None:
        self.stopping = True
        for handle in list(self.requests.values()):
            self._fail(handle, EngineStopped("the server is stopping"))
        self.outbox.put(None)
        self.process.kill()  # it holds nothing that could be lost
        self.process.join()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_sequences(self) -> int:
        """Sequences that are running or waiting."""
        return sum(len(handle.open_samples) for handle in self.requests.values())

    def submit(self, request: EngineRequest, is_continuation: bool = False) -> RequestHandle:
        """Send a request to the engine; its id is assigned here.

        Raises QueueFull, but not for the continuation of a reply that the client has begun to read.
        """
        num_new = max(1, request.num_sequences)  # a request for log-probabilities of the prompt also counts
        if not is_continuation and self.num_sequences + num_new > self.max_sequences:
            raise QueueFull
        if not self.requests:
            self.last_message = time.monotonic()  # the engine was silent for lack of work
        request = replace(request, request_id=next(self.request_ids))
        handle = RequestHandle(request, self._cancel)
        self.requests[request.request_id] = handle
        self.outbox.put(request)
        return handle

    def _cancel(self, handle: RequestHandle, sample: int | None) -> None:
        cancelled = set(handle.open_samples) if sample is None else handle.open_samples & {sample}
        if cancelled and handle.request.request_id in self.requests:
            self.outbox.put(Cancel(handle.request.request_id, sample))
        handle.open_samples -= cancelled
        if not handle.open_samples:
            self.requests.pop(handle.request.request_id, None)

    def _fail(self, handle: RequestHandle, error: EngineError) -> None:
        self.requests.pop(handle.request.request_id, None)
        for sample in handle.open_samples:
            handle.put(sample, error)
        handle.open_samples = set()

    def _handle(self, messages: list[TokenDelta | RequestFailed | ModelStatus]) -> None:
        self.last_message = time.monotonic()
        for message in messages:
            match message:
                case TokenDelta():
                    self._handle_delta(message)
                case RequestFailed():
                    self._handle_failure(message)
                case ModelStatus():
                    self.loading = message.loading
                    self.ready = self.ready or not message.loading

    def _handle_delta(self, delta: TokenDelta) -> None:
        handle = self.requests.get(delta.request_id)
        if handle is None:
            return
        handle.put(delta.sample, delta)
        if delta.finish_reason:
            handle.open_samples.discard(delta.sample)
            if not handle.open_samples:
                del self.requests[delta.request_id]

    def _handle_failure(self, failure: RequestFailed) -> None:
        self.loading = False
        if failure.request_id is None:
            print(f"the default model could not be loaded: {failure.message}", file=sys.stderr, flush=True)
            return
        handle = self.requests.get(failure.request_id)
        if handle:
            self._fail(handle, EngineRejected(failure.message))
            self.outbox.put(Cancel(failure.request_id))  # its other samples may still be running
