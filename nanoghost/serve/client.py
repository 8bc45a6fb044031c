"""The server's side of the engine process: start it, hand it jobs, pass on what rows write, start another when it dies.

Two threads stand at the pipe, so that neither a long message nor a full pipe ever holds up the event loop.
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

from nanoghost.serve.worker import Capacity, Delta, Failed, Job, Loaded, Voice, run

SILENCE = 60.0  # seconds without a word, while jobs are open, after which the engine process counts as stuck
LOADING = 900.0  # the same while it loads a model
AGAIN = 1.0  # seconds to wait before another start, if the last process did not live longer than this


class Full(Exception):
    """As many rows are served and waiting as may be."""


class Gone(Exception):
    """The engine process ended with this job open, or refused it."""

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


class Running:
    """A job handed in: what each of its samples writes, as it comes."""

    def __init__(self, job: Job, close: Callable[["Running"], None]):
        self.job, self._close = job, close
        self.queues = {sample: asyncio.Queue() for sample in ([-1] if job.score else []) + list(range(job.rows))}
        self.open = set(self.queues)

    async def deltas(self, sample: int) -> AsyncIterator[Delta]:
        """What one sample writes, to its end. Raises Gone. Sample -1 is the job's own ids being read."""
        while True:
            delta = await self.queues[sample].get()
            if isinstance(delta, Gone):
                raise delta
            yield delta
            if delta.finish_reason:
                return

    def end(self, sample: int | None = None) -> None:
        """Nobody wants more of this sample, or of any."""
        self._close(self, sample)

    def put(self, sample: int, delta) -> None:
        if sample in self.open:
            self.queues[sample].put_nowait(delta)


class EngineClient:
    def __init__(self, capacity: Capacity, default: Callable[[], Voice | None], most: int):
        """`default`: the model to load at each start; `most`: rows served and waiting at once."""
        self.capacity, self.default, self.most = capacity, default, most
        # Not a fork of this process, whose threads may hold locks. On Linux a process that has done nothing but import the
        # engine waits to be forked: so another engine is there in a second, where importing alone would take two or three.
        self.context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        self.context.set_forkserver_preload(
            ["nanoghost.serve.worker", "nanoghost.engine.grammar", "nanoghost.engine.prompt_logprobs"]
        )
        self.jobs: dict[int, Running] = {}
        self.numbers = count(1)
        self.starts, self.ready, self.loading, self.stopping = 0, False, False, False
        self.heard = time.monotonic()
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()

    # ── the process ───────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Start the process, in a running event loop."""
        self.loop = asyncio.get_running_loop()
        pipe, theirs = self.context.Pipe()
        self.process = self.context.Process(target=run, args=(theirs, self.capacity), name="engine", daemon=True)
        self.process.start()
        theirs.close()
        self.starts += 1
        self.started = self.heard = time.monotonic()
        self.ready = self.loading = False
        threading.Thread(target=self._listen, args=(pipe,), daemon=True).start()
        threading.Thread(target=self._send, args=(pipe, self.outbox), daemon=True).start()
        if voice := self.default():
            self.loading = True
            self.outbox.put(voice)
        else:
            self.ready = True

    def _listen(self, pipe) -> None:
        try:
            while True:
                self._soon(self._deliver, pipe.recv())
        except (EOFError, OSError):
            self._soon(self._died)

    def _soon(self, function, *arguments) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, *arguments)

    @staticmethod
    def _send(pipe, outbox: queue.SimpleQueue) -> None:
        try:
            while (message := outbox.get()) is not None:
                pipe.send(message)
        except OSError:  # the process is gone: _listen has noticed
            pass

    def _died(self) -> None:
        self.outbox.put(None)
        self.outbox = queue.SimpleQueue()  # for the next one
        self.ready = False
        for running in list(self.jobs.values()):
            self._fail(
                running, "the engine stopped in the middle of this answer; it is being started again: please ask again"
            )
        if not self.stopping:
            short = time.monotonic() - self.started < AGAIN
            self.loop.call_later(AGAIN if short else 0, self._again)

    def _again(self) -> None:
        if not self.stopping:
            self.start()

    async def watch(self) -> None:
        """Kill the process when it hangs: a dead one is replaced."""
        while not self.stopping:
            await asyncio.sleep(1)
            patience = LOADING if self.loading else SILENCE
            if (self.jobs or self.loading) and time.monotonic() - self.heard > patience and self.process.is_alive():
                self.heard = time.monotonic()
                self.process.kill()

    def stop(self) -> None:
        self.stopping = True
        for running in list(self.jobs.values()):
            self._fail(running, "the server is stopping")
        self.outbox.put(None)
        self.process.kill()  # it keeps nothing that could be lost
        self.process.join()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    # ── jobs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def rows(self) -> int:
        """Served and waiting."""
        return sum(len(running.open) for running in self.jobs.values())

    def submit(self, job: Job, begun: bool = False) -> Running:
        """Hand in a job; its number is given here. Raises Full, but not where it goes on with an answer that has begun."""
        if not begun and self.rows + max(1, job.rows) > self.most:
            raise Full
        if not self.jobs:
            self.heard = time.monotonic()
        job = replace(job, number=next(self.numbers))
        running = self.jobs[job.number] = Running(job, self._close)
        self.outbox.put(job)
        return running

    def _close(self, running: Running, sample: int | None) -> None:
        wanted = running.open if sample is None else running.open & {sample}
        if wanted and running.job.number in self.jobs:
            self.outbox.put((running.job.number, sample))
        running.open = running.open - wanted
        if not running.open:
            self.jobs.pop(running.job.number, None)

    def _fail(self, running: Running, message: str, refused: bool = False) -> None:
        self.jobs.pop(running.job.number, None)
        for sample in running.open:
            running.put(sample, Gone(message, refused))
        running.open = set()

    def _deliver(self, said: list) -> None:
        self.heard = time.monotonic()
        for part in said:
            match part:
                case Delta():
                    if running := self.jobs.get(part.number):
                        running.put(part.sample, part)
                        if part.finish_reason:
                            running.open.discard(part.sample)
                            if not running.open:
                                del self.jobs[part.number]
                case Failed():
                    self.loading = False
                    if not part.number:
                        print(f"the model to be kept ready is not: {part.message}", file=sys.stderr, flush=True)
                    elif running := self.jobs.get(part.number):
                        self._fail(running, part.message, refused=True)
                        self.outbox.put((part.number, None))
                case Loaded():
                    self.loading, self.ready = part.loading, self.ready or not part.loading
