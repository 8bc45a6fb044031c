"""What a teacher says: asked once, and kept in the data folder, whatever is tried with it."""

import hashlib
import json
from functools import cache, partial
from pathlib import Path

import torch

from nanoghost import distributed, hardware
from nanoghost.data.local import load_conversations
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import Sampling
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, Stopped, home, write_atomic
from nanoghost.progress import Display
from nanoghost.tokenizer.chat_format import render, shortened
from nanoghost.tools.registry import TOOLS, run_tool
from nanoghost.train import run as stage
from nanoghost.train.distill_loss import logits_at, teacher_buckets

LOGITS = 2**25  # in flight at once: as many rows go through a model together as this allows
GROUP = 16  # examples that a teacher is asked about at once


def load(folder: ModelFolder):
    return load_model(folder.path, hardware.compute_dtype(), hardware.device())


def kept(what: str, key: list, count: int, make, run: stage.Run, display: Display) -> list[Path]:
    """`count` files, each the bytes that `make(number)` returned once; those that are missing are made, shared by the ranks.

    `key` is all that the contents depend on, the number of processes not being among it.
    """
    digest = hashlib.sha256(json.dumps([what, str(hardware.compute_dtype()), *key]).encode()).hexdigest()
    paths = [home() / "data" / f"{what}-{digest[:12]}" / f"{number:05}" for number in range(count)]
    rank, world = distributed.ranks()
    clock = stage.Clock(0.0, 10.0)
    for number in range(rank, count, world):
        if run.stopping:
            raise Stopped
        if not paths[number].exists():
            write_atomic(paths[number], make(number))
            if clock.due() and rank == 0:
                display.say(f"the teacher has given {number + 1} of {count} parts of its {what}")
    distributed.barrier()
    return paths


def answers(settings, asked: list[list[dict]], teacher: ModelFolder, run, display) -> list[list[dict]]:
    """The teacher's conversations: the questions whose answer ended within the limit, with the answer."""
    temperature = 0.7 if settings.temperature is None else settings.temperature
    loaded = cache(lambda: load(teacher))

    def make(number: int) -> bytes:
        model, tokenizer = loaded()
        room = model.config.context - settings.max_tokens
        prompts = []  # (question, token ids) of those that the teacher has room to answer
        for messages in asked[number * GROUP : (number + 1) * GROUP]:
            ids, _ = render(shortened(messages, tokenizer, room, True), tokenizer, generation=True)
            prompts += [(messages, ids)] if len(ids) <= room else []
        sampling = Sampling(settings.max_tokens, temperature, seed=settings.seed * 1_000_003 + number)
        calculator = partial(run_tool, tools={"calculator": TOOLS["calculator"]})
        rows = generate(model, tokenizer, [ids for _, ids in prompts], sampling, run_tool=calculator) if prompts else []
        whole = [{"messages": m + row.messages} for (m, _), row in zip(prompts, rows) if row.finish_reason == "stop"]
        return "".join(json.dumps(conversation) + "\n" for conversation in whole).encode()

    key = [teacher.card, asked, settings.max_tokens, temperature, settings.seed]
    paths = kept("answers", key, -(-len(asked) // GROUP), make, run, display)
    together = paths[0].with_name("answers.jsonl")
    if distributed.ranks()[0] == 0:
        write_atomic(together, b"".join(path.read_bytes() for path in paths))
    distributed.barrier()
    if not together.stat().st_size:
        raise UserError(f"none of the teacher's {len(asked)} answers ended: try a larger --max-tokens")
    found = load_conversations(together)
    display.say(
        f"{len(found)} of {len(asked)} answers ended within {settings.max_tokens} tokens; they are in {together}"
    )
    return found


@torch.no_grad()
def taught(teacher, batch, settings, vocab_size: int):
    """What a teacher expects at each learned token of a batch, row by row: ids (N, K), log P of the buckets (N, K + 1).

    Some models have more rows in their last layer than their tokenizer has tokens; `vocab_size` cuts them off.
    """
    found = []
    for inputs, targets, weights, segments in parts_of(batch, teacher):
        places = (weights > 0).nonzero(as_tuple=True)
        logits_NV = logits_at(teacher, inputs, segments, places)[:, :vocab_size]
        found.append(teacher_buckets(logits_NV, targets[places], settings.top_k))
    return [torch.cat(tensors) for tensors in zip(*found)]


def parts_of(batch, model):
    """The batch in parts of a few rows, on the device."""
    rows = max(1, LOGITS // (batch[0].size(1) * model.config.vocab_size))
    return zip(*(t.to(hardware.device()).split(rows) for t in batch))
