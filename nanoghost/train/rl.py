"""Reinforcement learning (RL) with verifiable rewards.

problems -> rollouts (sampled with the engine) -> rewards -> advantages within each group -> policy gradient

Each step also trains on a few SFT examples of other tasks, so that these are not forgotten (the "ptx" term of
InstructGPT).
"""

import math
import random
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanoghost import distributed
from nanoghost.errors import UserError
from nanoghost.evals import task_accuracy
from nanoghost.home import ModelFolder
from nanoghost.optim.optimizer import UpdateRule
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.progress import Display
from nanoghost.tasks.base import Task, distinct_problems
from nanoghost.tasks.registry import DEFAULT_RL_TASKS, RL_TASKS, TASK_CLASSES, all_tasks
from nanoghost.tasks.sft_mix import builtin_conversations, file_conversations
from nanoghost.tools import sandbox
from nanoghost.train.clock import Clock, Throughput, steps_that_fit
from nanoghost.train.fault_tolerance import StepGuard
from nanoghost.train.hyperparameters import finetune_context, finetune_groups
from nanoghost.train.packing import PackedBatches, report_omissions, tokenize_conversations
from nanoghost.train.policy_loss import VARIANTS
from nanoghost.train.rollouts import accumulate_policy_gradients, compute_advantages, rollout_stats, sample_rollouts
from nanoghost.train.run import (
    Run,
    build_optimizer,
    fingerprint_of_conversations,
    load_parent,
    prepare_finetuning,
    print_results,
    start_run,
)
from nanoghost.train.settings import DEFAULT_FINETUNE_MINUTES, FinetuneSettings
from nanoghost.train.sft import accumulate_packed_gradients

# AdamW moves the embedding of a rare token as far as that of a common one: with the learning rates of pretraining, one
# rewarded rollout would change the embeddings of its rare tokens too much.
ADAMW_SCALE = 0.1
MAX_SFT_CONVERSATIONS = 12000  # of each source


@dataclass(frozen=True)
class RlSettings(FinetuneSettings):
    parent: Annotated[str | None, tyro.conf.Positional] = None
    """Model to start from. Default: the one finished last."""
    name: str = "ghost"
    """Name of the new model."""
    tasks: str = ",".join(DEFAULT_RL_TASKS)
    """Tasks to train on, comma-separated."""
    variant: str = "cispo"
    """Policy loss: cispo, dr_grpo, dapo, gspo or reinforce."""
    problems: int = 64
    """Problems in a step, over all processes."""
    rollouts: int = 8
    """Rollouts of each problem."""
    max_tokens: int = 32
    """Longest rollout in tokens; sums with their calculator calls need up to 56, programs and lookup up to 96."""
    data: str = "builtin"
    """SFT examples in each step: builtin or tools (without the RL tasks), a file, or builtin+FILE."""
    sft_rows: int = 8
    """Packed rows of SFT examples in a step, over all processes (0 = none)."""
    eval_problems: int = 500
    """Held-out problems of each task, evaluated before and after the training."""
    learning_rate: float = 0.3
    """Factor on all learning rates, which are tuned; not a learning rate itself."""
    seed: int = 0
    """Random seed of the problems and the rollouts."""

    @property
    def task_names(self) -> list[str]:
        return self.tasks.split(",")


def main(settings: RlSettings, display: Display | None = None) -> dict | None:
    """Train a model. Returns the figures, or None if the model exists already. An interrupted run resumes exactly."""
    display = display or Display()
    settings, parent = prepare_finetuning("rl", settings)
    _, world_size = distributed.rank_and_world_size()
    check_rl_settings(settings, world_size)
    conversations = file_conversations(settings.data)

    inputs = {"data": fingerprint_of_conversations(conversations)}
    with start_run("rl", settings, display, inputs, parent) as run:
        if run is None:
            return None
        setup_clock = Clock()
        model, tokenizer = load_parent(parent, settings)
        root = parent.card.root
        groups = finetune_groups(root, model.config.width, settings.learning_rate, ADAMW_SCALE)
        tasks_by_name = all_tasks(root, settings.name)
        tasks = {name: tasks_by_name[name] for name in settings.task_names}
        sft_batches = None
        if settings.sft_rows:
            sft_batches = pack_sft_examples(conversations, settings, parent, model, tokenizer, display)
        if run.card.steps is None:
            plan_run(run, settings, parent, model, tokenizer, groups, tasks, sft_batches, setup_clock)
        model, optimizer = build_optimizer(model, groups, settings)
        guard = StepGuard(run, optimizer)
        start, saved = guard.resume()
        steps, tokens = run.card.steps, saved.get("tokens", 0)
        resumed = f", resuming at step {start}" if start else ""
        batch = f"{settings.problems} problems x {settings.rollouts} rollouts"
        display.print(f"RL training of {settings.name}: {steps} steps of {batch}, {settings.variant}{resumed}")

        clock = Clock(saved.get("seconds", setup_clock.seconds), settings.checkpoint_seconds)
        throughput = Throughput()
        for step in guard.steps():  # the steps that are left; after a rollback some come again
            batch_index = guard.batch_index(step)  # differs from `step` once a rollback has skipped batches
            rollouts = sample_rollouts(model, tokenizer, tasks, settings, batch_index)
            advantages_N, denominators_N = compute_advantages(rollouts, settings)
            policy = accumulate_policy_gradients(model, rollouts.sequences, advantages_N, denominators_N, settings)
            loss = distributed.all_reduce_mean(policy.loss)
            if not math.isfinite(loss):
                guard.handle_bad_loss(step, policy.loss, [f"problems of batch {batch_index}"])
                continue
            stats = rollout_stats(rollouts, tasks, settings)
            guard.save_if_due(step, clock, score=-stats["reward"], tokens=tokens)
            lr_scale = lr_multiplier_at(step / steps, cooldown=0.5)
            if stats["groups_with_signal"]:  # otherwise nothing changes, not even the moments of the optimizer
                if sft_batches:
                    sft_loss = accumulate_packed_gradients(model, sft_batches.at(batch_index), world_size)
                    stats["sft_loss"] = distributed.all_reduce_mean(sft_loss)
                optimizer.step(lr_scale)

            # Tokens that this process has sampled, and tokens that it has trained on.
            step_tokens = sum(len(sequence.completion_ids) for sequence in rollouts.sequences) + policy.tokens
            step_tokens = round(distributed.all_reduce_mean(step_tokens) * world_size)
            tokens += step_tokens
            throughput.add(step_tokens)
            clock.count_step()
            figures = {"loss": loss, "lr_scale": lr_scale, "tokens": tokens} | stats | policy.figures
            run.log_step(step, clock, throughput, **figures)

        seconds = clock.seconds
        accuracy_after = evaluate(model, tokenizer, tasks, settings)
        run.save_model(model, tokenizer)
        accuracy = {name: {"before": run.card.accuracy_before[name], "after": accuracy_after[name]} for name in tasks}
        flops_per_token = model.flops_per_token(settings.max_tokens)
        figures = run.finish(tokens, seconds, throughput, flops_per_token, accuracy=accuracy)
    for name, a in accuracy.items():
        display.print(f"{name}: {a['before']['accuracy']:.1%} -> {a['after']['accuracy']:.1%} of held-out problems")
    return figures


def check_rl_settings(settings: RlSettings, world_size: int) -> None:
    if settings.variant not in VARIANTS:
        raise UserError(f"--variant: unknown '{settings.variant}'; choose from {', '.join(VARIANTS)}")
    unknown = sorted(set(settings.task_names) - set(RL_TASKS))
    if unknown:
        raise UserError(f"--tasks: unknown '{', '.join(unknown)}'; choose from {', '.join(RL_TASKS)}")
    if any(TASK_CLASSES[name].needs_sandbox for name in settings.task_names):
        sandbox.require_installed()
    if settings.problems % world_size:
        raise UserError(f"--problems {settings.problems} is not divisible by the number of processes, {world_size}")
    if settings.rollouts < 2:
        raise UserError(
            "--rollouts must be at least 2: the reward of a rollout is compared with the others of its group"
        )


def pack_sft_examples(
    conversations: list, settings: RlSettings, parent: ModelFolder, model, tokenizer, display: Display
) -> PackedBatches:
    """Batches of the given conversations and of the built-in mix, without the tasks that RL trains."""
    rank, world_size = distributed.rank_and_world_size()
    count = min(MAX_SFT_CONVERSATIONS, len(conversations))
    conversations = random.Random(settings.seed).sample(conversations, count)
    conversations += builtin_conversations(
        settings.data,
        parent.card.root,
        settings.name,
        MAX_SFT_CONVERSATIONS,
        settings.seed + 1,
        settings.task_names,
    )
    context = finetune_context(model.config.context)
    examples, omissions = tokenize_conversations(conversations, tokenizer, context)
    report_omissions(omissions, len(conversations), context, display)
    return PackedBatches(examples, context, settings.sft_rows, settings.seed, rank, world_size)


def plan_run(
    run: Run,
    settings: RlSettings,
    parent: ModelFolder,
    model,
    tokenizer,
    groups: dict[str, UpdateRule],
    tasks: dict[str, Task],
    sft_batches: PackedBatches | None,
    setup_clock: Clock,
) -> None:
    """Evaluate the parent and decide the number of steps, once for all resumes."""
    run.display.print(f"evaluating {parent.name} on {settings.eval_problems} held-out problems of each task ...")
    accuracy_before = evaluate(model, tokenizer, tasks, settings)
    evaluation_seconds = setup_clock.seconds  # the evaluation after the training takes as long
    steps = settings.steps
    if not steps:
        trial_model, optimizer = build_optimizer(load_parent(parent, settings)[0], groups, settings)

        def one_step(step: int) -> None:
            rollouts = sample_rollouts(trial_model, tokenizer, tasks, settings, step)
            advantages_N, denominators_N = compute_advantages(rollouts, settings)
            accumulate_policy_gradients(trial_model, rollouts.sequences, advantages_N, denominators_N, settings)
            if sft_batches:
                accumulate_packed_gradients(trial_model, sft_batches.at(step), sft_batches.world_size)
            optimizer.step(0.0)

        seconds = (settings.minutes or DEFAULT_FINETUNE_MINUTES) * 60 - 2 * evaluation_seconds
        steps = steps_that_fit(seconds, one_step, trials=5)
    adapters = [adapter.summary() for adapter in model.adapters]
    run.update_card(steps=steps, accuracy_before=accuracy_before, adapters=adapters)


def evaluate(model, tokenizer, tasks: dict[str, Task], settings: RlSettings) -> dict[str, dict]:
    """Accuracy on held-out problems of each task."""
    results = {}
    for name, task in tasks.items():
        problems = distinct_problems(task, settings.eval_problems)
        results[name], _ = task_accuracy.accuracy(model, tokenizer, task, problems, settings.max_tokens)
    return results


def command(settings: RlSettings) -> None:
    print_results(main(settings), settings)
