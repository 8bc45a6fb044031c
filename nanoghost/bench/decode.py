"""`nanoghost bench decode` and `bench prefill`: speed of the engine, compared with limits of the machine and baselines.

Prompts are natural text, a different one for each stream. Completions are sampled.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from nanoghost import hardware
from nanoghost.bench.harness import (
    MachineLimits,
    Workload,
    measure_and_report,
    measure_limits,
    report_progress,
    requested_baselines,
    validation_texts,
)
from nanoghost.bench.llama_cpp_baseline import LlamaCpp
from nanoghost.bench.transformers_baseline import TransformersEngine
from nanoghost.commands.arguments import ModelArgument, parse_numbers
from nanoghost.engine.engine import open_engine
from nanoghost.engine.quantized_llama import QuantizedLlama
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, open_model
from nanoghost.progress import JsonFlag
from nanoghost.tokenizer.chat_format import render

QUESTIONS = {  # by kind of request: speculative decoding helps where the answer repeats the prompt or itself
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
    """nanoghost's engine with one model."""

    def __init__(self, folder: ModelFolder, slots: int, slot_tokens: int):
        self.engine = open_engine(folder, slots, slot_tokens)
        self.model = self.engine.runner.model

    def decode(
        self, prompts: list[list[int]], tokens: int, speculative: bool = False, temperature: float = 0.8
    ) -> float:
        """Tokens per second of all sequences together, from the end of prefill to the last token."""
        engine = self.engine
        engine.runner.speculative = speculative
        sequences = []
        for i, prompt in enumerate(prompts):
            sequences += engine.add(prompt, SamplingParams(tokens, temperature, seed=i, ignore_eos=True))
        while any(not sequence.completion_ids for sequence in sequences):
            engine.step()
        start = time.perf_counter()
        tokens_before = completion_tokens(sequences)
        while engine.has_unfinished:
            engine.step()
        return (completion_tokens(sequences) - tokens_before) / (time.perf_counter() - start)

    def prefill(self, prompt: list[int]) -> float:
        """Tokens per second of a prompt that is not in the prefix cache, until the first token of the completion."""
        start = time.perf_counter()
        [sequence] = self.engine.add(prompt, SamplingParams(1, 0.0))
        while not sequence.finish_reason:
            self.engine.step()
        return len(prompt) / (time.perf_counter() - start)


def completion_tokens(sequences: list[Sequence]) -> int:
    return sum(len(sequence.completion_ids) for sequence in sequences)


def throughput_limit(model, limits: MachineLimits, streams: int, context: int, tokens: int = 1) -> float:
    """Tokens per second if a step takes only the time to read its bytes from memory, or to compute its matmuls.

    A step reads every weight once, and the keys and values of `context` tokens of each sequence. 8-bit matmuls are
    assumed to be twice as fast as bf16. `tokens`: tokens of each sequence in a step; the head computes only the last.
    """
    config = model.config
    head_weights = config.vocab_size * config.width
    if isinstance(model, QuantizedLlama):
        layer_weights, weight_bytes = model.matmul_weights() - head_weights, model.weight_bytes()
        flops_per_second = 2 * limits.flops_per_second
    else:
        layer_weights = model.parameter_counts()["matrices"]
        weight_bytes = (layer_weights + head_weights) * model.head_weight.element_size()
        flops_per_second = limits.flops_per_second
    kv_heads = getattr(config, "key_value_heads", None) or config.heads
    kv_bytes_per_token = config.depth * kv_heads * config.head_width * 2 * 2  # keys and values, 2 bytes each
    kv_bytes = streams * context * kv_bytes_per_token
    memory_seconds = (weight_bytes + kv_bytes) / limits.bytes_per_second
    compute_seconds = 2 * streams * (layer_weights * tokens + head_weights) / flops_per_second
    return streams * tokens / max(memory_seconds, compute_seconds)


def check_settings(settings: DecodeSettings | PrefillSettings) -> None:
    if settings.tokens < 2 or settings.rounds < 1:
        raise UserError("--tokens must be at least 2, and --rounds at least 1")


def open_systems(settings: DecodeSettings | PrefillSettings, slots: int, slot_tokens: int) -> dict:
    """nanoghost and the requested baselines by name, each with memory for `slots` sequences of `slot_tokens` tokens."""
    hardware.prepare()
    folder = open_model(settings.model)
    baselines = requested_baselines(settings.against, folder, ["transformers", "llama.cpp"])
    openers = {"nanoghost": partial(NanoghostEngine, folder, slots, slot_tokens)}
    if "transformers" in baselines:
        openers["transformers, bf16"] = partial(TransformersEngine, folder)
    if "llama.cpp" in baselines:
        for quant in ("q4_0", "q4_1", "q8_0", "bf16"):
            openers[f"llama.cpp, {quant}"] = partial(LlamaCpp, folder, slots, quant, slot_tokens)
    systems = {}
    for name, open_system in openers.items():
        report_progress(f"loading {folder.name} into {name} ...")
        systems[name] = open_system()
    return systems


def decode(settings: DecodeSettings) -> None:
    """Decode batches of sequences, then single sequences without and with speculative decoding, by kind of request."""
    streams = parse_numbers("--streams", settings.streams)
    check_settings(settings)
    systems = open_systems(settings, max(streams), MAX_PROMPT_TOKENS + settings.tokens)
    nanoghost = systems["nanoghost"]
    limits = measure_limits()
    workloads = []
    for count in streams:
        texts = validation_texts(nanoghost.engine.tokenizer, count, 40)
        prompts = [text[: 24 + i % 17] for i, text in enumerate(texts)]  # 24 to 40 tokens
        limit = decode_limit(nanoghost, limits, count, settings.tokens)
        for name, system in systems.items():
            run = partial(system.decode, prompts, settings.tokens)
            workloads.append(Workload(name, "decode", count, run, limit))
    if nanoghost.engine.runner.speculative:
        limit = decode_limit(nanoghost, limits, 1, settings.tokens)
        for name, run in speculative_workloads(nanoghost, settings.tokens):
            workloads.append(Workload("nanoghost", name, 1, run, limit))
    measure_and_report(workloads, settings.rounds, settings.json, limits)


def decode_limit(nanoghost: NanoghostEngine, limits: MachineLimits, streams: int, tokens: int) -> float:
    """The limit at the mean context: a prompt of about 32 tokens and half of the completion."""
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
    """Median throughput of greedy decoding, one prompt at a time."""
    return statistics.median(nanoghost.decode([prompt], tokens, speculative, temperature=0.0) for prompt in prompts)


def prefill(settings: PrefillSettings) -> None:
    check_settings(settings)
    systems = open_systems(settings, 1, settings.tokens + 16)
    nanoghost = systems["nanoghost"]
    # Each measurement takes another text, because a repeated prompt would come from the prefix cache
    count = (settings.rounds + 1) * len(systems)
    texts = iter(validation_texts(nanoghost.engine.tokenizer, count, settings.tokens))
    limits = measure_limits()
    limit = throughput_limit(nanoghost.model, limits, streams=1, context=settings.tokens, tokens=settings.tokens)
    workloads = []
    for name, system in systems.items():
        workloads.append(Workload(name, "prefill", 1, partial(prefill_next, system, texts), limit))
    measure_and_report(workloads, settings.rounds, settings.json, limits)


def prefill_next(system: NanoghostEngine | TransformersEngine | LlamaCpp, texts: Iterator[list[int]]) -> float:
    return system.prefill(next(texts))
