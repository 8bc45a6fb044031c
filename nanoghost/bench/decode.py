"""`nanoghost bench decode` and `bench prefill`: the engine's speed, compared with the machine's limits and with
baselines.

Prompts are natural text, a different one for each stream; completions are sampled.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from nanoghost import hardware
from nanoghost.bench.llama_cpp_baseline import LlamaCpp
from nanoghost.bench.table import (
    MachineLimits,
    Workload,
    measure_and_report,
    measure_limits,
    requested_baselines,
    validation_texts,
)
from nanoghost.bench.transformers_baseline import TransformersEngine
from nanoghost.commands.arguments import ModelArgument, parse_numbers
from nanoghost.engine.engine import open_engine
from nanoghost.engine.quantized_llama import QuantizedLlama
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, open_model
from nanoghost.progress import JsonFlag
from nanoghost.tokenizer.chat_format import render

QUESTIONS = {  # kinds of requests: speculative decoding helps where the answer repeats the prompt or itself
    "story": "Write a story about {word}.",
    "explanation": "Explain to a child what {word} is.",
    "code": "Write a Python class for {word}, and tests for it.",
    "copy": "Repeat this text word for word:\n\n{text}",
}
WORDS = ("a lighthouse", "rain", "the moon", "a library", "bread")
MAX_PROMPT_TOKENS = 500


@dataclass(frozen=True)
class DecodeSettings(ModelArgument, JsonFlag):
    streams: str = "1,16,64"
    """Numbers of sequences to decode at once, comma-separated."""
    tokens: int = 128
    """Tokens to decode in each sequence."""
    rounds: int = 3
    """Number of measurements."""
    against: str = ""
    """Baselines, comma-separated: transformers, llama.cpp. They must be installed."""


@dataclass(frozen=True)
class PrefillSettings(ModelArgument, JsonFlag):
    tokens: int = 512
    """Length of the prompt."""
    rounds: int = 5
    """Number of measurements."""
    against: str = ""
    """Baselines, comma-separated: transformers, llama.cpp. They must be installed."""


class NanoghostEngine:
    def __init__(self, folder: ModelFolder, slots: int, slot_tokens: int):
        self.engine = open_engine(folder, slots, slot_tokens)
        self.model = self.engine.runner.model

    def decode(
        self, prompts: list[list[int]], tokens: int, speculative: bool = False, temperature: float = 0.8
    ) -> float:
        """Tokens per second of all sequences together, from when all prompts are computed to the last token."""
        engine = self.engine
        engine.runner.speculative = speculative
        sequences = []
        for i, prompt in enumerate(prompts):
            sequences += engine.add(prompt, SamplingParams(tokens, temperature, seed=i, ignore_eos=True))
        while any(not sequence.completion_ids for sequence in sequences):
            engine.step()
        start, tokens_before = time.perf_counter(), sum(len(sequence.completion_ids) for sequence in sequences)
        while engine.has_unfinished:
            engine.step()
        tokens_decoded = sum(len(sequence.completion_ids) for sequence in sequences) - tokens_before
        return tokens_decoded / (time.perf_counter() - start)

    def prefill(self, prompt: list[int]) -> float:
        """Tokens per second of a prompt that is not in the prefix cache, to the first token after it."""
        start = time.perf_counter()
        [sequence] = self.engine.add(prompt, SamplingParams(1, 0.0))
        while not sequence.finish_reason:
            self.engine.step()
        return len(prompt) / (time.perf_counter() - start)


def throughput_limit(model, limits: MachineLimits, streams: int, context: int, tokens: int = 1) -> float:
    """Tokens per second if a step takes only the time to read its bytes from memory, or to compute its matmuls.

    A step reads every weight once, and the keys and values of each sequence (`context` tokens); 8-bit matmuls are twice
    as fast as bf16. `tokens`: tokens of each sequence in the step; the head computes only the last.
    """
    c = model.config
    head_weights = c.vocab_size * c.width
    if isinstance(model, QuantizedLlama):
        layer_weights, weight_bytes = model.matmul_weights() - head_weights, model.weight_bytes()
        flops_per_second = 2 * limits.flops_per_second
    else:
        layer_weights = model.parameter_counts()["matrices"]
        weight_bytes = (layer_weights + head_weights) * model.head_weight.element_size()
        flops_per_second = limits.flops_per_second
    kv_heads = getattr(c, "key_value_heads", None) or c.heads
    kv_bytes = streams * context * c.depth * kv_heads * c.head_width * 2 * 2  # keys and values, 2 bytes each
    memory_seconds = (weight_bytes + kv_bytes) / limits.bytes_per_second
    compute_seconds = 2 * streams * (layer_weights * tokens + head_weights) / flops_per_second
    return streams * tokens / max(memory_seconds, compute_seconds)


def check(settings: DecodeSettings | PrefillSettings) -> None:
    if settings.tokens < 2 or settings.rounds < 1:
        raise UserError("--tokens must be at least 2, and --rounds at least 1")


def open_systems(settings: DecodeSettings | PrefillSettings, slots: int, slot_tokens: int) -> dict:
    """nanoghost and the requested baselines by name, each with memory for `slots` sequences of `slot_tokens` tokens."""
    hardware.prepare()
    folder = open_model(settings.model)
    baselines = requested_baselines(settings.against, folder, ["transformers", "llama.cpp"])
    systems = {"nanoghost": NanoghostEngine(folder, slots, slot_tokens)}
    if "transformers" in baselines:
        systems["transformers, bf16"] = TransformersEngine(folder)
    if "llama.cpp" in baselines:
        for quant in ("q4_0", "q4_1", "q8_0", "bf16"):
            systems[f"llama.cpp, {quant}"] = LlamaCpp(folder, slots, quant, slot_tokens)
    return systems


def decode(settings: DecodeSettings) -> None:
    """Batches of sequences, then a single one with and without speculative decoding, by kind of request."""
    streams = parse_numbers("--streams", settings.streams)
    check(settings)
    systems = open_systems(settings, max(streams), MAX_PROMPT_TOKENS + settings.tokens)
    nanoghost = systems["nanoghost"]
    limits = measure_limits()
    workloads = []
    for n in streams:
        texts = validation_texts(nanoghost.engine.tokenizer, n, 40)
        prompts = [text[: 24 + i % 17] for i, text in enumerate(texts)]  # of different lengths
        for name, system in systems.items():
            run = partial(system.decode, prompts, settings.tokens)
            workloads.append(Workload(name, "decode", n, run, decode_limit(nanoghost, limits, n, settings.tokens)))
    if nanoghost.engine.runner.speculative:
        limit = decode_limit(nanoghost, limits, 1, settings.tokens)
        for name, run in speculative_workloads(nanoghost, settings.tokens):
            workloads.append(Workload("nanoghost", name, 1, run, limit))
    measure_and_report(workloads, settings.rounds, settings.json, limits)


def decode_limit(nanoghost: NanoghostEngine, limits: MachineLimits, streams: int, tokens: int) -> float:
    return throughput_limit(nanoghost.model, limits, streams, context=32 + tokens // 2)


def speculative_workloads(nanoghost: NanoghostEngine, tokens: int) -> list[tuple[str, Callable[[], float]]]:
    """(name, run) for each kind of request, without and with speculative decoding."""
    tokenizer = nanoghost.engine.tokenizer
    text = tokenizer.decode(validation_texts(tokenizer, 1, 120)[0])
    workloads = []
    for kind, question in QUESTIONS.items():
        prompts = []
        for word in WORDS:
            messages = [{"role": "user", "content": question.format(word=word, text=text)}]
            prompts.append(render(messages, tokenizer, add_generation_prompt=True)[0])
        workloads.append((kind, partial(median_decode, nanoghost, prompts, tokens, False)))
        workloads.append((f"{kind}, speculative", partial(median_decode, nanoghost, prompts, tokens, True)))
    return workloads


def median_decode(nanoghost: NanoghostEngine, prompts: list[list[int]], tokens: int, speculative: bool) -> float:
    """Greedy, one prompt at a time."""
    return statistics.median(nanoghost.decode([prompt], tokens, speculative, temperature=0.0) for prompt in prompts)


def prefill(settings: PrefillSettings) -> None:
    check(settings)
    systems = open_systems(settings, 1, settings.tokens + 16)
    nanoghost = systems["nanoghost"]
    count = (settings.rounds + 1) * len(systems)
    texts = iter(validation_texts(nanoghost.engine.tokenizer, count, settings.tokens))  # none is read twice
    limits = measure_limits()
    limit = throughput_limit(nanoghost.model, limits, 1, settings.tokens, settings.tokens)
    workloads = []
    for name, system in systems.items():
        workloads.append(Workload(name, "prefill", 1, partial(prefill_next, system, texts), limit))
    measure_and_report(workloads, settings.rounds, settings.json, limits)


def prefill_next(system, texts) -> float:
    return system.prefill(next(texts))
