"""`nanoghost bench train`: how fast finetuning is here, beside what arithmetic allows and a plain loop over transformers.

A token counts once, whether or not something is learned from it; padding does not count.
"""

import importlib
import itertools
import random
import time
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from nanoghost import hardware
from nanoghost.bench.table import limits, peers, tell, texts
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, open_model
from nanoghost.model.lora import attach_adapters, new_adapter
from nanoghost.optim.optimizer import Optimizer
from nanoghost.tasks.sft_mix import builtin_conversations
from nanoghost.train.hyperparameters import finetune_context, finetune_groups
from nanoghost.train.packing import PackedBatches, TokenizedExample, tokenize_conversations
from nanoghost.train.sft import accumulate_packed_gradients


@dataclass(frozen=True)
class TrainSettings:
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the model; default: the one finished last."""
    lora: int = 0
    """Rank of the adapter that is trained; 0 trains the whole model."""
    batch: int = 8
    """Rows in a step."""
    steps: int = 4
    """Steps in a measurement."""
    rounds: int = 3
    """Times that everything is measured."""
    against: str = ""
    """transformers: a plain loop over it, with peft for adapters, measured in turn with us."""
    json: bool = False
    """Print the figures as JSON on standard output."""


class Ours:
    def __init__(self, folder: ModelFolder, settings: TrainSettings):
        base = folder.card.root
        self.model, _ = load_model(folder.path, hardware.compute_dtype())
        if settings.lora:
            attach_adapters(self.model, [new_adapter(self.model, settings.lora, None, None, 0)])
        rates = finetune_groups(base, self.model.config.width, 1.0)
        self.optimizer = Optimizer(self.model, rates, hardware.compute_dtype(), 0, 1)
        self.rows = settings.batch

    def train(self, lessons: list[TokenizedExample], context: int, steps: int) -> float:
        """Tokens a second."""
        batches = PackedBatches(lessons, context, self.rows, seed=0)
        start, tokens = time.perf_counter(), 0
        for step in range(steps):
            tokens += sum(len(lessons[i].ids) for row in range(self.rows) for i in batches.row(step * self.rows + row))
            accumulate_packed_gradients(self.model, batches.at(step), 1)
            self.optimizer.step(1e-3)
        return tokens / (time.perf_counter() - start)


class Transformers:
    """The loop that people write first: bf16, eager, rows padded to the longest of their batch, AdamW."""

    def __init__(self, folder: ModelFolder, settings: TrainSettings):
        auto = importlib.import_module("transformers").AutoModelForCausalLM
        self.model = auto.from_pretrained(folder.path, dtype=torch.bfloat16).train()
        if settings.lora:
            peft = importlib.import_module("peft")
            adapter = peft.LoraConfig(
                r=settings.lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self.model = peft.get_peft_model(self.model, adapter)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6)
        self.rows = settings.batch

    def train(self, lessons: list[TokenizedExample], context: int, steps: int) -> float:
        endless = itertools.cycle(lessons)
        start, tokens = time.perf_counter(), 0
        for _ in range(steps):
            rows = list(itertools.islice(endless, self.rows))
            longest = max(len(lesson.ids) for lesson in rows)
            ids, labels, there = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
            for i, lesson in enumerate(rows):
                own = torch.tensor(lesson.ids)
                ids[i, : len(own)], there[i, : len(own)] = own, 1
                labels[i, : len(own)] = torch.where(torch.tensor(lesson.loss_mask), own, -100)
            self.model(input_ids=ids, attention_mask=there, labels=labels).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            tokens += int(there.sum())
        return tokens / (time.perf_counter() - start)


def train(settings: TrainSettings) -> None:
    """Finetuning, on rows that are full of text and on conversations of all lengths."""
    hardware.prepare()
    folder = open_model(settings.model)
    if min(settings.batch, settings.steps, settings.rounds) < 1 or settings.lora < 0:
        raise UserError("--batch, --steps and --rounds are at least 1, and --lora not negative")
    if "@" in folder.name or (settings.lora and folder.card.arch == "ghost"):
        raise UserError(f"--lora is for whole models of the Llama family, and '{folder.name}' is none: --lora 0")
    rivals = {"nanoghost": Ours(folder, settings)}
    if peers(settings.against, folder, ["transformers"], ["peft"] if settings.lora else []):
        rivals["transformers, bf16"] = Transformers(folder, settings)

    ours, tokenizer = rivals["nanoghost"].model, load_model(folder.path, hardware.compute_dtype())[1]
    context = finetune_context(ours.config.context)
    needed = settings.batch * settings.steps
    text = [TokenizedExample(ids, [True] * context) for ids in texts(tokenizer, needed, context)]
    conversations = builtin_conversations("builtin", folder.card.root, folder.name, 40 * needed, 0)
    random.Random(0).shuffle(conversations)
    lessons, _ = tokenize_conversations(conversations, tokenizer, context)
    works = [
        (name, work, settings.batch, lambda rival=rival, of=of: rival.train(of, context, settings.steps))
        for work, of in (("text", text), ("conversations", lessons))
        for name, rival in rivals.items()
    ]
    measured = limits()
    operations = ours.flops_per_token(context)
    tell(settings, measured, works, lambda *_: measured["matrix_gflops_per_second"] * 1e9 / operations)
