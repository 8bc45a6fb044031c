"""Distillation: a student learns from another model's answers, or from its probabilities.

    kind        what is learned from                 the teacher gives             tokenizers
    sequence    prompts                              answers, as text              any         Kim and Rush 2016
    token       text or conversations as they are    probabilities of each token   the same    Hinton et al. 2015
    on-policy   what the student itself writes       probabilities of each token   the same    Agarwal et al. 2024, GKD

What a teacher says about the examples is kept in the data folder (teacher.py).
"""

import random
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import numpy as np
import safetensors.torch
import torch
import tyro

from nanoghost import distributed, hardware
from nanoghost.data.shards import tokenise
from nanoghost.data.sources import open_source
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import Sampling
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.formats.model_folder import load_tokenizer
from nanoghost.home import ModelFolder, open_model
from nanoghost.optim.optimizer import Optimizer
from nanoghost.optim.schedule import learning_rate
from nanoghost.progress import Display
from nanoghost.tasks.registry import MIXES, lesson_conversations, own_conversations
from nanoghost.tokenizer.chat_format import render
from nanoghost.train import run as stage
from nanoghost.train.distill_loss import distill_loss, student_buckets
from nanoghost.train.hyperparameters import later_groups, row_length
from nanoghost.train.packing import Lesson, PackedBatches, fill, lessons_from, pack
from nanoghost.train.sft import train_step
from nanoghost.train.teacher_cache import GROUP, answers, kept, load, parts_of, taught


@dataclass(frozen=True)
class DistillSettings(stage.LaterSettings):
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """The student: model to start from; default: the one finished last."""
    teacher: str = "smollm2"
    """Model to learn from."""
    name: str = "pupil"
    """Name of the new model."""
    kind: str = "sequence"
    """sequence (the teacher's answers), token (its probabilities of a given text) or on-policy (of what the student says)."""
    data: str = "lessons"
    """Examples: lessons (the built-in mix), a JSONL file of conversations, lessons+FILE for both; for token and on-policy
    also text: plays, a file or folder, or hub:OWNER/NAME."""
    examples: int = 500
    """Most examples that are used: conversations, or rows of text, evenly spaced."""
    top_k: int = 32
    """Tokens of which the teacher's probability is learned one by one; the others are learned as one."""
    beta: float | None = None
    """0: KL(teacher || student), 1: KL(student || teacher), between: generalised Jensen-Shannon; default: 0, on-policy 1."""
    share: float = 0.7
    """Of the teacher in the loss of token; the rest is plain next-token loss, 0 is nothing else."""
    max_tokens: int = 96
    """Longest answer that is sampled."""
    temperature: float | None = None
    """Of the answers; default: 0.7 for the teacher's (sequence), 1 for the student's own (on-policy)."""
    batch: int = 16
    """Packed rows in a step, over all processes; on-policy: prompts."""
    context: int | None = None
    """Tokens in a row; default: the student's context, at most 512."""
    learning_rate: float = 1.0
    """Factor on the recipe's learning rates."""
    seed: int = 0
    """Of the examples' order, the lessons and the sampling."""


def main(settings: DistillSettings, display: Display | None = None) -> dict | None:
    """Train; returns the figures, or None if the model was there already. Ctrl-C loses nothing."""
    hardware.prepare()
    distributed.init_distributed()
    rank, world = distributed.ranks()
    display = display or Display()
    stage.check_numbers(settings)
    parent, teacher = stage.parent_of(settings, "distill"), open_model(settings.teacher)
    settings = stage.named(settings, parent)
    check(settings, parent, teacher, world)
    shards = tokenise(open_source(settings.data), tokenizer_of(parent)) if is_text(settings.data) else None
    own = [] if shards else own_conversations(settings.data)

    with stage.run("distill", settings, display, parent) as run:
        if run is None:
            return None
        clock = stage.Clock(0.0)
        model, tokenizer = stage.load_parent(parent, settings)
        context = row_length(model.config.context, settings.context)
        if shards:
            examples = rows_of_text(shards.tokens("train"), context, settings.examples, shards.check("train"))
        else:
            examples = conversations_of(settings, own, run)
        gradients = KINDS[settings.kind](settings, examples, tokenizer, context, teacher, run, display)
        hardware.release_memory()  # a teacher that has said it all is gone
        rates = later_groups(stage.base_card(parent.card), model.config.width, settings.learning_rate)
        optimizer = Optimizer(model, rates, hardware.compute_dtype(), rank, world)

        if "steps" not in run.card:
            asked = clock.seconds
            steps = settings.steps or rehearsed_steps(settings, parent, rates, gradients)
            sources = [*teacher.card["data"], *([shards.manifest["source"]] if shards else [])]
            data = run.card["data"] + [s for s in sources if s not in run.card["data"]]
            adapters = [adapter.summary() for adapter in model.adapters]
            run.note(steps=steps, data=data, teacher=teacher.card, teacher_seconds=round(asked, 1), adapters=adapters)
        steps = run.card["steps"]
        start, notes = run.resume(optimizer)
        tokens = notes.get("tokens", 0)
        display.say(
            f"distilling {teacher.name} into {settings.name}, {settings.kind}: {steps} steps"
            f"{f', going on at {start}' if start else ''}"
        )

        began = notes.get("seconds", 0.0)
        clock = stage.Clock(began, settings.checkpoint_seconds)
        rate = stage.Rate()
        every = max(1, steps // 500)
        for step in run.steps():
            part, count = gradients(model, run.batch(step))
            mean = run.ready(step, part, [f"batch {run.batch(step)}"], clock, tokens=tokens)
            if mean is None:
                continue
            loss = mean
            scale = learning_rate(step / steps, warmup=0.02, cooldown=0.8)
            optimizer.step(scale)
            tokens += count
            rate.count(count)
            if step % every == 0 or step == steps - 1:
                run.event(
                    step, steps=steps, loss=loss, learning_rate=scale, tokens=tokens, tokens_per_second=rate.per_second,
                    seconds=clock.seconds, seconds_left=(steps - step - 1) * (clock.seconds - began) / (step - start + 1),
                )  # fmt: skip

        seconds = clock.seconds
        stage.save(run, model, tokenizer)
        figures = {
            "name": settings.name, "parameters": run.card["parameters"], "tokens": tokens, "seconds": round(seconds, 1),
            "tokens_per_second": rate.per_second, "flops_per_second": rate.per_second * model.flops_per_token(context),
            "loss": loss, "steps": steps, "teacher": teacher.name, "teacher_seconds": run.card["teacher_seconds"],
        }  # fmt: skip
        for split, name in (("test", "bpb"), ("val", "validation_bpb")) if shards else ():
            figures[name] = bits_per_byte(model, shards.tokens(split), context, shards.bytes(split))
        run.finish(**figures)
    display.say(f"{settings.name}: loss {loss:.3f} after {seconds:.0f} s of training")
    return figures


def tokenizer_of(folder: ModelFolder):
    return load_tokenizer(ModelFolder(folder.base).path)


def check(settings: DistillSettings, parent: ModelFolder, teacher: ModelFolder, world: int) -> None:
    if settings.kind not in KINDS:
        raise UserError(f"--kind is one of {', '.join(KINDS)}, not '{settings.kind}'")
    if settings.batch % world:
        raise UserError(f"--batch {settings.batch} does not divide over {world} processes")
    for name, low, high in (("beta", 0, 1), ("share", 0, 1), ("top_k", 1, 2**20), ("examples", 1, 2**40)):
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    if settings.kind == "sequence":
        if is_text(settings.data):
            raise UserError("--kind sequence needs questions: --data lessons, or a .jsonl file of conversations")
        return
    own, theirs = tokenizer_of(parent), tokenizer_of(teacher)
    if reason := difference(own, theirs):
        raise UserError(
            f"'{parent.name}' cannot learn from the probabilities of '{teacher.name}': {reason}; use --kind sequence,"
            f" or a student made with `pretrain --tokenizer {teacher.name}`"
        )


def difference(own, theirs) -> str:
    """Why the ids of two tokenizers do not mean the same, or nothing."""
    if own.vocab_size != theirs.vocab_size:
        return f"it has {own.vocab_size} tokens and its teacher {theirs.vocab_size}"
    if own.specials != theirs.specials:
        return "their special tokens differ"
    for i in range(own.vocab_size):
        if own.token_bytes(i) != theirs.token_bytes(i):
            return f"token {i} is {own.token_bytes(i)!r} to it and {theirs.token_bytes(i)!r} to its teacher"
    return ""


# ── examples ────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_text(data: str) -> bool:
    return data.partition("+")[0] not in MIXES and not data.endswith(".jsonl")


def rows_of_text(tokens, context: int, most: int, check=None) -> list[Lesson]:
    """Up to `most` rows of a text, of `context` + 1 tokens, evenly spaced; neighbours share one token."""
    count = (len(tokens) - 1) // context
    if not count:
        raise UserError(
            f"the text has {len(tokens)} tokens, too few for one row of {context} + 1: choose a smaller --context"
        )
    starts = [i * count // min(most, count) * context for i in range(min(most, count))]
    if check:
        check(np.array(starts), context + 1)
    return [Lesson(tokens[s : s + context + 1].tolist(), [False] + [True] * context) for s in starts]


def conversations_of(settings: DistillSettings, own: list[list[dict]], run: stage.Run) -> list[list[dict]]:
    """Up to `settings.examples` of the built-in mix, and as many of the file."""
    own = random.Random(0).sample(own, min(settings.examples, len(own)))
    card = stage.base_card(run.card["parent"])
    return own + lesson_conversations(settings.data, card, settings.name, settings.examples, settings.seed)


def question(messages: list[dict]) -> list[dict]:
    """A conversation up to its last question."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    return messages[: last + 1]


# ── the kinds: each prepares, and returns `gradients(model, step)`: .grad filled, (loss, tokens) returned ───────────


def sequence(settings: DistillSettings, conversations, tokenizer, context: int, teacher, run, display):
    asked = [q for q in map(question, conversations) if q]
    if not asked:
        raise UserError(f"{settings.data}: no conversation has a user's message to answer")
    lessons, left_out = lessons_from(answers(settings, asked, teacher, run, display), tokenizer, context)
    if left_out:
        display.say(f"{left_out} answers do not fit into {context} tokens and are left out")
    batches = PackedBatches(lessons, context, settings.batch, settings.seed, *distributed.ranks())

    def gradients(model, step: int) -> tuple[float, int]:
        return train_step(model, batches.at(step), batches.world), settings.batch * context

    return gradients


def token(settings: DistillSettings, examples, tokenizer, context: int, teacher, run, display):
    lessons = examples if isinstance(examples[0], Lesson) else lessons_from(examples, tokenizer, context)[0]
    loaded = cache(lambda: load(teacher))

    def make(number: int) -> bytes:
        expert, _ = loaded()
        some = lessons[number * GROUP : (number + 1) * GROUP]
        rows = pack([len(lesson.ids) for lesson in some], context + 1, range(len(some)))
        ids, logprobs = taught(expert, fill(rows, some, context, 1), settings, tokenizer.vocab_size)
        order = torch.tensor([i for row in rows for i in row])
        return safetensors.torch.save({"ids": ids.int().cpu(), "logprobs": logprobs.cpu(), "order": order})

    key = [teacher.card, [lesson.ids for lesson in lessons], context, settings.top_k]
    said = []  # of each lesson: ids, log-probabilities
    for number, path in enumerate(kept("probabilities", key, -(-len(lessons) // GROUP), make, run, display)):
        part = safetensors.torch.load(path.read_bytes())
        order = [number * GROUP + i for i in part["order"].tolist()]
        lengths = [sum(lessons[i].learned) for i in order]
        found = dict(zip(order, zip(part["ids"].long().split(lengths), part["logprobs"].split(lengths))))
        said += [found[i] for i in sorted(found)]
    batches = PackedBatches(lessons, context, settings.batch, settings.seed, *distributed.ranks())

    def gradients(model, step: int) -> tuple[float, int]:
        rows, learned = batches.rows_at(step)
        batch = fill(rows, lessons, context, learned)
        targets = [torch.cat(tensors) for tensors in zip(*(said[i] for row in rows for i in row))]
        return distill_step(model, batch, targets, settings.beta or 0.0, settings.share), settings.batch * context

    return gradients


def on_policy(settings: DistillSettings, examples, tokenizer, context: int, teacher, run, display):
    if isinstance(examples[0], Lesson):
        prompts = [row.ids[: context // 4] for row in examples]  # the student goes on with the text
    else:
        prompts = [render(q, tokenizer, generation=True)[0] for q in map(question, examples) if q]
    prompts = [ids for ids in prompts if len(ids) + settings.max_tokens <= context]
    if not prompts:
        raise UserError(f"no prompt leaves room for {settings.max_tokens} tokens in a context of {context}")
    expert, _ = load(teacher)
    rank, world = distributed.ranks()
    beta = 1.0 if settings.beta is None else settings.beta
    temperature = 1.0 if settings.temperature is None else settings.temperature

    def gradients(model, step: int) -> tuple[float, int]:
        chosen = random.Random(f"{settings.seed}-{step}").choices(prompts, k=settings.batch)[rank::world]
        seed = settings.seed * 1_000_003 + step
        rows = generate(
            model, tokenizer, chosen, Sampling(settings.max_tokens, temperature, seed=seed), rank=rank, world=world
        )
        lessons = [Lesson(row.prompt + row.ids, [False] * len(row.prompt) + row.sampled) for row in rows]
        packed = pack([len(lesson.ids) for lesson in lessons], context + 1, range(len(lessons)))
        counts = distributed.all_gather_object(
            (sum(sum(row.sampled) for row in rows), sum(len(lesson.ids) for lesson in lessons))
        )
        written, read = map(sum, zip(*counts))  # by all processes
        batch = fill(packed, lessons, context, written)
        targets = taught(expert, batch, settings, tokenizer.vocab_size)
        return distill_step(model, batch, targets, beta, share=1.0), read

    return gradients


KINDS = {"sequence": sequence, "token": token, "on-policy": on_policy}


def distill_step(model, batch, targets, beta: float, share: float) -> float:
    """Gradients of this process's part of the loss over the batch; returns that part, times the number of processes."""
    total, done = 0.0, 0
    for inputs, following, weights, segments in parts_of(batch, model):
        places = (weights > 0).nonzero(as_tuple=True)
        ids_NK, teacher_NB = (t[done : done + len(places[0])].to(hardware.device()) for t in targets)
        done += len(places[0])
        student_NB = student_buckets(model, inputs, ids_NK, segments, places)
        loss_N = distill_loss(student_NB, teacher_NB, ids_NK, following[places], beta, share)
        loss = (loss_N * weights[places]).sum() * distributed.ranks()[1]  # gradients are averaged over processes
        loss.backward()
        total += loss.item()
    return total


def rehearsed_steps(settings: DistillSettings, parent: ModelFolder, rates, gradients) -> int:
    model, _ = stage.load_parent(parent, settings)
    optimizer = Optimizer(model, rates, hardware.compute_dtype(), *distributed.ranks())

    def one_step(step: int) -> None:
        gradients(model, step)
        optimizer.step(0.0)

    return stage.steps_within((settings.minutes or 2.5) * 60, one_step, rehearsals=6)


def command(settings: DistillSettings) -> None:
    stage.print_figures(main(settings), settings)
