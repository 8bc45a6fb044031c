"""How fast a model reads and writes here, beside what memory and arithmetic of this machine allow.

What is read is natural text, another one for each row; what is written is sampled.
"""

import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.bench.table import limits, peers, tell, texts
from nanoghost.commands.arguments import parse_numbers
from nanoghost.engine.engine import open_engine
from nanoghost.engine.quantized_llama import QuantizedLlama, quantize_model, supports_quantization
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, open_model
from nanoghost.tokenizer.chat_format import render

KINDS = {  # what a person may ask for; guessing ahead helps where a text repeats what stands before it
    "story": "Write a story about {word}.",
    "explanation": "Explain to a child what {word} is.",
    "code": "Write a Python class for {word}, and tests for it.",
    "copy": "Repeat this text word for word:\n\n{text}",
}
LONGEST = 500  # tokens of a prompt
WORDS = ("a lighthouse", "rain", "the moon", "a library", "bread")


@dataclass(frozen=True)
class DecodeSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    streams: str = "1,16,64"
    """How many conversations are written at once; several numbers with commas."""
    tokens: int = 128
    """Tokens that each writes."""
    rounds: int = 3
    """Times that everything is measured."""
    against: str = ""
    """Peers that are measured in turn with us, if they are installed: transformers, llama.cpp, or both with a comma."""
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass(frozen=True)
class PrefillSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    tokens: int = 512
    """Length of the text that is read."""
    rounds: int = 5
    """Times that everything is measured."""
    against: str = ""
    """Peers that are measured in turn with us, if they are installed: transformers, llama.cpp, or both with a comma."""
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass(frozen=True)
class PackingSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    tokens: int = 4096
    """How much text is scored."""
    json: bool = False
    """Print the figures as JSON on standard output."""


class Ours:
    def __init__(self, folder: ModelFolder, seats: int, room: int):
        self.engine = open_engine(folder, seats, room)
        self.model = self.engine.runner.model

    def write(self, prompts: list[list[int]], tokens: int, guess: bool = False, temperature: float = 0.8) -> float:
        """Tokens a second of all rows together, from when every prompt is read until the last row is done."""
        self.engine.runner.speculative = guess
        rows = []
        for i, prompt in enumerate(prompts):
            rows += self.engine.add(prompt, SamplingParams(tokens, temperature, seed=i, ignore_eos=True))
        while any(not row.completion_ids for row in rows):
            self.engine.step()
        start, before = time.perf_counter(), sum(len(row.completion_ids) for row in rows)
        while self.engine.has_unfinished:
            self.engine.step()
        return (sum(len(row.completion_ids) for row in rows) - before) / (time.perf_counter() - start)

    def read(self, prompt: list[int]) -> float:
        """Tokens a second from a text nobody has seen to the first word after it."""
        start = time.perf_counter()
        [row] = self.engine.add(prompt, SamplingParams(1, 0.0))
        while not row.finish_reason:
            self.engine.step()
        return len(prompt) / (time.perf_counter() - start)


class Transformers:
    """The model folder as `transformers` runs it, in bf16, eager; whole calls of `generate`, as people use it."""

    def __init__(self, folder: ModelFolder):
        auto = importlib.import_module("transformers").AutoModelForCausalLM
        self.model = auto.from_pretrained(folder.path, dtype=torch.bfloat16)

    def write(self, prompts: list[list[int]], tokens: int) -> float:
        shortest = min(map(len, prompts))  # one length, so that it needs no padding: that is to its favour
        ids = torch.tensor([p[:shortest] for p in prompts])
        start = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True, eos_token_id=None, pad_token_id=0
        )  # fmt: skip
        return len(prompts) * tokens / (time.perf_counter() - start)

    @torch.inference_mode()
    def read(self, prompt: list[int]) -> float:
        start = time.perf_counter()
        self.model(torch.tensor([prompt]), logits_to_keep=1)
        return len(prompt) / (time.perf_counter() - start)


def most(model, measured: dict, streams: int, context: int, tokens: int = 1) -> float:
    """Tokens a second if a step took only as long as memory needs to deliver what it reads, or arithmetic to multiply it.

    A step reads every weight once, and each row's keys and values; products of 8 bits are twice as fast as those of bf16.
    `tokens`: how many each row reads; the head works on the last one only.
    """
    c = model.config
    packed = isinstance(model, QuantizedLlama)
    head = c.vocab_size * c.width
    body = model.matmul_weights() - head if packed else model.parameter_counts()["matrices"]
    weights = model.weight_bytes() if packed else (body + head) * model.head_weight.element_size()
    heads = getattr(c, "key_value_heads", None) or c.heads
    kept = streams * context * c.depth * heads * c.head_width * 2 * 2  # keys and values, 16 bits each
    peak = measured["matrix_gflops_per_second"] * 1e9 * (2 if packed else 1)
    by_memory = (weights + kept) / (measured["bandwidth_gb_per_second"] * 1e9)
    by_arithmetic = 2 * streams * (body * tokens + head) / peak
    return streams * tokens / max(by_memory, by_arithmetic)


def check(settings) -> None:
    if settings.tokens < 2 or settings.rounds < 1:
        raise UserError("--tokens is at least 2 and --rounds at least 1")


def contenders(settings, seats: int, room: int) -> dict:
    """By name; each has room for `seats` conversations of `room` tokens."""
    hardware.prepare()
    folder = open_model(settings.model)
    asked = peers(settings.against, folder, ["transformers", "llama.cpp"])
    found = {"nanoghost": Ours(folder, seats, room)}
    if "transformers" in asked:
        found["transformers, bf16"] = Transformers(folder)
    if "llama.cpp" in asked:
        peer = importlib.import_module("nanoghost.bench.llama_cpp_baseline").LlamaCpp
        found |= {f"llama.cpp, {quant}": peer(folder, seats, quant, room) for quant in ("q4_0", "q4_1", "q8_0", "bf16")}
    return found


def decode(settings: DecodeSettings) -> None:
    """Writing: one conversation and many, then one that guesses ahead, by kind of text."""
    streams = parse_numbers("--streams", settings.streams)
    check(settings)
    rivals = contenders(settings, max(streams), LONGEST + settings.tokens)
    ours, tokenizer = rivals["nanoghost"], rivals["nanoghost"].engine.tokenizer
    works: list[tuple[str, str, int, Callable]] = []
    for n in streams:
        prompts = [p[: 24 + i % 17] for i, p in enumerate(texts(tokenizer, n, 40))]
        for name, rival in rivals.items():
            works.append(
                (name, "decode", n, lambda rival=rival, prompts=prompts: rival.write(prompts, settings.tokens))
            )
    if ours.engine.runner.speculative:
        text = tokenizer.decode(texts(tokenizer, 1, 120)[0])
        for kind, question in KINDS.items():
            asked = [[{"role": "user", "content": question.format(word=word, text=text)}] for word in WORDS]
            prompts = [render(messages, tokenizer, generation=True)[0] for messages in asked]
            for guess in (False, True):
                work = f"{kind}, guessing" if guess else kind
                run = lambda prompts=prompts, guess=guess: statistics.median(  # noqa: E731
                    ours.write([p], settings.tokens, guess, 0.0) for p in prompts
                )
                works.append(("nanoghost", work, 1, run))
    measured = limits()
    tell(settings, measured, works, lambda _, n: most(ours.model, measured, n, 32 + settings.tokens // 2))


def prefill(settings: PrefillSettings) -> None:
    """Reading: one text, to the first word after it."""
    check(settings)
    rivals = contenders(settings, 1, settings.tokens + 16)
    pieces = iter(texts(rivals["nanoghost"].engine.tokenizer, (settings.rounds + 1) * len(rivals), settings.tokens))
    works = [(name, "prefill", 1, lambda rival=rival: rival.read(next(pieces))) for name, rival in rivals.items()]
    measured = limits()
    ours = rivals["nanoghost"].model
    tell(settings, measured, works, lambda _, n: most(ours, measured, n, settings.tokens, settings.tokens))


def packing(settings: PackingSettings) -> None:
    """What it costs to speak in fewer bits: bits per byte of the validation plays, beside plain PyTorch in fp32."""
    hardware.prepare()
    folder = open_model(settings.model)
    model, tokenizer = load_model(folder.path, torch.float32)
    if not supports_quantization(model.config):
        raise UserError(f"'{folder.name}' is not packed on this machine: it runs as PyTorch has it")
    [tokens] = texts(tokenizer, 1, settings.tokens)
    size, window = len(tokenizer.decode(tokens[1:]).encode()), min(512, model.config.context)
    plain = bits_per_byte(model, tokens, window, size)
    rows = [{"work": "fp32", "bpb": plain, "megabytes": 4 * sum(model.parameter_counts().values()) / 1e6, "more": 0.0}]
    for bits in (16, 8, 4, None):
        packed = quantize_model(model, bits)
        bpb = bits_per_byte(packed, tokens, window, size)
        work = f"{bits} bits" if bits else "few bits, as chat has it"
        rows.append({"work": work, "bpb": bpb, "megabytes": packed.weight_bytes() / 1e6, "more": bpb / plain - 1})
    table = Table()
    for column in ("weights", "MB", "bits per byte", "more"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for r in rows:
        table.add_row(r["work"], f"{r['megabytes']:.0f}", f"{r['bpb']:.4f}", f"{r['more']:+.2%}")
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"rows": rows}))
