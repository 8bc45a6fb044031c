"""Supervised finetuning: from a model that continues text to one that answers.

conversations -> lessons (ids, what is learned) -> packed rows -> loss on the assistant's tokens -> a model folder
"""

import json
import math
import time
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost import machine
from nanoghost.data.sources import load_conversations
from nanoghost.errors import UserError
from nanoghost.model.layers import token_logprobs
from nanoghost.model.weights import load_checkpoint, load_model, save_checkpoint, save_model
from nanoghost.optim.optimizer import Optimizer
from nanoghost.optim.schedule import learning_rate
from nanoghost.progress import Display
from nanoghost.tasks.mix import lesson_conversations
from nanoghost.train.packing import PackedBatches, lessons_from
from nanoghost.train.recipe import groups
from nanoghost.train.stage import Clock, Rate, base_card, parent_of, stage_run


@dataclass(frozen=True)
class SftSettings:
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """Model to start from; default: the one finished last."""
    name: str = "ghost-sft"
    """Name of the new model."""
    data: str = "lessons"
    """lessons (the built-in mix), a JSONL file of conversations, or lessons+FILE for both."""
    lessons: int = 36000
    """Conversations of the built-in mix."""
    minutes: float | None = None
    """How long to train; becomes a number of steps before the first one."""
    steps: int | None = None
    """How many steps to train, instead of minutes (default: 2.5 minutes)."""
    batch: int = 8
    """Packed rows in a step, over all processes."""
    learning_rate: float = 1.0
    """Factor on pretraining's learning rates."""
    seed: int = 0
    """Of the lessons and their order."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints."""
    force: bool = False
    """Replace a model of that name."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def main(settings: SftSettings, display: Display | None = None) -> dict | None:
    """Train; returns the figures, or None if the model was there already. Ctrl-C loses nothing."""
    machine.prepare()
    machine.start_ranks()
    rank, world = machine.ranks()
    display = display or Display()
    if (settings.minutes or 1) <= 0 or (settings.steps or 1) <= 0:
        raise UserError("--minutes and --steps must be positive")
    parent = parent_of(settings, "sft")
    own = settings.data.removeprefix("lessons").removeprefix("+")
    conversations = load_conversations(own) if own else []

    with stage_run("sft", settings, display, parent) as run:
        if run is None:
            return None
        clock = Clock(0.0)
        model, tokenizer = load_model(parent.path, machine.compute_dtype(), machine.device())
        context = model.config.context
        if settings.data.startswith("lessons"):
            conversations += lesson_conversations(
                base_card(parent.card), settings.name, settings.lessons, settings.seed
            )
        lessons, left_out = lessons_from(conversations, tokenizer, context)
        if left_out:
            display.say(f"{left_out} conversations have no answer within {context} tokens and are left out")
        batches = PackedBatches(lessons, context, settings.batch, settings.seed, rank, world)
        optimizer = Optimizer(
            model, groups(model.config.width, settings.learning_rate), machine.compute_dtype(), rank, world
        )

        if "steps" not in run.card:
            steps = settings.steps or round(
                machine.mean_over_ranks(steps_for(settings.minutes or 2.5, parent, batches, settings, clock))
            )
            facts = {k: run.card["parent"][k] for k in ("data", "arch", "config", "parameters", "vocab_size")}
            run.note(steps=steps, conversations=len(lessons), left_out=left_out, **facts)
        steps = run.card["steps"]
        start, seconds, tokens = 0, clock.seconds, 0
        if saved := load_checkpoint(run.folder.path, rank):
            start, state, notes = saved
            optimizer.load_state(state)
            seconds, tokens = notes["seconds"], notes["tokens"]
        display.say(
            f"finetuning {settings.name}: {len(lessons)} conversations, {steps} steps{f', going on at {start}' if start else ''}"
        )

        clock = Clock(seconds, settings.checkpoint_seconds)
        rate = Rate()
        every = max(1, steps // 500)
        for step in range(start, steps):
            loss = train_step(model, batches.at(step), world)
            loss = machine.mean_over_ranks(loss)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss became {loss} at step {step}; nothing was updated and the last checkpoint stands: try --force"
                    f" with a smaller --learning-rate"
                )
            if step > start and run.checkpoint_due(clock):
                notes = {"seconds": clock.seconds, "tokens": tokens}
                save_checkpoint(run.folder.path, step, optimizer.state(), notes, rank)
            if run.stopping:
                run.stop(step, steps)
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
        if rank == 0:
            save_model(run.folder.path, model, tokenizer)
        figures = run.finish(
            name=settings.name, parameters=run.card["parameters"], tokens=tokens, seconds=round(seconds, 1),
            tokens_per_second=rate.per_second, flops_per_second=rate.per_second * model.flops_per_token(context),
            loss=loss, steps=steps,
        )  # fmt: skip
    display.say(f"{settings.name}: loss {loss:.3f} on the assistant's tokens after {seconds:.0f} s")
    return figures


def train_step(model, batch, world: int) -> float:
    """Gradients of this process's part of the loss over the batch; returns that part, times the number of processes."""
    inputs, targets, weights, segments = (t.to(machine.device()) for t in batch)
    learned = weights > 0  # logits of the other tokens are never needed
    logp = token_logprobs(model.hidden(inputs, segments)[learned], model.head, targets[learned])
    loss = -(logp * weights[learned]).sum() * world  # gradients are averaged over processes
    loss.backward()
    return loss.item()


def steps_for(minutes: float, parent, batches, settings, clock: Clock) -> int:
    """How many steps fit into the minutes that remain, measured on a throwaway copy of the model."""
    model, _ = load_model(parent.path, machine.compute_dtype(), machine.device())
    optimizer = Optimizer(model, groups(model.config.width), machine.compute_dtype(), *machine.ranks())
    times = []
    for step in range(7):
        start = time.perf_counter()
        train_step(model, batches.at(step), batches.world)
        optimizer.step(0.0)
        times.append(time.perf_counter() - start)
    return max(1, int((minutes * 60 - clock.seconds) / (sum(sorted(times[2:])[1:4]) / 3 * 1.02)))


def command(settings: SftSettings) -> None:
    figures = main(settings)
    if figures and settings.json and machine.ranks()[0] == 0:
        print(json.dumps(figures))
