"""Supervised finetuning (SFT): from a model that continues text to one that answers.

conversations -> tokenized examples -> packed rows -> loss on the assistant's tokens -> a model folder
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import tyro

from nanoghost import distributed, hardware
from nanoghost.data.registry import open_data_source
from nanoghost.data.tokenize_source import tokenize_source
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import builtin_conversations, file_conversations, parse_data
from nanoghost.train.clock import Clock, Throughput, steps_that_fit
from nanoghost.train.fault_tolerance import AutoMicroBatch, StepGuard
from nanoghost.train.hyperparameters import finetune_context, finetune_groups
from nanoghost.train.packing import PackedBatches, TokenizedExample, report_omissions, tokenize_conversations
from nanoghost.train.run import (
    build_optimizer,
    fingerprint_of_conversations,
    load_parent,
    prepare_finetuning,
    print_results,
    start_run,
)
from nanoghost.train.settings import DEFAULT_FINETUNE_MINUTES, FinetuneSettings, check_batch_is_divisible


@dataclass(frozen=True)
class SftSettings(FinetuneSettings):
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """Model to start from. Default: the one finished last."""
    name: str = "ghost-sft"
    """Name of the new model."""
    data: str = "builtin"
    """Conversations: builtin, tools (builtin with Python and lookup), a file, or builtin+FILE."""
    conversations: int = 60000
    """Number of conversations from the built-in mix."""
    text_share: float = 0.05
    """Share of rows with pretraining text, next to the built-in mix, so that the model keeps it."""
    batch: int = 16
    """Packed rows in a step, over all processes."""
    context: int | None = None
    """Tokens in a row, and in the longest conversation. Default: the model's context, at most 512."""
    learning_rate: float = 1.0
    """Factor on all learning rates, which are tuned; not a learning rate itself."""
    seed: int = 0
    """Random seed of the conversations and their order."""
    shard: Literal["model"] | None = None
    """For models too large for one device: split the weights over the processes (FSDP2)."""


def main(settings: SftSettings, display: Display | None = None) -> dict | None:
    """Train a model. Returns the figures, or None if the model exists already. An interrupted run resumes exactly."""
    display = display or Display()
    settings, parent = prepare_finetuning("sft", settings)
    rank, world_size = distributed.rank_and_world_size()
    if settings.shard:
        check_batch_is_divisible(settings, world_size)
    conversations = file_conversations(settings.data)
    forward_backward = AutoMicroBatch(accumulate_packed_gradients, settings.batch, display.print)

    inputs = {"data": fingerprint_of_conversations(conversations)}
    with start_run("sft", settings, display, inputs, parent) as run:
        if run is None:
            return None
        setup_clock = Clock()
        model, tokenizer = load_parent(parent, settings)
        root = parent.card.root
        count, seed = settings.conversations, settings.seed
        conversations += builtin_conversations(settings.data, root, settings.name, count, seed)
        context = finetune_context(model.config.context, settings.context)
        examples, omissions = tokenize_conversations(conversations, tokenizer, context)
        report_omissions(omissions, len(conversations), context, display)
        counts = {"conversations": len(examples), "dropped_conversations": len(omissions.dropped)}
        examples += pretraining_examples(settings, root, tokenizer, context, examples)
        batches = PackedBatches(examples, context, settings.batch, settings.seed, rank, world_size)
        groups = finetune_groups(root, model.config.width, settings.learning_rate)
        model, optimizer = build_optimizer(model, groups, settings)
        if run.card.steps is None:
            steps = settings.steps or calibrated_steps(settings, parent, groups, batches, forward_backward, setup_clock)
            adapters = [adapter.summary() for adapter in model.adapters]
            run.update_card(steps=steps, adapters=adapters, **counts)
        guard = StepGuard(run, optimizer)
        start, saved = guard.resume()
        steps, tokens = run.card.steps, saved.get("tokens", 0)
        resumed = f", resuming at step {start}" if start else ""
        display.print(f"finetuning {settings.name}: {counts['conversations']} conversations, {steps} steps{resumed}")

        clock = Clock(saved.get("seconds", setup_clock.seconds), settings.checkpoint_seconds)
        throughput = Throughput()
        for step in guard.steps():  # the steps that are left; after a rollback some come again
            batch_index = guard.batch_index(step)  # differs from `step` once a rollback has skipped batches
            local_loss = forward_backward(model, batches.at(batch_index), world_size)
            loss = distributed.all_reduce_mean(local_loss)
            if not math.isfinite(loss):
                guard.handle_bad_loss(step, local_loss, batches.rows_at(batch_index)[0])
                continue
            guard.save_if_due(step, clock, score=loss, tokens=tokens)
            lr_scale = lr_multiplier_at(step / steps, warmup=0.02, cooldown=0.8)
            optimizer.step(lr_scale)  # also averages the gradients over the processes

            final_loss = loss
            tokens += settings.batch * context
            throughput.add(settings.batch * context)
            clock.count_step()
            run.log_step(step, clock, throughput, loss=loss, lr_scale=lr_scale, tokens=tokens)

        seconds = clock.seconds
        run.save_model(model, tokenizer)
        figures = run.finish(tokens, seconds, throughput, model.flops_per_token(context), loss=final_loss)
    display.print(f"{settings.name}: loss {final_loss:.3f} on the assistant's tokens after {seconds:.0f} s")
    return figures


def pretraining_examples(
    settings: SftSettings, root: ModelCard, tokenizer, context: int, examples: list[TokenizedExample]
) -> list[TokenizedExample]:
    """Passages of the text that the model was pretrained on, each a row: `text_share` of all rows."""
    mix, _ = parse_data(settings.data)
    if not mix or root.stage == "adopt":
        return []
    tokens = tokenize_source(open_data_source(root.settings["data"]), tokenizer).tokens("train")
    rows = sum(len(example.ids) for example in examples) / context
    count = round(rows * settings.text_share / (1 - settings.text_share))
    last_start = max(1, len(tokens) - context - 1)
    starts = np.random.default_rng(settings.seed).integers(0, last_start, count)
    passages = [tokens[start : start + context + 1].tolist() for start in starts]
    return [TokenizedExample(ids, [True] * len(ids)) for ids in passages]


def accumulate_packed_gradients(model, batch, world_size: int, micro_batch: int | None = None) -> float:
    """Add the gradients of this process's part of the loss over a packed batch, `micro_batch` rows at a time.

    `batch`: inputs, targets, weights, segments of `PackedBatches.at`. Returns this part times
    `world_size`, so that the mean over the processes is the loss of the batch; the same holds for the gradients.
    """
    total = 0.0
    rows = micro_batch or len(batch[0]) or 1  # a process has no rows if there are fewer than processes
    micro_batches = zip(*(tensor.to(hardware.device()).split(rows) for tensor in batch))
    for inputs, targets, weights, segments in micro_batches:
        in_loss = (weights > 0).nonzero(as_tuple=True)  # the logits of the other tokens are never computed
        if len(in_loss[0]):
            logprobs = model.logprobs(inputs, targets[in_loss], segments, logit_positions=in_loss)
            loss = -(logprobs * weights[in_loss]).sum() * world_size
            loss.backward()
            total += loss.item()
    return total


def calibrated_steps(
    settings: SftSettings, parent: ModelFolder, groups, batches: PackedBatches, forward_backward, setup_clock: Clock
) -> int:
    """Number of steps that fit into --minutes, from steps with a throwaway model."""
    model, optimizer = build_optimizer(load_parent(parent, settings)[0], groups, settings)

    def one_step(step: int) -> None:
        forward_backward(model, batches.at(step), batches.world_size)
        optimizer.step(0.0)

    return steps_that_fit((settings.minutes or DEFAULT_FINETUNE_MINUTES) * 60 - setup_clock.seconds, one_step)


def command(settings: SftSettings) -> None:
    print_results(main(settings), settings)
