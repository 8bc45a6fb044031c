"""Pretraining: from a folder of text to a model that continues it.

text -> tokenizer -> dataset -> batches -> loss -> Muon -> a model folder
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from nanoghost import distributed, hardware
from nanoghost.data.registry import open_data_source
from nanoghost.data.sources import Source
from nanoghost.data.token_dataset import TokenDataset
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.home import open_model
from nanoghost.model.registry import check_arch, config_for_depth, config_to_json, new_model
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train.clock import Clock, Throughput, steps_that_fit
from nanoghost.train.fault_tolerance import AutoMicroBatch, StepGuard
from nanoghost.train.hyperparameters import (
    compile_decision,
    depth_for,
    pretrain_groups,
    usable_gflops_per_second,
)
from nanoghost.train.run import Run, build_optimizer, check_same_run, print_results, start_run
from nanoghost.train.settings import StageSettings, check_batch_is_divisible, check_settings

VALIDATIONS = 10  # validation runs per training run, the one at the end included
VALIDATION_ROWS = 32  # rows of the validation text that are scored during training
DEFAULT_MINUTES = 4.0


@dataclass(frozen=True)
class PretrainSettings(StageSettings):
    name: str = "ghost-base"
    """Name of the new model."""
    data: str = "plays"
    """Text: plays, files (.txt .md .jsonl .parquet), hub:OWNER/NAME, a URL, or a mixture (plays=0.7,notes/=0.3)."""
    depth: int | None = None
    """The dial: number of layers; sets width, heads and learning rates. Default: the best for the given minutes."""
    dial_minutes: float | None = None
    """Choose the depth as if training took this long, because later stages train the model further."""
    arch: str = "ghost"
    """Architecture, ghost or llama: a ghost learns faster, a llama also runs in other engines."""
    vocab_size: int = 4096
    """Number of tokens of a new tokenizer."""
    tokenizer: str | None = None
    """Use the tokenizer of this model instead of training a new one, so that it can be the teacher in `distill`."""
    context: int = 256
    """Tokens in a training row; also the longest conversation of the model."""
    batch: int = 16
    """Rows in a step, over all processes."""
    micro_batch: int = 64
    """Rows in a forward pass of one process; fewer rows need less memory and give the same result."""
    learning_rate: float = 1.0
    """Factor on all learning rates, which are tuned; not a learning rate itself."""
    seed: int = 0
    """Random seed of the initial weights and of the batch order."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Use torch.compile; auto: if the run is long enough to repay it."""
    shard: Literal["model"] | None = None
    """For models too large for one device: split the weights over the processes (FSDP2)."""


def main(settings: PretrainSettings, display: Display | None = None) -> dict | None:
    """Train a model. Returns the figures, or None if the model exists already. An interrupted run resumes exactly."""
    hardware.prepare()
    distributed.init_distributed()
    rank, world_size = distributed.rank_and_world_size()
    display = display or Display()
    check_settings(settings)
    check_arch(settings.arch)
    check_batch_is_divisible(settings, world_size)
    source = open_data_source(settings.data)
    inputs = {"data": source.fingerprint}
    check_same_run("pretrain", settings, inputs)  # before a tokenizer learns from the text
    tokenizer = choose_tokenizer(settings, source, display)
    inputs["tokenizer"] = tokenizer.fingerprint
    dataset = tokenize_source(source, tokenizer)
    batches = dataset.batches(settings.context, settings.batch, settings.seed, rank, world_size)
    forward_backward = AutoMicroBatch(accumulate_gradients, settings.micro_batch, display.print)

    with start_run("pretrain", settings, display, inputs) as run:
        if run is None:
            return None
        setup_clock = Clock()
        plan_run(run, settings, dataset, tokenizer, batches, forward_backward, setup_clock)
        steps, epochs = run.card.steps, max(1.0, batches.epochs_in(run.card.steps))
        model, optimizer = build_model(run.card.depth, settings, tokenizer, epochs)
        counts = model.parameter_counts()
        run.update_card(config=config_to_json(model.config), parameters=sum(counts.values()), parameter_counts=counts)
        guard = StepGuard(run, optimizer)
        start, saved = guard.resume()
        display.print(run_summary(run.card, batches.epochs_in(steps), settings, start))
        if run.card.compile["on"]:
            compile_blocks(model)

        clock = Clock(saved.get("seconds", setup_clock.seconds), settings.checkpoint_seconds)
        throughput = Throughput()
        tokens_per_step = settings.batch * settings.context
        for step in guard.steps():  # the steps that are left; after a rollback some come again
            batch_index = guard.batch_index(step)  # differs from `step` once a rollback has skipped batches
            inputs_BT, targets_BT = batches.at(batch_index)
            model.set_embedding_row_dropout(epochs, batch_index)
            local_loss = forward_backward(model, inputs_BT, targets_BT)
            loss = distributed.all_reduce_mean(local_loss)
            if not math.isfinite(loss):
                guard.handle_bad_loss(step, local_loss, batches.row_starts(batch_index).tolist())
                continue
            guard.save_if_due(step, clock, score=loss)
            lr_scale = lr_multiplier_at(step / steps)
            optimizer.step(lr_scale)  # also averages the gradients over the processes

            final_loss = loss
            tokens = (step + 1) * tokens_per_step
            throughput.add(tokens_per_step)
            clock.count_step()
            run.log_step(step, clock, throughput, loss=loss, lr_scale=lr_scale, tokens=tokens)
            if validation_due(step, steps):
                # An event is identified by its stage and step: this one is between two training steps.
                run.log_event(step + 0.5, validation_bpb=validate(model, dataset, settings.context))
                throughput = Throughput()  # without the time of the validation

        seconds = clock.seconds  # without the evaluation that follows
        run.save_model(model, tokenizer)
        results = final_bits_per_byte(model, source, dataset, settings.context) | {"loss": final_loss}
        flops_per_token = model.flops_per_token(settings.context)
        figures = run.finish(steps * tokens_per_step, seconds, throughput, flops_per_token, **results)
    display.print(
        f"{settings.name}: {figures['bpb']:.3f} bits per byte on held-out text after {seconds:.0f} s"
        f" (n-gram baseline, Kneser-Ney of order 6: {figures['kneser_ney_bpb']:.3f})"
    )
    return figures


def accumulate_gradients(model, inputs_BT, targets_BT, micro_batch: int) -> float:
    """Add the gradients of the mean loss over this process's rows, `micro_batch` rows at a time; returns the loss
    (nats per token)."""
    device = hardware.device()
    total = torch.zeros((), device=device)
    for inputs, targets in zip(inputs_BT.split(micro_batch), targets_BT.split(micro_batch)):
        loss = -model.logprobs(inputs.to(device), targets.to(device)).sum() / targets_BT.numel()
        loss.backward()
        total += loss.detach()
    return total.item()


# -- before the first step --------------------------------------------------------------------------------------------


def choose_tokenizer(settings: PretrainSettings, source: Source, display: Display):
    if settings.tokenizer:
        return load_tokenizer(open_model(settings.tokenizer).path)
    return load_or_train_tokenizer(source, settings.vocab_size, display.print, example_texts())


def plan_run(
    run: Run, settings: PretrainSettings, dataset: TokenDataset, tokenizer, batches, forward_backward, clock
) -> None:
    """Decide depth, compilation and number of steps, once for all resumes."""
    minutes = settings.minutes if settings.minutes or settings.steps else DEFAULT_MINUTES
    if run.card.depth is None:
        depth, reason = choose_depth(settings, minutes)
        run.update_card(depth=depth, depth_reason=reason)
    if run.card.steps is None:
        compiled = compile_decision("off" if settings.shard else settings.compile, minutes)
        steps = settings.steps
        if not steps:
            model, optimizer = build_model(run.card.depth, settings, tokenizer)
            if compiled["on"]:
                compile_blocks(model)
            steps = calibrated_steps(minutes * 60 - clock.seconds, model, optimizer, batches, forward_backward)
        run.update_card(
            data=[dataset.manifest["source"]],
            arch=settings.arch,
            compile=compiled,
            steps=steps,
            vocab_size=tokenizer.vocab_size,
        )


def choose_depth(settings: PretrainSettings, minutes: float | None) -> tuple[int, str]:
    """(depth, reason), from the settings, or from the training time and the matmul throughput of this machine."""
    if settings.depth:
        return settings.depth, "--depth"
    minutes = settings.dial_minutes or minutes
    if minutes is None:
        return depth_for(None)
    _, world_size = distributed.rank_and_world_size()
    measured = hardware.matmul_gflops_per_second(hardware.compute_dtype(), 0.3)
    return depth_for(minutes, world_size * distributed.all_reduce_mean(usable_gflops_per_second(measured)))


def calibrated_steps(seconds: float, model, optimizer, batches, forward_backward) -> int:
    """Number of steps that fit into `seconds`, from steps with a throwaway model."""

    def one_step(step: int) -> None:
        forward_backward(model, *batches.at(step))
        optimizer.step(0.1)

    return steps_that_fit(seconds, one_step)


def build_model(depth: int, settings: PretrainSettings, tokenizer, epochs: float = 1.0):
    """(model, optimizer) with random weights. AdamW's learning rates are divided by the number of epochs."""
    torch.manual_seed(settings.seed)
    model = make_model(config_for_depth(settings.arch, depth, tokenizer.vocab_size, settings.context), tokenizer)
    groups = pretrain_groups(model.config.width, settings.learning_rate, adamw_scale=1 / epochs)
    return build_optimizer(model, groups, settings)


def make_model(config, tokenizer):
    model = new_model(config)
    model.set_character_features(tokenizer)
    return model.cast(hardware.compute_dtype()).to(hardware.device())


def compile_blocks(model) -> None:
    """Compile one block at a time: blocks of the same form share the compiled code."""
    for block in model.blocks:
        block.compile(dynamic=False)  # with symbolic sizes, Inductor 2.13 fails on the rotary embedding


def run_summary(card: ModelCard, epochs: float, settings: PretrainSettings, start: int) -> str:
    matmul_parameters = card.parameter_counts["matrices"] + card.parameter_counts["head"]
    on = "on" if card.compile["on"] else "off"
    resumed = f"; resuming at step {start}" if start else ""
    return (
        f"pretraining {settings.name}: {card.parameters / 1e6:.1f}M parameters ({matmul_parameters / 1e6:.1f}M in"
        f" matmuls), depth {card.depth} ({card.depth_reason}); {card.steps} steps of {settings.batch} x"
        f" {settings.context} tokens, {epochs:.1f} epochs; torch.compile is {on} ({card.compile['reason']}){resumed}"
    )


# -- evaluation -------------------------------------------------------------------------------------------------------


def validation_due(step: int, steps: int) -> bool:
    """True after each tenth of the run, except at its end, where the whole validation text is scored anyway."""
    interval = max(1, steps // VALIDATIONS)
    finished_steps = step + 1
    return finished_steps % interval == 0 and finished_steps < min(steps, VALIDATIONS * interval)


def validate(model, dataset: TokenDataset, context: int) -> float:
    """Bits per byte of the first rows of the validation text."""
    tokens = dataset.tokens("val")
    sample = tokens[: VALIDATION_ROWS * context]
    return bits_per_byte(model, sample, context, dataset.bytes("val") * len(sample) / len(tokens))


def final_bits_per_byte(model, source: Source, dataset: TokenDataset, context: int) -> dict[str, float]:
    """Bits per byte of the whole test and validation texts, and of the n-gram baseline on the test text."""
    figures = {
        "bpb": bits_per_byte(model, dataset.tokens("test"), context, dataset.bytes("test")),
        "validation_bpb": bits_per_byte(model, dataset.tokens("val"), context, dataset.bytes("val")),
        "kneser_ney_bpb": 0.0,
    }
    if distributed.is_main_process():  # takes seconds on one core, and only rank 0 writes the figures
        texts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for document in source.documents():
            texts[document.split].append(document.text)
        figures["kneser_ney_bpb"] = kneser_ney_bpb(texts["train"], texts["test"], order=6)
    return figures


def command(settings: PretrainSettings) -> None:
    print_results(main(settings), settings)
