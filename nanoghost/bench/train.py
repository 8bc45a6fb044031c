"""`nanoghost bench train`: speed of fine-tuning, compared with the limit of this machine and with transformers.

Throughput counts each token once, whether or not it is in the loss, and no padding.
"""

import itertools
import random
import time
from dataclasses import dataclass
from functools import partial

import torch

from nanoghost import hardware
from nanoghost.bench.harness import (
    Workload,
    measure_and_report,
    measure_limits,
    requested_baselines,
    validation_texts,
)
from nanoghost.commands.arguments import ModelArgument
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, open_model
from nanoghost.model.lora import attach_adapters, new_adapter
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import JsonFlag
from nanoghost.tasks.sft_mix import builtin_conversations
from nanoghost.train.hyperparameters import finetune_context, finetune_groups
from nanoghost.train.packing import PackedBatches, TokenizedExample, tokenize_conversations
from nanoghost.train.sft import accumulate_packed_gradients


@dataclass(frozen=True)
class TrainBenchSettings(ModelArgument, JsonFlag):
    lora: int = 0
    """LoRA rank (0 = train all weights)."""
    batch: int = 8
    """Rows in a step."""
    steps: int = 4
    """Steps in a measurement."""
    rounds: int = 3
    """Number of measurements."""
    against: str = ""
    """Baseline: transformers (a plain loop, with peft for LoRA). It must be installed."""


class NanoghostTrainer:
    """SFT with nanoghost: packed rows."""

    def __init__(self, folder: ModelFolder, settings: TrainBenchSettings):
        self.model, self.tokenizer = load_model(folder.path, hardware.compute_dtype())
        if settings.lora:
            attach_adapters(self.model, [new_adapter(self.model, settings.lora, None, None, 0)])
        groups = finetune_groups(folder.card.root, self.model.config.width, 1.0)
        self.optimizer = Optimizer(self.model, groups, hardware.compute_dtype())
        self.rows = settings.batch

    def train(self, examples: list[TokenizedExample], context: int, steps: int) -> float:
        """Tokens per second."""
        batches = PackedBatches(examples, context, self.rows, seed=0)
        tokens = 0
        start = time.perf_counter()
        for step in range(steps):
            for row in range(self.rows):
                tokens += sum(len(examples[i].ids) for i in batches.row(step * self.rows + row))
            accumulate_packed_gradients(self.model, batches.at(step), 1)
            self.optimizer.step(1e-3)
        return tokens / (time.perf_counter() - start)


class TransformersTrainer:
    """A minimal training loop over transformers: bf16, eager mode, rows padded to the longest of their batch, AdamW."""

    def __init__(self, folder: ModelFolder, settings: TrainBenchSettings):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.bfloat16).train()
        if settings.lora:
            import peft

            lora = {"r": settings.lora, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            self.model = peft.get_peft_model(self.model, peft.LoraConfig(**lora))
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        self.rows = settings.batch

    def train(self, examples: list[TokenizedExample], context: int, steps: int) -> float:
        """Tokens per second."""
        endless_examples = itertools.cycle(examples)
        tokens = 0
        start = time.perf_counter()
        for _ in range(steps):
            ids, labels, mask = pad(list(itertools.islice(endless_examples, self.rows)))
            self.model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            tokens += int(mask.sum())
        return tokens / (time.perf_counter() - start)


def pad(examples: list[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, labels, attention mask), one example per row; labels are -100 where there is no loss."""
    shape = len(examples), max(len(example.ids) for example in examples)
    ids, labels, mask = torch.full(shape, 0), torch.full(shape, -100), torch.full(shape, 0)
    for row, example in enumerate(examples):
        example_ids = torch.tensor(example.ids)
        length = len(example_ids)
        ids[row, :length] = example_ids
        labels[row, :length] = torch.where(torch.tensor(example.loss_mask), example_ids, -100)
        mask[row, :length] = 1
    return ids, labels, mask


def command(settings: TrainBenchSettings) -> None:
    """Measure two workloads: rows full of text, and conversations of all lengths."""
    hardware.prepare()
    folder = open_model(settings.model)
    check_settings(settings, folder)
    nanoghost = NanoghostTrainer(folder, settings)
    systems = {"nanoghost": nanoghost}
    if requested_baselines(settings.against, folder, ["transformers"], ["peft"] if settings.lora else []):
        systems["transformers, bf16"] = TransformersTrainer(folder, settings)

    context = finetune_context(nanoghost.model.config.context)
    count = settings.batch * settings.steps
    texts = validation_texts(nanoghost.tokenizer, count, context)
    conversations = builtin_conversations("builtin", folder.card.root, folder.name, 40 * count, 0)
    random.Random(0).shuffle(conversations)
    conversation_examples, _ = tokenize_conversations(conversations, nanoghost.tokenizer, context)
    examples = {
        "text": [TokenizedExample(ids, [True] * context) for ids in texts],
        "conversations": conversation_examples,
    }

    limits = measure_limits()
    limit = limits.flops_per_second / nanoghost.model.flops_per_token(context)
    workloads = []
    for workload_name, workload_examples in examples.items():
        for system_name, system in systems.items():
            run = partial(system.train, workload_examples, context, settings.steps)
            workloads.append(Workload(system_name, workload_name, settings.batch, run, limit))
    measure_and_report(workloads, settings.rounds, settings.json, limits)


def check_settings(settings: TrainBenchSettings, folder: ModelFolder) -> None:
    if min(settings.batch, settings.steps, settings.rounds) < 1 or settings.lora < 0:
        raise UserError("--batch, --steps and --rounds must be at least 1, and --lora at least 0")
    if "@" in folder.name or (settings.lora and folder.card.arch == "ghost"):
        raise UserError(f"'{folder.name}' is not a complete model of the Llama family: choose another, or --lora 0")
