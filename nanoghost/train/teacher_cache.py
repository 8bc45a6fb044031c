"""Answers and probabilities of a teacher, computed once and cached in the data folder for all later runs."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from nanoghost import distributed, hardware
from nanoghost.data.conversations import load_conversations
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model, load_tokenizer
from nanoghost.home import ModelFolder, home, write_atomic
from nanoghost.tokenizer.chat_format import render, text_of, truncate_oldest_turns
from nanoghost.tokenizer.reply_parser import TOOL_CALL_START
from nanoghost.tools.registry import TOOLS, run_tool
from nanoghost.train.distill_loss import logits_at, teacher_buckets
from nanoghost.train.packing import TokenizedExample, collate, pack
from nanoghost.train.run import Run
from nanoghost.train.settings import sampling_seed

MAX_LOGITS = 2**25  # logits in memory at once; limits the rows of a forward pass
EXAMPLES_PER_FILE = 16  # examples that the teacher processes together
REPORT_SECONDS = 10.0  # between messages about the progress


class Teacher:
    """A teacher model that is loaded when it is first needed: everything may be in the cache already."""

    def __init__(self, folder: ModelFolder):
        self.folder = folder
        self.model_and_tokenizer = None

    @property
    def tokenizer(self):
        return load_tokenizer(ModelFolder(self.folder.base).path)

    def load(self):
        """(model, tokenizer)."""
        if self.model_and_tokenizer is None:
            self.model_and_tokenizer = load_model(self.folder.path, hardware.compute_dtype(), hardware.device())
        return self.model_and_tokenizer


def cached_files(kind: str, key: list, count: int, compute: Callable[[int], bytes], run: Run) -> list[Path]:
    """`count` files with the results of `compute(number)`; the processes compute the missing ones together.

    `kind`: answers or probabilities. `key`: everything that the results depend on; the number of processes must
    not be part of it.
    """
    digest = hashlib.sha256(json.dumps([kind, str(hardware.compute_dtype()), *key]).encode()).hexdigest()
    paths = [home() / "data" / f"{kind}-{digest[:12]}" / f"{number:05}" for number in range(count)]
    rank, world_size = distributed.rank_and_world_size()
    last_report = time.monotonic()
    for number in range(rank, count, world_size):
        if not paths[number].exists():
            write_atomic(paths[number], compute(number))
            if rank == 0 and time.monotonic() - last_report > REPORT_SECONDS:
                last_report = time.monotonic()
                run.display.print(f"teacher: {number + 1} of {count} parts of the {kind}")
    distributed.barrier()
    return paths


# -- answers ----------------------------------------------------------------------------------------------------------


def teacher_answers(settings, prompts: list[list[dict]], teacher: Teacher, run: Run) -> list[list[dict]]:
    """Conversations: the prompts whose answer ended within --max-tokens, with the teacher's answer."""
    temperature = 0.7 if settings.temperature is None else settings.temperature

    def compute(number: int) -> bytes:
        group = prompts[number * EXAMPLES_PER_FILE : (number + 1) * EXAMPLES_PER_FILE]
        seed = sampling_seed(settings.seed, number)
        conversations = generate_answers(
            *teacher.load(), group, SamplingParams(settings.max_tokens, temperature, seed=seed)
        )
        return "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations).encode()

    key = [teacher.folder.card.to_json(), prompts, settings.max_tokens, temperature, settings.seed]
    paths = cached_files("answers", key, math.ceil(len(prompts) / EXAMPLES_PER_FILE), compute, run)
    answers_file = paths[0].with_name("answers.jsonl")
    if run.is_main_process:
        write_atomic(answers_file, b"".join(path.read_bytes() for path in paths))
    distributed.barrier()
    if not answers_file.stat().st_size:
        raise UserError(f"none of the teacher's {len(prompts)} answers ended in time: try a larger --max-tokens")
    conversations = load_conversations(answers_file)
    run.display.print(
        f"{len(conversations)} of {len(prompts)} answers ended within {settings.max_tokens} tokens and the"
        f" teacher's context; they are in {answers_file}"
    )
    return conversations


def generate_answers(model, tokenizer, prompts: list[list[dict]], sampling: SamplingParams) -> list[list[dict]]:
    """The prompts that fit into the context and whose answer is complete and well-formed, with the answer."""
    max_prompt = model.config.context - sampling.max_tokens
    fitting, ids = [], []
    for messages in prompts:
        prompt_ids, _ = render(
            truncate_oldest_turns(messages, tokenizer, max_prompt, True), tokenizer, add_generation_prompt=True
        )
        if len(prompt_ids) <= max_prompt:
            fitting.append(messages)
            ids.append(prompt_ids)
    if not fitting:
        return []
    calculator = partial(run_tool, tools={"calculator": TOOLS["calculator"]})
    sequences = generate(model, tokenizer, ids, sampling, run_tool=calculator)
    return [
        messages + sequence.messages
        for messages, sequence in zip(fitting, sequences)
        if sequence.finish_reason == "stop" and not has_malformed_call(sequence.messages)
    ]


def has_malformed_call(messages: list[dict]) -> bool:
    """Whether an answer contains a call that cannot be read, which stays in the text."""
    return any(message["role"] == "assistant" and TOOL_CALL_START in text_of(message) for message in messages)


# -- probabilities ----------------------------------------------------------------------------------------------------


def teacher_probabilities(
    settings, examples: list[TokenizedExample], context: int, vocab_size: int, teacher: Teacher, run: Run
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For each example: ids (N, K) and log P of the buckets (N, K + 1) at each token in the loss (see
    distill_loss.py)."""

    def compute(number: int) -> bytes:
        model, _ = teacher.load()
        group = examples[number * EXAMPLES_PER_FILE : (number + 1) * EXAMPLES_PER_FILE]
        rows = pack([len(example.ids) for example in group], context + 1, range(len(group)))
        ids, logprobs = teacher_targets(model, collate(rows, group, context, loss_tokens=1), settings.top_k, vocab_size)
        order = torch.tensor([i for row in rows for i in row])
        return safetensors.torch.save({"ids": ids.int().cpu(), "logprobs": logprobs.cpu(), "order": order})

    key = [teacher.folder.card.to_json(), [example.ids for example in examples], context, settings.top_k]
    count = math.ceil(len(examples) / EXAMPLES_PER_FILE)
    targets: list = [None] * len(examples)
    for number, path in enumerate(cached_files("probabilities", key, count, compute, run)):
        stored = safetensors.torch.load(path.read_bytes())
        order = [number * EXAMPLES_PER_FILE + i for i in stored["order"].tolist()]
        lengths = [sum(examples[i].loss_mask) for i in order]
        for i, ids, logprobs in zip(order, stored["ids"].long().split(lengths), stored["logprobs"].split(lengths)):
            targets[i] = (ids, logprobs)
    return targets


@torch.no_grad()
def teacher_targets(teacher, batch, top_k: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's distribution at each token in the loss, row by row: ids (N, K), log P of the buckets (N, K + 1).

    The head of some models has more rows than their tokenizer has tokens; `vocab_size` cuts them off.
    """
    parts = []
    for inputs, targets, weights, segments in micro_batches(batch, teacher):
        in_loss = (weights > 0).nonzero(as_tuple=True)
        logits_NV = logits_at(teacher, inputs, segments, in_loss)[:, :vocab_size]
        parts.append(teacher_buckets(logits_NV, targets[in_loss], top_k))
    ids, logprobs = zip(*parts)
    return torch.cat(ids), torch.cat(logprobs)


def micro_batches(batch, model) -> Iterator[tuple]:
    """The batch in parts of as many rows as MAX_LOGITS allows, on the device."""
    rows = max(1, MAX_LOGITS // (batch[0].size(1) * model.config.vocab_size))
    return zip(*(tensor.to(hardware.device()).split(rows) for tensor in batch))
