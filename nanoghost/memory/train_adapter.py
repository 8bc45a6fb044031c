"""Adapter training: LoRA on the frozen base model learns to answer without the facts as the teacher does with them.

    loss = KL(teacher || base model + adapter) at each token of each answer

The adapter is a function of base model, examples and recipe, byte for byte. Training is resumed from FOLDER/state.
"""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.errors import StopFlag
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import save_adapter
from nanoghost.home import ModelFolder
from nanoghost.memory.recipe import AdapterRecipe
from nanoghost.memory.synthesize import SyntheticQA
from nanoghost.memory.teacher import TokenTargets, token_targets, tokenize_example
from nanoghost.model.layout import shared_prompt_rows
from nanoghost.model.lora import attach_adapters, new_adapter
from nanoghost.optim.optimizer import Optimizer
from nanoghost.optim.schedule import lr_multiplier_at
from nanoghost.progress import Display
from nanoghost.train.checkpoints import Checkpoints
from nanoghost.train.clock import Clock, Throughput
from nanoghost.train.distill_loss import bucket_logprobs, divergence
from nanoghost.train.hyperparameters import finetune_groups
from nanoghost.train.packing import PackedBatches, TokenizedExample

CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class AdapterRun:
    """Where and how an adapter is trained."""

    base: ModelFolder
    """The base model."""
    folder: Path
    """Folder of the run: the result is in adapter/, checkpoints are in state/."""
    recipe: AdapterRecipe
    stop_flag: StopFlag
    display: Display


@dataclass(frozen=True)
class AdapterExample:
    """A tokenized training example with the targets of its tokens in the loss."""

    tokens: TokenizedExample
    targets: TokenTargets
    weight: float = 1.0
    """Weight of each of its tokens in the loss."""


@dataclass(frozen=True)
class TrainingFigures:
    steps: int
    examples: int
    tokens: int
    """Tokens of all examples, without the prefix that they share."""
    seconds: float
    loss: float
    """Loss of the last step."""


def train_on_answers(
    run: AdapterRun, facts_qa: list[SyntheticQA], general: tuple[list[SyntheticQA], list[TokenTargets]]
) -> TrainingFigures:
    """Train the adapter of a night on answered questions.

    `general`: general prompts with the base model's answers and targets (teacher.general_examples).
    """
    model, tokenizer = load_model(run.base.path, hardware.compute_dtype(), hardware.device())
    general_qa, general_targets = general
    all_qa = [*facts_qa, *general_qa]
    all_targets = [*token_targets(model, tokenizer, facts_qa, run.recipe), *general_targets]
    weights = [1.0] * len(facts_qa) + [run.recipe.general_weight] * len(general_qa)
    examples = []
    for qa, targets, weight in zip(all_qa, all_targets, weights):
        tokens = tokenize_example(qa, tokenizer, with_context=False, max_tokens=run.recipe.context)
        examples.append(AdapterExample(tokens, targets.first(sum(tokens.loss_mask)), weight))
    return train_adapter(run, model, examples)


def train_adapter(run: AdapterRun, model, examples: list[AdapterExample]) -> TrainingFigures:
    """Train a new adapter on `model` for one epoch, and write it to run.folder/adapter."""
    recipe = run.recipe
    attach_adapters(model, [new_adapter(model, recipe.rank, None, None, recipe.seed)])
    shared_prefix, examples = split_shared_prefix(examples)
    batches = PackedBatches([example.tokens for example in examples], recipe.context, 1, recipe.seed)
    steps = batches.rows_in_first_epoch()
    groups = finetune_groups(run.base.card.root, model.config.width)
    groups["lora"] = replace(groups["lora"], learning_rate=recipe.learning_rate)
    optimizer = Optimizer(model, groups, hardware.compute_dtype())
    checkpoints = Checkpoints(run.folder / "state")
    start, saved = checkpoints.load(optimizer)
    clock = Clock(saved.get("seconds", 0.0), CHECKPOINT_SECONDS)
    throughput = Throughput()
    run.stop_flag.wait_for("this step")
    for step in range(start, steps):
        if step > start and (clock.checkpoint_due() or run.stop_flag):
            checkpoints.finish_save()
            checkpoints.start_save(step, optimizer.state(), {"seconds": clock.seconds})
        if run.stop_flag:
            checkpoints.finish_save()
        run.stop_flag.check()
        batch = [examples[i] for i in batches.row(step)]
        loss = adapter_loss(model, shared_prefix, batch)
        loss.backward()
        optimizer.step(lr_multiplier_at(step / steps, warmup=0.05, cooldown=0.8))
        throughput.add(sum(len(example.tokens.ids) for example in batch))
        run.display.show(
            {
                "stage": "sleep",
                "step": step,
                "steps": steps,
                "loss": loss.item(),
                "tokens_per_second": throughput.tokens_per_second,
                "seconds_left": clock.seconds / (step + 1) * (steps - step - 1),
            }
        )
    run.stop_flag.check()  # requested in the last step
    run.stop_flag.stop_at_once()
    checkpoints.finish_save()
    run.folder.mkdir(parents=True, exist_ok=True)
    save_adapter(run.folder / "adapter", model.adapters[0], run.base.name)
    shutil.rmtree(run.folder / "state", ignore_errors=True)
    tokens = sum(len(example.tokens.ids) for example in examples)
    return TrainingFigures(steps, len(examples), tokens, round(clock.seconds, 1), loss.item())


def split_shared_prefix(examples: list[AdapterExample]) -> tuple[list[int], list[AdapterExample]]:
    """The tokens that all examples begin with, and the examples without them: each step reads the prefix once."""
    prefix = os.path.commonprefix([example.tokens.ids for example in examples])
    n = len(prefix)
    shortened = [
        replace(example, tokens=TokenizedExample(example.tokens.ids[n:], example.tokens.loss_mask[n:]))
        for example in examples
    ]
    return prefix, shortened


def adapter_loss(model, shared_prefix: list[int], batch: list[AdapterExample]) -> torch.Tensor:
    """Weighted mean of the divergence over the tokens in the loss of a batch."""
    weights_N = torch.tensor([example.weight for example in batch for in_loss in example.tokens.loss_mask if in_loss])
    return (weights_N * divergence_per_token(model, shared_prefix, batch)).mean()


def divergence_per_token(model, shared_prefix: list[int], batch: list[AdapterExample]) -> torch.Tensor:
    """KL(targets || model) at each token in the loss, in nats: (N,)."""
    continuations = [example.tokens.ids for example in batch]
    tokens, layout, positions = shared_prompt_rows([shared_prefix], [continuations], model.dtype, hardware.device())
    in_loss = torch.tensor([flag for example in batch for flag in example.tokens.loss_mask])
    ids_NK = torch.cat([example.targets.ids_NK for example in batch])
    logprobs_NB = torch.cat([example.targets.logprobs_NB for example in batch])
    hidden_ND = model.hidden(tokens, layout)[tuple(index[in_loss] for index in positions)]
    return divergence(bucket_logprobs(hidden_ND, model.head_weight, ids_NK), logprobs_NB, 0.0)
