"""The process that owns the models: token ids in, token ids out.

It takes jobs from a pipe, lets the engines make a step, and tells what every row wrote in one message a step. Where nothing
runs it sleeps on the pipe. It knows no HTTP, no text and no names of models that somebody typed: whatever goes wrong out there
cannot stop it, and when it is killed the server starts another (client.py).
"""

import contextlib
import signal
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from nanoghost import hardware
from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.sequence import Sequence
from nanoghost.engine.quantized_llama import supports_quantization
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_config
from nanoghost.home import ModelFolder

ADAPTERS = 32  # that one engine holds; with more it is opened anew when it rests
SYSTEM_PAGE = 2048  # numbers of 16 bits in the 4 KiB that the system gives at a time
SHARE = 4  # seats that share the room of one whole context, where rows take pages


@dataclass(frozen=True)
class Capacity:
    seats: int = 64
    """Rows at once."""
    context: int = 2048
    """Most tokens of one conversation."""
    bases: int = 2
    """Models that stay loaded; the one that rested longest goes."""


@dataclass(frozen=True)
class Voice:
    """Which model speaks: a base as it was finished then, and the adapter it speaks through."""

    base: str
    finished: float
    adapter: str = ""
    """Its folder; empty for the base alone."""
    adapter_made: int = 0
    """When, in nanoseconds: another night's adapter is another adapter."""


@dataclass(frozen=True)
class Job:
    """What is to be continued, or only read."""

    number: int
    voice: Voice
    ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    samples: int = 1
    owner: str = ""
    """Whose pages of keys and values it may share."""
    grammar: str = ""
    """Only texts of this grammar (llguidance)."""
    top: int | None = None
    """Note log-probabilities, and those of this many of the likeliest tokens."""
    score: bool = False
    """Before all else, how probable the ids themselves are (after the first)."""

    @property
    def rows(self) -> int:
        return self.samples if self.sampling.max_tokens else 0


@dataclass(frozen=True)
class Delta:
    """What a row wrote in a step."""

    number: int
    sample: int
    ids: list[int]
    likely: list
    """Of each id, if the job asked for it (watch.TopLogprobs)."""
    finish_reason: str


@dataclass(frozen=True)
class Failed:
    number: int
    message: str


@dataclass(frozen=True)
class Loaded:
    """A base is ready; or, with `loading`, will soon be."""

    base: str
    loading: bool = False


@dataclass(eq=False)
class Open:
    """A job being served."""

    job: Job
    engine: Engine
    rows: list[Sequence]
    told: list[int]
    """How many ids of each row were sent."""
    reading: Iterator | None
    """Pieces of the ids' own log-probabilities that are still to come."""


class Worker:
    def __init__(self, pipe: Connection, capacity: Capacity):
        self.pipe, self.capacity = pipe, capacity
        self.engines: OrderedDict[tuple[str, float], Engine] = OrderedDict()
        self.waiting: list[Job] = []
        """For a model to be loaded."""
        self.open: dict[int, Open] = {}
        self.vocabularies = WeakKeyDictionary()
        """Of engines, as llguidance wants them."""
        self.untouched: list[torch.Tensor] = []
        """Keys and values of layers whose memory the system has promised and not given yet."""

    def work(self) -> None:
        """Until the pipe is closed."""
        while True:
            while self.pipe.poll(0 if self.open or self.waiting or self.untouched else None):
                self.take(self.pipe.recv())
            self.admit()
            reader = next(
                (o for o in self.open.values() if o.reading), None
            )  # one at a time: those who write wait for a piece, not for all
            said = self.read(reader) if reader else []
            for engine in self.engines.values():
                if engine.has_unfinished:
                    engine.step()
            said += [part for o in list(self.open.values()) for part in self.told(o)]
            if said or self.open:  # a long text that is being read says nothing, but that it lives
                self.pipe.send(said)
            if self.untouched:  # a little at a time: what the server takes shows at its start, and holds up nobody
                self.untouched.pop().view(-1)[::SYSTEM_PAGE].add_(0)

    def take(self, message) -> None:
        match message:
            case Job():
                self.waiting.append(message)
            case Voice():  # to be ready for
                self.attempt(0, lambda: self.engine_of(message))
            case number, sample:  # to be cancelled
                self.waiting = [job for job in self.waiting if job.number != number]
                if o := self.open.get(number):
                    for row in o.rows if sample is None else o.rows[sample : sample + 1]:
                        o.engine.cancel(row)
                    o.reading = o.reading if sample is not None else None
                    if not o.rows:
                        del self.open[number]

    def admit(self) -> None:
        """Jobs whose model is there, or can be loaded now, go to its engine."""
        self.waiting = [job for job in self.waiting if not self.attempt(job.number, lambda job=job: self.begin(job))]

    def attempt(self, number: int, act) -> bool:
        """Do what needs files of models; whether it is settled."""
        try:
            return act()
        except UserError as e:
            self.pipe.send([Failed(number, str(e))])
        except Exception:  # a damaged folder: those who are being answered from others need not end with it
            traceback.print_exc()
            self.pipe.send([Failed(number, "this model or its adapter cannot be opened: the server's log says why")])
        return True

    def engine_of(self, voice: Voice) -> Engine | None:
        """The engine of a base, loaded if it must be; None as long as all others are busy."""
        key = (voice.base, voice.finished)
        names = self.adapters(self.engines[key]) if key in self.engines else ()
        if len(names) > ADAPTERS and not self.busy(self.engines[key]):
            del self.engines[key]
        if key not in self.engines:
            resting = [k for k, engine in self.engines.items() if not self.busy(engine)]
            if len(self.engines) >= self.capacity.bases and not resting:
                return None
            for old in resting[: len(self.engines) - self.capacity.bases + 1]:
                del self.engines[old]
            self.pipe.send([Loaded(voice.base, loading=True)])
            self.engines[key] = engine = load(voice.base, self.capacity)
            if not isinstance(engine.runner, TorchRunner):
                self.untouched = list(engine.runner.kv_cache)
            self.pipe.send([Loaded(voice.base)])
        self.engines.move_to_end(key)
        return self.engines[key]

    def busy(self, engine: Engine) -> bool:
        return any(o.engine is engine for o in self.open.values())

    @staticmethod
    def adapters(engine: Engine):
        return engine.runner.adapter_names

    def begin(self, job: Job) -> bool:
        """Whether there was an engine for it."""
        if not (engine := self.engine_of(job.voice)):
            return False
        adapter = ""
        if job.voice.adapter:
            adapter = f"{job.voice.adapter} {job.voice.adapter_made}"
            if adapter not in self.adapters(engine):
                engine.runner.add_adapter(Path(job.voice.adapter), adapter)
        reading, rows = None, []
        if job.score:
            from nanoghost.engine.prompt_logprobs import prompt_logprobs

            reading = prompt_logprobs(engine.runner, list(job.ids), adapter, job.top or 0)
        if job.sampling.max_tokens:
            rows = engine.add(list(job.ids), job.sampling, job.samples, adapter=adapter)
        for row in rows:
            row.owner = job.owner
            row.logits_processor = self.watcher(engine, job)
        if rows or reading:  # an echo alone asks nothing of the model
            self.open[job.number] = Open(job, engine, rows, [0] * len(rows), reading)
        return True

    def watcher(self, engine: Engine, job: Job):
        """What a row of this job wants to see at each token; nothing for most."""
        if not job.grammar and job.top is None:
            return None
        from llguidance import LLMatcher

        from nanoghost.engine.grammar import grammar_tokenizer
        from nanoghost.engine.logits_processors import LogitsProcessor

        if job.grammar and engine not in self.vocabularies:
            self.vocabularies[engine] = grammar_tokenizer(engine.tokenizer)
        return LogitsProcessor(LLMatcher(self.vocabularies[engine], job.grammar) if job.grammar else None, job.top)

    def read(self, o: Open) -> list[Delta]:
        """The next piece of what a job's own ids were worth; they count as a sample of their own, -1."""
        likely = next(o.reading, None)
        if likely is None:
            o.reading = None
            if not o.rows:
                del self.open[o.job.number]
        return [Delta(o.job.number, -1, [], likely or [], "" if likely else "read")]

    def told(self, o: Open) -> list[Delta | Failed]:
        """What is new of a job's rows."""
        said = []
        for sample, row in enumerate(o.rows):
            if o.told[sample] < 0 or (o.told[sample] == len(row.completion_ids) and not row.finish_reason):
                continue
            if row.logits_processor and row.logits_processor.matcher and (wrong := row.logits_processor.matcher.get_error()):
                o.engine.cancel(row)
                o.told[sample] = -1
                said.append(Failed(o.job.number, f"the grammar is too much to follow: {wrong.splitlines()[0]}"))
                continue
            likely, new = [], row.completion_ids[o.told[sample] :]
            if row.logits_processor and o.job.top is not None:
                likely, row.logits_processor.recorded = row.logits_processor.recorded, []
            o.told[sample] = -1 if row.finish_reason else len(row.completion_ids)
            said.append(Delta(o.job.number, sample, new, likely, row.finish_reason))
        if o.rows and all(told < 0 for told in o.told) and not o.reading:
            del self.open[o.job.number]
        return said


def load(base: str, capacity: Capacity) -> Engine:
    folder = ModelFolder(base)
    config = load_config(folder.path)
    context = min(config.context, capacity.context)
    seats = capacity.seats
    if supports_quantization(config):
        return open_engine(folder, seats, max(context // SHARE, -(-context // seats)))
    return open_engine(folder, max(1, seats // SHARE), context)


def run(pipe: Connection, capacity: Capacity) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer: it lets open answers finish
    hardware.prepare()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server has gone
        Worker(pipe, capacity).work()
