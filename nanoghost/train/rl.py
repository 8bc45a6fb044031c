"""Reinforcement learning: many attempts at each problem, a verifier's reward, and more of what did better than average.

problems -> attempts (sampled with the engine) -> rewards -> advantages within each group -> policy gradient

Each step also repeats a few lessons, so that what is not practised is not lost (the "ptx" term of InstructGPT).
"""

import random
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from nanoghost import distributed, hardware
from nanoghost.engine.sampler import Sampling
from nanoghost.errors import UserError
from nanoghost.evals.task_accuracy import accuracy, attempt
from nanoghost.model.layers import shared_prompts
from nanoghost.optim.schedule import learning_rate
from nanoghost.progress import Display
from nanoghost.tasks.base import distinct_problems
from nanoghost.tasks.registry import all_tasks, lesson_conversations, own_conversations
from nanoghost.train import run as stage
from nanoghost.train.hyperparameters import later_groups, row_length
from nanoghost.train.packing import PackedBatches, lessons_from
from nanoghost.train.policy_loss import VARIANTS, advantages, denominators, policy_loss
from nanoghost.train.sft import train_step

TABLES = 0.1  # AdamW moves a rare row as far as a common one; a reward seen once must not rewrite a word
PRACTISED = (
    "chain_sum",
    "spell_backward",
    "sums",
    "spelling",
    "counting",
    "refusal",
    "answerable",
    "identity",
    "programs",
    "notes",
)


@dataclass(frozen=True)
class RlSettings(stage.LaterSettings):
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """Model to start from; default: the one finished last."""
    name: str = "ghost"
    """Name of the new model."""
    tasks: str = "chain_sum,spell_backward"
    """Tasks to practise, by name."""
    variant: str = "cispo"
    """Loss: cispo, dr_grpo, dapo, gspo or reinforce."""
    problems: int = 64
    """Problems in a step, over all processes."""
    attempts: int = 8
    """Attempts at each problem."""
    max_tokens: int = 32
    """Longest attempt; sums, with their calls, need up to 56, programs and notes up to 96."""
    data: str = "lessons"
    """What is repeated: lessons or tools (of the tasks that are not practised), a JSONL file of conversations, or lessons+FILE."""
    repeat: int = 4
    """Packed rows of it in a step, over all processes; 0 for none."""
    held_out: int = 500
    """Held-out problems of each task, tried before and after."""
    learning_rate: float = 0.3
    """Share of the recipe's learning rates."""
    seed: int = 0
    """Of the problems and the attempts."""


def main(settings: RlSettings, display: Display | None = None) -> dict | None:
    """Train; returns the figures, or None if the model was there already. Ctrl-C loses nothing."""
    hardware.prepare()
    distributed.init_distributed()
    rank, world = distributed.ranks()
    display = display or Display()
    stage.check_numbers(settings)
    check(settings, world)
    parent = stage.parent_of(settings, "rl")
    settings = stage.named(settings, parent)
    conversations = own_conversations(settings.data)

    with stage.run("rl", settings, display, parent) as run:
        if run is None:
            return None
        clock = stage.Clock(0.0)
        model, tokenizer = stage.load_parent(parent, settings)
        base = stage.base_card(parent.card)
        rates = later_groups(base, model.config.width, settings.learning_rate, adamw=TABLES)
        every = all_tasks(base, settings.name)
        tasks = {task: every[task] for task in settings.tasks.split(",")}
        lessons = repeated_lessons(conversations, settings, parent, model, tokenizer) if settings.repeat else None
        if "steps" not in run.card:
            display.say(f"before: {settings.held_out} held-out problems of each task ...")
            before = held_out(model, tokenizer, tasks, settings)
            steps = settings.steps or rehearsed_steps(settings, parent, rates, tokenizer, tasks, lessons, clock)
            run.note(steps=steps, before=before, adapters=[adapter.summary() for adapter in model.adapters])
        model, optimizer = stage.with_optimizer(model, rates, settings)
        steps = run.card["steps"]
        start, notes = run.resume(optimizer)
        tokens = notes.get("tokens", 0)
        display.say(
            f"reinforcement of {settings.name}: {steps} steps of {settings.problems} problems x {settings.attempts} attempts,"
            f" {settings.variant}{f', going on at {start}' if start else ''}"
        )

        began = notes.get("seconds", clock.seconds)
        clock = stage.Clock(began, settings.checkpoint_seconds)
        rate = stage.Rate()
        for step in run.steps():
            number = run.batch(step)
            figures, count = rollout_and_gradients(model, tokenizer, tasks, settings, number, rank, world)
            batch = [f"problems of step {number}"]
            figures["loss"] = run.ready(step, figures["loss"], batch, clock, -figures["reward"], tokens=tokens)
            if figures["loss"] is None:
                continue
            scale = learning_rate(step / steps, cooldown=0.5)
            if figures["groups"]:  # without signal nothing moves, not even the moments
                if lessons:
                    figures["lesson_loss"] = distributed.all_reduce_mean(train_step(model, lessons.at(number), world))
                optimizer.step(scale)
            tokens += count
            rate.count(count)
            run.event(
                step, steps=steps, learning_rate=scale, tokens=tokens, tokens_per_second=rate.per_second,
                seconds=clock.seconds, seconds_left=(steps - step - 1) * (clock.seconds - began) / (step - start + 1),
                **figures,
            )  # fmt: skip

        trained_seconds = clock.seconds
        after = held_out(model, tokenizer, tasks, settings)
        stage.save(run, model, tokenizer)
        both = {name: {"before": run.card["before"][name], "after": after[name]} for name in after}
        result = run.finish(
            name=settings.name, parameters=run.card["parameters"], tokens=tokens, seconds=round(trained_seconds, 1),
            tokens_per_second=rate.per_second, steps=steps, accuracy=both,
            flops_per_second=rate.per_second * model.flops_per_token(32),
        )  # fmt: skip
    for name, a in both.items():
        display.say(f"{name}: {a['before']['accuracy']:.1%} -> {a['after']['accuracy']:.1%} of held-out problems")
    return result


def check(settings: RlSettings, world: int) -> None:
    if settings.variant not in VARIANTS:
        raise UserError(f"--variant is one of {', '.join(VARIANTS)}, not '{settings.variant}'")
    unknown = set(settings.tasks.split(",")) - set(PRACTISED)
    if unknown:
        raise UserError(f"--tasks knows {', '.join(PRACTISED)}, not '{', '.join(sorted(unknown))}'")
    if "programs" in settings.tasks.split(","):
        from nanoghost.tools.sandbox import require

        require()
    if settings.problems % world:
        raise UserError(f"--problems {settings.problems} does not divide over {world} processes")
    if settings.attempts < 2:
        raise UserError("--attempts must be at least 2: an attempt is judged against the others of its group")


def repeated_lessons(conversations: list, settings: RlSettings, parent, model, tokenizer, most: int = 4000):
    """Batches of up to `most` own conversations, and as many of the built-in mix: other tasks than those practised."""
    rank, world = distributed.ranks()
    conversations = random.Random(settings.seed).sample(conversations, min(most, len(conversations)))
    card, practised = stage.base_card(parent.card), settings.tasks.split(",")
    conversations += lesson_conversations(settings.data, card, settings.name, most, settings.seed + 1, practised)
    context = row_length(model.config.context)
    lessons, _ = lessons_from(conversations, tokenizer, context)
    return PackedBatches(lessons, context, settings.repeat, settings.seed, rank, world)


def held_out(model, tokenizer, tasks: dict, settings: RlSettings) -> dict:
    return {
        name: accuracy(model, tokenizer, task, distinct_problems(task, settings.held_out), settings.max_tokens)[0]
        for name, task in tasks.items()
    }


def problems_of_step(tasks: dict, settings: RlSettings, step: int, rank: int, world: int) -> list:
    """This process's problems; those of a step are the same whatever the number of processes."""
    rng = random.Random(f"{settings.seed}-{step}")
    names = list(tasks)
    every = [tasks[names[i % len(names)]].problem(rng, "train") for i in range(settings.problems)]
    return every[rank::world]


def rollout_and_gradients(model, tokenizer, tasks, settings: RlSettings, step: int, rank: int, world: int):
    """Sample attempts, score them, and leave the policy gradient in .grad; (figures of the step, tokens handled)."""
    problems = problems_of_step(tasks, settings, step, rank, world)
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=1.0, seed=settings.seed * 1_000_003 + step)
    rows = attempt(model, tokenizer, problems, sampling, settings.attempts, rank, world)
    asked = [problems[i // settings.attempts] for i in range(len(rows))]
    # stopping is learned too: an attempt that ran into the limit solved nothing, and its last token is blamed for it
    own = [
        (
            p.task,
            tasks[p.task].score(p, row.messages) if row.finish_reason == "stop" else 0.0,
            sum(row.sampled),
            sum(row.logprobs),
        )
        for p, row in zip(asked, rows)
    ]
    names, rewards, lengths, logprobs = zip(
        *[row for everyone in distributed.all_gather_object(own) for row in everyone]
    )
    advantages_N, denominators_N = credit(torch.tensor(rewards, dtype=torch.float32), torch.tensor(lengths), settings)
    rewards_PG = torch.tensor(rewards, dtype=torch.float32).view(-1, settings.attempts)
    groups_with_signal = int((rewards_PG.amax(1) > rewards_PG.amin(1)).sum())
    figures = {  # over all processes
        "reward": sum(rewards) / len(rewards),
        "pass_rate": sum(rewards) / len(rewards),
        "entropy": -sum(logprobs) / sum(lengths),  # nats per sampled token
        "length": sum(lengths) / len(lengths),
        "groups": groups_with_signal,
        "groups_dropped": len(rewards_PG) - groups_with_signal,
        "loss": 0.0,
    }
    for name in tasks:
        of_task = [r for task, r in zip(names, rewards) if task == name]
        figures[f"pass_rate_{name}"] = sum(of_task) / max(1, len(of_task))
    count = sum(len(r.ids) for r in rows)
    advantages_N, denominators_N = (
        t[rank * len(rows) : (rank + 1) * len(rows)] for t in (advantages_N, denominators_N)
    )
    informative = advantages_N.nonzero()[:, 0].tolist()
    if informative:
        chosen = [rows[i] for i in informative]
        # gradients are averaged over processes, and this is a sum over them
        figures |= gradients(model, chosen, advantages_N[informative] * world, denominators_N[informative], settings)
        count += sum(len(r.ids) for r in chosen) + sum(len(p) for p in {tuple(r.prompt) for r in chosen})
    return figures, round(distributed.all_reduce_mean(count) * world)


def credit(rewards_N, lengths_N, settings: RlSettings):
    """Advantage and denominator of each attempt of all processes."""
    advantages_N = advantages(rewards_N.view(-1, settings.attempts), settings.variant).flatten()
    informative = advantages_N.nonzero()[:, 0]
    denominators_N = torch.ones_like(advantages_N)
    if len(informative):
        mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[informative, None]
        prompts_N = informative // settings.attempts
        denominators_N[informative] = denominators(mask_NT, prompts_N, settings.variant, settings.max_tokens)[:, 0]
    return advantages_N, denominators_N


def gradients(model, rows, advantages_N, denominators_N, settings: RlSettings, micro_batch: int = 16) -> dict:
    """Backward through all attempts; statistics of the ratio to the sampler's probabilities.

    A prompt is read once for all attempts at it, and attempts that came out the same are one, with the sum of their
    advantages: several times faster than one row an attempt.
    """
    groups: dict[tuple, dict[tuple, list[int]]] = {}  # prompt -> ids -> which attempts
    for n, row in enumerate(rows):
        groups.setdefault(tuple(row.prompt), {}).setdefault(tuple(row.ids), []).append(n)
    loss, ratios = 0.0, []
    keys = sorted(groups, key=lambda p: len(p) + sum(map(len, groups[p])))  # alike in length: less padding
    for i in range(0, len(keys), micro_batch):
        prompts = keys[i : i + micro_batch]
        same = [numbers for p in prompts for numbers in groups[p].values()]
        chosen = [rows[numbers[0]] for numbers in same]
        logp = attempt_logprobs(model, prompts, [list(groups[p]) for p in prompts])
        old, mask = padded([r.logprobs for r in chosen]), padded([r.sampled for r in chosen])
        sums_N = torch.stack([advantages_N[numbers].sum() for numbers in same])
        denominators_NT = denominators_N[[numbers[0] for numbers in same], None].expand(mask.shape)
        tensors = (t.to(hardware.device()) for t in (old, sums_N, mask, denominators_NT))
        part = policy_loss(logp, *tensors, settings.variant)
        part.backward()
        loss += part.item()
        ratios.append((logp.detach().cpu() - old)[mask > 0].exp())
    w = torch.cat(ratios)
    return {
        "loss": loss,
        "ratio_mean": w.mean().item(),
        "ratio_max": w.max().item(),
        "mismatch": (w - w.log() - 1).mean().item(),  # estimates the KL divergence between sampler and trainer
    }


def attempt_logprobs(model, prompts, attempts: list[list[list[int]]]):
    """log P of every token of every attempt, (N, longest), 0 behind their ends; `attempts` are grouped by prompt."""
    device = hardware.device()
    tokens, layout, places = shared_prompts([list(p) for p in prompts], attempts, model.head.dtype, device)
    flat = [ids for group in attempts for ids in group]
    targets = torch.tensor([token for ids in flat for token in ids], device=device)
    logp = model.logprobs(tokens, targets, layout=layout, places=places)
    inside = padded([[1.0] * len(ids) for ids in flat]).to(device) > 0
    return torch.zeros(inside.shape, device=device).masked_scatter(inside, logp)


def padded(rows: list[list]) -> torch.Tensor:
    """Rows of numbers as one fp32 matrix, with zeros behind their ends."""
    longest = max(map(len, rows))
    return torch.tensor([[float(x) for x in row] + [0.0] * (longest - len(row)) for row in rows])


def rehearsed_steps(settings: RlSettings, parent, rates, tokenizer, tasks, lessons, clock: stage.Clock) -> int:
    evaluation = clock.seconds  # before the first step; the same again comes after the last one
    model, optimizer = stage.with_optimizer(stage.load_parent(parent, settings)[0], rates, settings)

    def one_step(step: int) -> None:
        rollout_and_gradients(model, tokenizer, tasks, settings, step, *distributed.ranks())
        if lessons:
            train_step(model, lessons.at(step), lessons.world)
        optimizer.step(0.0)

    return stage.steps_within((settings.minutes or 2.5) * 60 - 2 * evaluation, one_step, rehearsals=5)


def command(settings: RlSettings) -> None:
    stage.print_figures(main(settings), settings)
