"""`nanoghost bench serve`: overhead of the HTTP server compared with the engine alone.

The same requests go to an engine in this process and to a server. With the same seeds both generate the same tokens, so
their speeds can be compared.
"""

import asyncio
import time
from dataclasses import dataclass
from functools import partial

from nanoghost import hardware
from nanoghost.bench.decode import QUESTIONS, WORDS
from nanoghost.bench.harness import Workload, measure_and_report
from nanoghost.bench.http_client import chat_request, complete_chat, running_server
from nanoghost.commands.arguments import ModelArgument, parse_numbers
from nanoghost.engine.engine import Engine, open_engine
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.home import open_model
from nanoghost.progress import JsonFlag
from nanoghost.tokenizer.chat_format import render

TEMPERATURE = 0.8
MAX_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class ServeBenchSettings(ModelArgument, JsonFlag):
    streams: str = "1,16,64"
    """Numbers of concurrent requests, comma-separated."""
    tokens: int = 128
    """Maximum number of tokens in each reply."""
    rounds: int = 3
    """Number of measurements."""


def command(settings: ServeBenchSettings) -> None:
    hardware.prepare()
    if settings.tokens < 1 or settings.rounds < 1:
        raise UserError("--tokens and --rounds must be at least 1")
    streams = parse_numbers("--streams", settings.streams, 1)
    folder = open_model(settings.model)
    engine = open_engine(folder, max(streams), MAX_PROMPT_TOKENS + settings.tokens)
    questions = []
    for i in range(max(streams)):
        questions.append(QUESTIONS["story"].format(word=f"{WORDS[i % len(WORDS)]} and the number {i}"))
    with running_server(folder.name, max(streams)) as (port, _):
        workloads = []
        for count in streams:
            run_engine = partial(engine_throughput, engine, questions[:count], settings.tokens)
            run_server = partial(server_throughput, port, folder.name, questions[:count], settings.tokens)
            workloads.append(Workload("engine", "chat", count, run_engine))
            workloads.append(Workload("server", "chat", count, run_server))
        measure_and_report(workloads, settings.rounds, settings.json)


def engine_throughput(engine: Engine, questions: list[str], max_tokens: int) -> float:
    """Tokens per second of all replies together, all requested at once."""
    start = time.perf_counter()
    sequences = []
    for seed, question in enumerate(questions):
        prompt, _ = render([{"role": "user", "content": question}], engine.tokenizer, add_generation_prompt=True)
        sequences += engine.add(prompt, SamplingParams(max_tokens, TEMPERATURE, seed=seed))
    while engine.has_unfinished:
        engine.step()
    return sum(len(sequence.completion_ids) for sequence in sequences) / (time.perf_counter() - start)


def server_throughput(port: int, model: str, questions: list[str], max_tokens: int) -> float:
    """Tokens per second of the same replies over HTTP."""

    async def run() -> float:
        start = time.perf_counter()
        requests = []
        for seed, question in enumerate(questions):
            body = chat_request(model, question, max_tokens, TEMPERATURE, seed)
            requests.append(complete_chat(port, body))
        replies = await asyncio.gather(*requests)
        return sum(reply.tokens for reply in replies) / (time.perf_counter() - start)

    return asyncio.run(run())
