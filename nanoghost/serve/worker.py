"""The engine process: it owns the models; token ids come in and token ids go out.

It takes requests from a pipe, lets each engine make a step, and sends the new tokens of all sequences in one message
per step. When there is nothing to do, it blocks on the pipe. It handles token ids only, so malformed requests never
reach it. If it dies anyway, the server starts another one (client.py).
"""

import contextlib
import math
import signal
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from llguidance import LLMatcher

from nanoghost import hardware
from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.grammar import grammar_tokenizer
from nanoghost.engine.logits_processors import LogitsProcessor
from nanoghost.engine.paged_runner import PagedRunner
from nanoghost.engine.prompt_logprobs import prompt_logprobs
from nanoghost.engine.quantized_llama import supports_quantization
from nanoghost.engine.sequence import Sequence
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_config
from nanoghost.home import ModelFolder
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

MAX_ADAPTERS = 32  # of one engine; with more of them it is loaded again as soon as it is idle
BF16_PER_PAGE = 2048  # 16-bit numbers in a 4 KiB page of the operating system
SLOTS_PER_CONTEXT = 4  # with a paged KV cache, this many slots share the memory of one full context


@dataclass(eq=False)
class ActiveRequest:
    """A request that an engine is working on."""

    request: EngineRequest
    engine: Engine
    sequences: list[Sequence]
    prompt_logprobs: Iterator | None
    """Chunks of the prompt's log-probabilities that are still to be computed."""
    num_sent: list[int] = field(init=False)
    """How many tokens of each sequence were sent."""
    done: list[bool] = field(init=False)
    """Whether the end of each sequence was sent."""

    def __post_init__(self):
        self.num_sent = [0] * len(self.sequences)
        self.done = [False] * len(self.sequences)


class Worker:
    def __init__(self, pipe: Connection, capacity: Capacity):
        self.pipe = pipe
        self.capacity = capacity
        self.engines: OrderedDict[tuple[str, float], Engine] = OrderedDict()
        """By name and finish time of the base model, the most recently used last."""
        self.waiting: list[EngineRequest] = []
        """Requests whose model is not loaded, because all engines are busy."""
        self.active: dict[int, ActiveRequest] = {}
        self.untouched_kv: list[torch.Tensor] = []
        """Layers of the KV cache whose memory the operating system has not provided yet."""

    def run(self) -> None:
        """Work until the pipe is closed."""
        while True:
            has_work = bool(self.active or self.waiting or self.untouched_kv)
            while self.pipe.poll(0 if has_work else None):  # None: block until there is a message
                self.handle(self.pipe.recv())
                has_work = True
            self.start_waiting()
            messages = self.next_prompt_logprobs()
            for engine in self.engines.values():
                if engine.has_unfinished:
                    engine.step()
            for active in list(self.active.values()):
                messages += self.new_tokens(active)
            if messages or self.active:  # an empty message is a sign of life while a long prompt is computed
                self.pipe.send(messages)
            if self.untouched_kv:
                # Touch every page, one layer per step: the server takes its memory at the start and not in the middle
                # of a request, and no request has to wait for all of it.
                self.untouched_kv.pop().view(-1)[::BF16_PER_PAGE].add_(0)

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, message: EngineRequest | LoadModel | Cancel) -> None:
        match message:
            case EngineRequest():
                self.waiting.append(message)
            case LoadModel(model):
                with self.report_errors(request_id=None):
                    self.engine_for(model)
            case Cancel(request_id, sample):
                self.waiting = [request for request in self.waiting if request.request_id != request_id]
                if request_id in self.active:
                    self.cancel(self.active[request_id], sample)

    def cancel(self, active: ActiveRequest, sample: int | None) -> None:
        sequences = active.sequences if sample is None else [active.sequences[sample]]
        for sequence in sequences:
            active.engine.cancel(sequence)
        if sample is None:
            active.prompt_logprobs = None
        if not active.sequences:  # otherwise `new_tokens` removes the request when all sequences are finished
            del self.active[active.request.request_id]

    def start_waiting(self) -> None:
        """Start the requests whose model is loaded or can be loaded now."""
        still_waiting = []
        for request in self.waiting:
            started = True  # a request that fails does not wait either
            with self.report_errors(request.request_id):
                started = self.start(request)
            if not started:
                still_waiting.append(request)
        self.waiting = still_waiting

    @contextlib.contextmanager
    def report_errors(self, request_id: int | None):
        """Around code that reads the files of models: an error is sent to the server and does not end the process."""
        try:
            yield
        except UserError as error:
            self.pipe.send([RequestFailed(request_id, str(error))])
        except Exception:  # damaged files can raise anything, and must not interrupt the requests to other models
            traceback.print_exc()
            message = "this model or its adapter cannot be opened; see the server log"
            self.pipe.send([RequestFailed(request_id, message)])

    def start(self, request: EngineRequest) -> bool:
        """Hand a request to the engine of its model; False if that has to wait."""
        engine = self.engine_for(request.model)
        if engine is None:
            return False
        adapter = request.model.adapter_name
        if adapter and adapter not in engine.runner.adapter_names:
            engine.runner.add_adapter(Path(request.model.adapter), adapter)
        prompt_ids = list(request.prompt_ids)
        prompt_chunks = None
        sequences = []
        if request.prompt_logprobs:
            top = request.top_logprobs or 0
            prompt_chunks = prompt_logprobs(engine.runner, engine.tokenizer, prompt_ids, adapter, top)
        if request.sampling.max_tokens:
            sequences = engine.add(prompt_ids, request.sampling, request.num_samples, adapter=adapter)
        for sequence in sequences:
            sequence.owner = request.owner
            sequence.logits_processor = self.logits_processor(engine, request)
        if sequences or prompt_chunks:  # an echo without log-probabilities needs no model
            self.active[request.request_id] = ActiveRequest(request, engine, sequences, prompt_chunks)
        return True

    def logits_processor(self, engine: Engine, request: EngineRequest) -> LogitsProcessor | None:
        if not request.grammar and request.top_logprobs is None:
            return None
        matcher = None
        if request.grammar:
            matcher = LLMatcher(grammar_tokenizer(engine.tokenizer), request.grammar)
        return LogitsProcessor(matcher, request.top_logprobs)

    # ── engines ───────────────────────────────────────────────────────────────────────────────────────────────────

    def engine_for(self, model: ModelRef) -> Engine | None:
        """The engine of a base model, loaded if necessary; None while all loaded engines are busy."""
        key = (model.base, model.finished)
        engine = self.engines.get(key)
        if engine and len(engine.runner.adapter_names) > MAX_ADAPTERS and not self.is_busy(engine):
            del self.engines[key]
            engine = None
        if engine is None:
            if not self.make_room():
                return None
            self.pipe.send([ModelStatus(model.base, loading=True)])
            engine = load_engine(model.base, self.capacity)
            self.engines[key] = engine
            if isinstance(engine.runner, PagedRunner):
                self.untouched_kv = list(engine.runner.kv_cache)
            self.pipe.send([ModelStatus(model.base, loading=False)])
        self.engines.move_to_end(key)
        return engine

    def make_room(self) -> bool:
        """Unload idle engines until another one may be loaded; False if all are busy."""
        excess = max(0, len(self.engines) + 1 - self.capacity.base_models)
        idle = [key for key, engine in self.engines.items() if not self.is_busy(engine)]
        if excess and not idle:
            return False
        for key in idle[:excess]:
            del self.engines[key]
        return True

    def is_busy(self, engine: Engine) -> bool:
        return any(active.engine is engine for active in self.active.values())

    # ── results ───────────────────────────────────────────────────────────────────────────────────────────────────

    def next_prompt_logprobs(self) -> list[TokenDelta]:
        """The next chunk of one prompt's log-probabilities: the sequences wait for one chunk, not for all prompts."""
        for request_id, active in self.active.items():
            if active.prompt_logprobs is None:
                continue
            chunk = next(active.prompt_logprobs, None)
            if chunk is not None:
                return [TokenDelta(request_id, PROMPT_SAMPLE, [], chunk, "")]
            active.prompt_logprobs = None
            if not active.sequences:
                del self.active[request_id]
            return [TokenDelta(request_id, PROMPT_SAMPLE, [], [], "complete")]
        return []

    def new_tokens(self, active: ActiveRequest) -> list[TokenDelta | RequestFailed]:
        """What the sequences of a request have generated since the last call."""
        messages = []
        for sample, sequence in enumerate(active.sequences):
            if active.done[sample]:
                continue
            if error := grammar_error_of(sequence):
                active.engine.cancel(sequence)
                active.done[sample] = True
                messages.append(RequestFailed(active.request.request_id, f"the grammar is too complex: {error}"))
            elif sequence.finish_reason or len(sequence.completion_ids) > active.num_sent[sample]:
                messages.append(self.token_delta(active, sample))
        if active.sequences and all(active.done) and not active.prompt_logprobs:
            del self.active[active.request.request_id]
        return messages

    def token_delta(self, active: ActiveRequest, sample: int) -> TokenDelta:
        request, sequence = active.request, active.sequences[sample]
        token_ids = sequence.completion_ids[active.num_sent[sample] :]
        logprobs = []
        if request.top_logprobs is not None:
            logprobs = sequence.logits_processor.recorded_logprobs
            sequence.logits_processor.recorded_logprobs = []
        active.num_sent[sample] = len(sequence.completion_ids)
        active.done[sample] = bool(sequence.finish_reason)
        return TokenDelta(request.request_id, sample, token_ids, logprobs, sequence.finish_reason)


def grammar_error_of(sequence: Sequence) -> str:
    """The first line of the error that stopped the sequence's grammar; empty if there is none."""
    processor = sequence.logits_processor
    if processor is None or processor.matcher is None:
        return ""
    error = processor.matcher.get_error()
    return error.split("\n")[0] if error else ""


def load_engine(base: str, capacity: Capacity) -> Engine:
    folder = ModelFolder(base)
    config = load_config(folder.path)
    context = min(config.context, capacity.context)
    slots = capacity.slots
    if supports_quantization(config):
        # Blocks of the KV cache are shared by all slots; one sequence must be able to fill a whole context.
        slot_tokens = max(context // SLOTS_PER_CONTEXT, math.ceil(context / slots))
        return open_engine(folder, slots, slot_tokens)
    return open_engine(folder, max(1, slots // SLOTS_PER_CONTEXT), context)


def run_worker(pipe: Connection, capacity: Capacity) -> None:
    """The main function of the engine process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the server, which lets open requests finish
    hardware.prepare()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone
        Worker(pipe, capacity).run()
