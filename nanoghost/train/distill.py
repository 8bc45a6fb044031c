"""Distillation: a student learns from another model's answers, or from its probabilities.

    kind        the student learns from      the teacher provides          tokenizers
    sequence    prompts                      answers, as text              any         Kim and Rush 2016
    token       given text or conversations  probabilities of each token   the same    Hinton et al. 2015
    on-policy   its own samples              probabilities of each token   the same    Agarwal et al. 2024, GKD

The teacher's answers and probabilities for given examples are cached in the data folder (teacher_cache.py).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanoghost import distributed, hardware
from nanoghost.data.file_reader import has_conversations
from nanoghost.data.registry import open_data_source
from nanoghost.data.token_dataset import TokenDataset
from nanoghost.data.tokenize_source import tokenize_source
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.home import ModelFolder, open_model
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import file_conversations, parse_data
from nanoghost.train.clock import Clock, Throughput, steps_that_fit
from nanoghost.train.distill_methods import METHODS, sample_conversations, text_rows
from nanoghost.train.fault_tolerance import StepGuard
from nanoghost.train.hyperparameters import finetune_context, finetune_groups
from nanoghost.train.run import (
    build_optimizer,
    check_same_run,
    fingerprint_of_conversations,
    load_parent,
    prepare_finetuning,
    print_results,
    start_run,
)
from nanoghost.train.settings import DEFAULT_FINETUNE_MINUTES, FinetuneSettings, check_batch_is_divisible
from nanoghost.train.teacher_cache import Teacher


@dataclass(frozen=True)
class DistillSettings(FinetuneSettings):
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """The student: model to start from. Default: the one finished last."""
    teacher: str = "smollm2"
    """Model to learn from."""
    name: str = "pupil"
    """Name of the new model."""
    kind: str = "sequence"
    """Learn the teacher's answers (sequence), or its probabilities: of examples (token), of own samples (on-policy)."""
    data: str = "builtin"
    """Examples: builtin (conversations), a file of them, or builtin+FILE; token and on-policy also learn from text."""
    examples: int = 500
    """Maximum number of examples: conversations, or evenly spaced rows of text."""
    top_k: int = 32
    """Number of most probable tokens whose probability is learned individually; all others count as one."""
    beta: float | None = None
    """0: KL(teacher || student), 1: KL(student || teacher), between: Jensen-Shannon. Default: on-policy 1, else 0."""
    teacher_weight: float = 0.7
    """Weight of the distillation loss (kind token); the rest is next-token loss."""
    max_tokens: int = 96
    """Longest sampled answer, in tokens."""
    temperature: float | None = None
    """Sampling temperature. Default: 0.7 for the teacher (sequence), 1 for the student (on-policy)."""
    batch: int = 16
    """Packed rows in a step, over all processes; on-policy: prompts."""
    context: int | None = None
    """Tokens in a row. Default: the student's context, at most 512."""
    learning_rate: float = 1.0
    """Factor on all learning rates, which are tuned; not a learning rate itself."""
    seed: int = 0
    """Random seed of the examples, their order and the sampling."""


def main(settings: DistillSettings, display: Display | None = None) -> dict | None:
    """Train a model. Returns the figures, or None if the model exists already. An interrupted run resumes exactly."""
    display = display or Display()
    settings, parent = prepare_finetuning("distill", settings)
    teacher_folder = open_model(settings.teacher)
    check_distill_settings(settings, parent, teacher_folder)
    dataset, conversations = None, []
    inputs = {"teacher": teacher_folder.fingerprint}
    if is_text(settings.data):
        source = open_data_source(settings.data)
        inputs["data"] = source.fingerprint
        check_same_run("distill", settings, inputs, parent)  # before the text is tokenized
        dataset = tokenize_source(source, load_base_tokenizer(parent))
    else:
        conversations = file_conversations(settings.data)
        inputs["data"] = fingerprint_of_conversations(conversations)

    with start_run("distill", settings, display, inputs, parent) as run:
        if run is None:
            return None
        setup_clock = Clock()
        model, tokenizer = load_parent(parent, settings)
        context = finetune_context(model.config.context, settings.context)
        if dataset:
            examples = text_rows(dataset.tokens("train"), context, settings.examples, dataset.verifier("train"))
        else:
            examples = sample_conversations(settings, conversations, parent.card.root)
        method = METHODS[settings.kind](settings, examples, tokenizer, context, Teacher(teacher_folder), run)
        hardware.release_memory()  # of a teacher that is not needed any more
        groups = finetune_groups(parent.card.root, model.config.width, settings.learning_rate)
        model, optimizer = build_optimizer(model, groups, settings)
        if run.card.steps is None:
            data = combined_sources(run.card.data, teacher_folder, dataset)
            run.update_card(teacher=teacher_folder.card, teacher_seconds=round(setup_clock.seconds, 1), data=data)
            steps = settings.steps or calibrated_steps(settings, parent, groups, method)
            run.update_card(steps=steps, adapters=[adapter.summary() for adapter in model.adapters])
        guard = StepGuard(run, optimizer)
        start, saved = guard.resume()
        steps, tokens = run.card.steps, saved.get("tokens", 0)
        resumed = f", resuming at step {start}" if start else ""
        display.print(f"distilling {settings.teacher} into {settings.name}, {settings.kind}: {steps} steps{resumed}")

        clock = Clock(saved.get("seconds", 0.0), settings.checkpoint_seconds)
        throughput = Throughput()
        for step in guard.steps():  # the steps that are left; after a rollback some come again
            batch_index = guard.batch_index(step)  # differs from `step` once a rollback has skipped batches
            local_loss, step_tokens = method.forward_backward(model, batch_index)
            loss = distributed.all_reduce_mean(local_loss)
            if not math.isfinite(loss):
                guard.handle_bad_loss(step, local_loss, [f"batch {batch_index}"])
                continue
            guard.save_if_due(step, clock, score=loss, tokens=tokens)
            lr_scale = lr_multiplier_at(step / steps, warmup=0.02, cooldown=0.8)
            optimizer.step(lr_scale)  # also averages the gradients over the processes

            final_loss = loss
            tokens += step_tokens
            throughput.add(step_tokens)
            clock.count_step()
            run.log_step(step, clock, throughput, loss=loss, lr_scale=lr_scale, tokens=tokens)

        seconds = clock.seconds
        run.save_model(model, tokenizer)
        results = {"teacher": teacher_folder.name, "teacher_seconds": run.card.teacher_seconds, "loss": final_loss}
        results |= held_out_bits_per_byte(model, dataset, context)
        figures = run.finish(tokens, seconds, throughput, model.flops_per_token(context), **results)
    display.print(f"{settings.name}: loss {final_loss:.3f} after {seconds:.0f} s of training")
    return figures


# -- before the first step --------------------------------------------------------------------------------------------


def is_text(data: str) -> bool:
    """Whether --data names text, not conversations."""
    mix, path = parse_data(data)
    file = Path(path).expanduser()
    return not mix and not (file.is_file() and has_conversations(file))


def load_base_tokenizer(folder: ModelFolder):
    """The tokenizer of a model, or of the base of an adapter."""
    return load_tokenizer(ModelFolder(folder.base).path)


def check_distill_settings(settings: DistillSettings, parent: ModelFolder, teacher: ModelFolder) -> None:
    if settings.kind not in METHODS:
        raise UserError(f"--kind: unknown '{settings.kind}'; choose from {', '.join(METHODS)}")
    check_batch_is_divisible(settings, distributed.rank_and_world_size()[1])
    for flag, kind in (("beta", "sequence"), ("temperature", "token")):
        if settings.kind == kind and getattr(settings, flag) is not None:
            raise UserError(f"--{flag} has no effect with --kind {kind}: leave it out")
    for name, low, high in (("beta", 0, 1), ("teacher_weight", 0, 1), ("top_k", 1, 2**20), ("examples", 1, 2**40)):
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    if settings.kind == "sequence":
        if is_text(settings.data):
            raise UserError(
                f"--kind sequence needs questions: --data builtin, or a file of conversations, not '{settings.data}'"
            )
        return
    difference = tokenizer_difference(load_base_tokenizer(parent), load_base_tokenizer(teacher))
    if difference:
        raise UserError(
            f"'{parent.name}' cannot learn from the probabilities of '{teacher.name}': {difference};"
            f" use --kind sequence, or a student made with `pretrain --tokenizer {teacher.name}`"
        )


def tokenizer_difference(student, teacher) -> str:
    """Why the ids of two tokenizers do not mean the same, or ""."""
    if student.vocab_size != teacher.vocab_size:
        return f"the student has {student.vocab_size} tokens and the teacher {teacher.vocab_size}"
    if student.special_tokens != teacher.special_tokens:
        return "their special tokens differ"
    for i in range(student.vocab_size):
        student_bytes, teacher_bytes = student.token_bytes(i), teacher.token_bytes(i)
        if student_bytes != teacher_bytes:
            return f"token {i} is {student_bytes!r} for the student and {teacher_bytes!r} for the teacher"
    return ""


def combined_sources(sources: list[dict], teacher: ModelFolder, dataset: TokenDataset | None) -> list[dict]:
    """Data sources of the student, of the teacher and of the text, each once."""
    combined = list(sources)
    for source in [*teacher.card.data, *([dataset.manifest["source"]] if dataset else [])]:
        if source not in sources:
            combined.append(source)
    return combined


def calibrated_steps(settings: DistillSettings, parent: ModelFolder, groups, method) -> int:
    """Number of steps that fit into --minutes, from steps with a throwaway model."""
    model, optimizer = build_optimizer(load_parent(parent, settings)[0], groups, settings)

    def one_step(step: int) -> None:
        method.forward_backward(model, step)
        optimizer.step(0.0)

    return steps_that_fit((settings.minutes or DEFAULT_FINETUNE_MINUTES) * 60, one_step, trials=6)


# -- after the last step ----------------------------------------------------------------------------------------------


def held_out_bits_per_byte(model, dataset: TokenDataset | None, context: int) -> dict[str, float]:
    """Bits per byte of the held-out texts, if the student learned from text."""
    if dataset is None:
        return {}
    return {
        "bpb": bits_per_byte(model, dataset.tokens("test"), context, dataset.bytes("test")),
        "validation_bpb": bits_per_byte(model, dataset.tokens("val"), context, dataset.bytes("val")),
    }


def command(settings: DistillSettings) -> None:
    print_results(main(settings), settings)
