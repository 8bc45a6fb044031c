"""Pretraining: from a folder of text to a model that continues it.

text -> tokenizer -> shards -> batches -> loss -> Muon -> a model folder
"""

from dataclasses import dataclass
from typing import Literal

import torch

from nanoghost import distributed, hardware
from nanoghost.data.shards import tokenise, tokenizer_for
from nanoghost.data.sources import open_source
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.home import open_model
from nanoghost.model.registry import architecture
from nanoghost.optim.schedule import learning_rate
from nanoghost.progress import Display
from nanoghost.tasks.registry import example_texts
from nanoghost.train import run as stage
from nanoghost.train.hyperparameters import compile_decision, depth_for, groups, model_config


@dataclass(frozen=True)
class PretrainSettings(stage.StageSettings):
    name: str = "ghost-base"
    """Name of the new model."""
    data: str = "plays"
    """Text to learn: plays, a file or folder (.txt .md .jsonl .parquet), hub:OWNER/NAME, a URL, or a mixture (plays=0.7,notes/=0.3)."""
    depth: int | None = None
    """The dial: layers; sets width, heads and learning rates. Default: what learns most in the given minutes."""
    dial_minutes: float | None = None
    """Choose the layers for this many minutes instead: more training will follow."""
    arch: Literal["ghost", "llama"] = "ghost"
    """A ghost learns fastest, a llama runs in other engines."""
    vocab_size: int = 4096
    """Tokens of a new tokenizer."""
    tokenizer: str | None = None
    """Take the tokenizer of this model instead of making a new one, so that the model can teach (`distill`)."""
    context: int = 256
    """Tokens in a training row; also the longest conversation of the model."""
    batch: int = 16
    """Rows in a step, over all processes."""
    micro_batch: int = 64
    """Rows in one forward pass of a process; smaller saves memory and changes nothing else."""
    learning_rate: float = 1.0
    """Factor on all learning rates of the recipe."""
    seed: int = 0
    """Of the weights at step 0 and of the batch order."""
    compile: Literal["auto", "on", "off"] = "auto"
    """auto: compile where it pays within the run."""
    shard: Literal["model"] | None = None
    """For models too large for one device: the weights are shared out among the processes (FSDP2)."""


def main(settings: PretrainSettings, display: Display | None = None) -> dict | None:
    """Train; returns the figures, or None if the model was there already. Ctrl-C loses nothing."""
    hardware.prepare()
    distributed.init_distributed()
    rank, world = distributed.ranks()
    display = display or Display()
    stage.check_numbers(settings)
    check(settings, world)
    source = open_source(settings.data)
    if settings.tokenizer:
        tokenizer = load_tokenizer(open_model(settings.tokenizer).path)
    else:
        tokenizer = tokenizer_for(source, settings.vocab_size, display.say, example_texts())
    shards = tokenise(source, tokenizer)
    batches = shards.batches(settings.context, settings.batch, settings.seed, rank, world)

    with stage.run("pretrain", settings, display) as run:
        if run is None:
            return None
        from nanoghost.train.fault_tolerance import Fitting

        minutes = settings.minutes if settings.minutes or settings.steps else 4.0
        clock = stage.Clock(0.0)
        passes = Fitting(settings.micro_batch, display.say)
        if "depth" not in run.card:
            depth, reason = (
                (settings.depth, "as asked") if settings.depth else depth_here(settings.dial_minutes or minutes, world)
            )
            run.note(depth=depth, depth_reason=reason)
        config = model_config(settings.arch, run.card["depth"], tokenizer.vocab_size, settings.context)

        def build(epochs: float = 1.0):
            torch.manual_seed(settings.seed)
            return stage.with_optimizer(
                make_model(config, tokenizer), groups(config.width, settings.learning_rate, 1 / epochs), settings
            )

        if "steps" not in run.card:
            compiled = compile_decision("off" if settings.shard else settings.compile, minutes)
            steps = settings.steps or rehearsed_steps(minutes, build, batches, passes, compiled, clock)
            run.note(
                data=[shards.manifest["source"]],
                arch=settings.arch,
                compile=compiled,
                steps=steps,
                vocab_size=tokenizer.vocab_size,
            )
        steps, compiled = run.card["steps"], run.card["compile"]
        epochs = max(1.0, batches.epochs_in(steps))
        model, optimizer = build(epochs)
        counts = model.parameter_counts()
        run.note(config=model.settings(), parameters=sum(counts.values()), parameter_counts=counts)
        start, notes = run.resume(optimizer)
        display.say(describe(run.card, batches.epochs_in(steps), settings, start))
        if compiled["on"]:
            compile_model(model)

        clock = stage.Clock(notes.get("seconds", clock.seconds), settings.checkpoint_seconds)
        tokens_per_step = settings.batch * settings.context
        rate, tenth = stage.Rate(), max(1, steps // 10)
        for step in run.steps():
            progress, number = step / steps, run.batch(step)
            model.thin(epochs, number)
            part = passes(lambda rows: train_step(model, *batches.at(number), rows), model)  # noqa: B023
            loss = run.ready(step, part, batches.positions(number).tolist(), clock)
            if loss is None:
                continue
            optimizer.step(learning_rate(progress))
            rate.count(tokens_per_step)
            if step % max(1, steps // 500) == 0 or step == steps - 1:
                run.event(
                    step, steps=steps, loss=loss, learning_rate=learning_rate(progress), tokens=(step + 1) * tokens_per_step,
                    tokens_per_second=rate.per_second, seconds=clock.seconds,
                    seconds_left=(steps - step - 1) * tokens_per_step / rate.per_second,
                )  # fmt: skip
            if (step + 1) % tenth == 0 and step + 1 < min(steps, 10 * tenth):
                sample = shards.tokens("val")[: 32 * settings.context]
                bpb = bits_per_byte(
                    model, sample, settings.context, shards.bytes("val") * len(sample) / len(shards.tokens("val"))
                )
                run.event(step + 0.5, validation_bpb=bpb)
                rate = stage.Rate()  # of training alone

        seconds = clock.seconds  # what follows is evaluation
        stage.save(run, model, tokenizer)
        bpb = bits_per_byte(model, shards.tokens("test"), settings.context, shards.bytes("test"))
        validation = bits_per_byte(model, shards.tokens("val"), settings.context, shards.bytes("val"))
        texts = {s: [d.text for d in source.documents() if d.split == s] for s in ("train", "test")}
        figures = run.finish(
            name=settings.name, parameters=run.card["parameters"], tokens=steps * tokens_per_step, seconds=round(seconds, 1),
            tokens_per_second=rate.per_second, flops_per_second=rate.per_second * model.flops_per_token(settings.context),
            bpb=bpb, validation_bpb=validation, kneser_ney_bpb=kneser_ney_bpb(texts["train"], texts["test"], order=6) if rank == 0 else 0.0,
            steps=steps, loss=loss,
        )  # fmt: skip
    display.say(
        f"{settings.name}: {figures['bpb']:.3f} bits per byte on held-out text after {figures['seconds']:.0f} s"
        f" (counting byte sequences, Kneser-Ney of order 6: {figures['kneser_ney_bpb']:.3f})"
    )
    return figures


def check(settings: PretrainSettings, world: int) -> None:
    if settings.batch % world:
        raise UserError(f"--batch {settings.batch} does not divide over {world} processes")


def depth_here(minutes: float | None, world: int) -> tuple[int, str]:
    """(depth, reason), by the rate of this machine's products where there are minutes to fill."""
    if minutes is None:
        return depth_for(None)
    return depth_for(
        minutes, world * distributed.all_reduce_mean(hardware.matmul_gflops_per_second(hardware.compute_dtype(), 0.3))
    )


def make_model(config, tokenizer):
    model = architecture(config.model_type)[1](config)
    model.learn_letters(tokenizer)
    return model.cast(hardware.compute_dtype()).to(hardware.device())


def train_step(model, inputs, targets, micro_batch: int) -> float:
    """Gradients of the mean loss over this process's rows; returns that loss in nats per token."""
    device = hardware.device()
    total = torch.zeros((), device=device)
    for x, y in zip(inputs.split(micro_batch), targets.split(micro_batch)):
        loss = -model.logprobs(x.to(device), y.to(device)).sum() / targets.numel()
        loss.backward()
        total += loss.detach()
    return total.item()


def compile_model(model) -> None:
    """Compile one layer at a time: layers of the same form share the compiled code."""
    for block in model.blocks:
        block.compile(dynamic=False)  # with symbolic sizes, Inductor 2.13 fails on the rotation


def rehearsed_steps(minutes: float, build, batches, passes, compiled: dict, clock: stage.Clock) -> int:
    model, optimizer = build()
    if compiled["on"]:
        compile_model(model)

    def one_step(step: int) -> None:
        passes(lambda rows: train_step(model, *batches.at(step), rows), model)
        optimizer.step(0.1)

    return stage.steps_within(minutes * 60 - clock.seconds, one_step)


def describe(card: dict, epochs: float, settings: PretrainSettings, start: int) -> str:
    return (
        f"pretraining {settings.name}: {card['parameters'] / 1e6:.1f}M parameters"
        f" ({(card['parameter_counts']['matrices'] + card['parameter_counts']['head']) / 1e6:.1f}M in matrix products),"
        f" {card['depth_reason']}; {card['steps']} steps of {settings.batch} x {settings.context} tokens, the text {epochs:.1f} times;"
        f" compiling is {'on' if card['compile']['on'] else 'off'}: {card['compile']['reason']}"
        + (f"; going on at step {start}" if start else "")
    )


def command(settings: PretrainSettings) -> None:
    stage.print_figures(main(settings), settings)
