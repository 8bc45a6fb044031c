"""Supervised finetuning: from a model that continues text to one that answers.

conversations -> lessons (ids, what is learned) -> packed rows -> loss on the assistant's tokens -> a model folder
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanoghost import distributed, hardware
from nanoghost.errors import UserError
from nanoghost.optim.schedule import learning_rate
from nanoghost.progress import Display
from nanoghost.tasks.registry import lesson_conversations, own_conversations
from nanoghost.train import run as stage
from nanoghost.train.hyperparameters import later_groups, row_length
from nanoghost.train.packing import PackedBatches, lessons_from


@dataclass(frozen=True)
class SftSettings(stage.LaterSettings):
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """Model to start from; default: the one finished last."""
    name: str = "ghost-sft"
    """Name of the new model."""
    data: str = "lessons"
    """lessons (the built-in mix), tools (the same and calls of Python and lookup), a JSONL file of conversations, or lessons+FILE."""
    lessons: int = 40000
    """Conversations of the built-in mix."""
    batch: int = 8
    """Packed rows in a step, over all processes."""
    context: int | None = None
    """Tokens in a row, and of the longest conversation; default: the model's context, at most 512."""
    learning_rate: float = 1.0
    """Factor on the recipe's learning rates."""
    seed: int = 0
    """Of the lessons and their order."""
    shard: Literal["model"] | None = None
    """For models too large for one device: the weights are shared out among the processes (FSDP2)."""


def main(settings: SftSettings, display: Display | None = None) -> dict | None:
    """Train; returns the figures, or None if the model was there already. Ctrl-C loses nothing."""
    hardware.prepare()
    distributed.init_distributed()
    rank, world = distributed.ranks()
    display = display or Display()
    stage.check_numbers(settings)
    if settings.shard and settings.batch % world:
        raise UserError(f"--batch {settings.batch} does not divide over {world} processes")
    parent = stage.parent_of(settings, "sft")
    settings = stage.named(settings, parent)
    conversations = own_conversations(settings.data)

    with stage.run("sft", settings, display, parent) as run:
        if run is None:
            return None
        from nanoghost.train.fault_tolerance import Fitting

        clock = stage.Clock(0.0)
        model, tokenizer = stage.load_parent(parent, settings)
        context, base = row_length(model.config.context, settings.context), stage.base_card(parent.card)
        conversations += lesson_conversations(settings.data, base, settings.name, settings.lessons, settings.seed)
        lessons, left_out = lessons_from(conversations, tokenizer, context)
        if left_out:
            display.say(f"{left_out} conversations have no answer within {context} tokens and are left out")
        batches, passes = (
            PackedBatches(lessons, context, settings.batch, settings.seed, rank, world),
            Fitting(settings.batch, display.say),
        )
        rates = later_groups(base, model.config.width, settings.learning_rate)
        model, optimizer = stage.with_optimizer(model, rates, settings)

        if "steps" not in run.card:
            steps = settings.steps or rehearsed_steps(settings, parent, rates, batches, passes, clock)
            adapters = [adapter.summary() for adapter in model.adapters]
            run.note(steps=steps, conversations=len(lessons), left_out=left_out, adapters=adapters)
        steps = run.card["steps"]
        start, notes = run.resume(optimizer)
        tokens = notes.get("tokens", 0)
        display.say(
            f"finetuning {settings.name}: {len(lessons)} conversations, {steps} steps{f', going on at {start}' if start else ''}"
        )

        clock = stage.Clock(notes.get("seconds", clock.seconds), settings.checkpoint_seconds)
        rate = stage.Rate()
        every = max(1, steps // 500)
        for step in run.steps():
            number = run.batch(step)
            part = passes(lambda rows: train_step(model, batches.at(number), world, rows), model)  # noqa: B023
            mean = run.ready(step, part, batches.rows_at(number)[0], clock, tokens=tokens)
            if mean is None:
                continue
            loss = mean
            scale = learning_rate(step / steps, warmup=0.02, cooldown=0.8)
            optimizer.step(scale)
            tokens += settings.batch * context
            rate.count(settings.batch * context)
            if step % every == 0 or step == steps - 1:
                run.event(
                    step, steps=steps, loss=loss, learning_rate=scale, tokens=tokens, tokens_per_second=rate.per_second,
                    seconds=clock.seconds, seconds_left=(steps - step - 1) * settings.batch * context / rate.per_second,
                )  # fmt: skip

        seconds = clock.seconds
        stage.save(run, model, tokenizer)
        figures = run.finish(
            name=settings.name, parameters=run.card["parameters"], tokens=tokens, seconds=round(seconds, 1),
            tokens_per_second=rate.per_second, flops_per_second=rate.per_second * model.flops_per_token(context),
            loss=loss, steps=steps,
        )  # fmt: skip
    display.say(f"{settings.name}: loss {loss:.3f} on the assistant's tokens after {seconds:.0f} s")
    return figures


def train_step(model, batch, world: int, micro_batch: int | None = None) -> float:
    """Gradients of this process's part of the loss over the batch, `micro_batch` rows at a time; returns that part, times the
    number of processes."""
    total = 0.0
    parts = (t.to(hardware.device()).split(micro_batch or len(t) or 1) for t in batch)
    for inputs, targets, weights, segments in zip(*parts):
        learned = (weights > 0).nonzero(as_tuple=True)  # logits of the other tokens are never needed
        if len(learned[0]):  # not so where there are fewer rows than processes
            logp = model.logprobs(inputs, targets[learned], segments, places=learned)
            loss = -(logp * weights[learned]).sum() * world  # gradients are averaged over processes
            loss.backward()
            total += loss.item()
    return total


def rehearsed_steps(settings: SftSettings, parent, rates, batches, passes, clock: stage.Clock) -> int:
    model, optimizer = stage.with_optimizer(stage.load_parent(parent, settings)[0], rates, settings)

    def one_step(step: int) -> None:
        passes(lambda rows: train_step(model, batches.at(step), batches.world, rows), model)
        optimizer.step(0.0)

    return stage.steps_within((settings.minutes or 2.5) * 60 - clock.seconds, one_step)


def command(settings: SftSettings) -> None:
    stage.print_figures(main(settings), settings)
