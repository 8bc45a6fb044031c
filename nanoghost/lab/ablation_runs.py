"""Training runs of the ablations. Each run and each timing is made once and stored in a file.

The time to a target is a number of tokens times the seconds per token. The tokens are interpolated between runs of
different lengths; the seconds are measured beforehand, all recipes in turn. So no disturbance during a run changes a
figure, and several commands can share the runs.

A run is a file in $NANOGHOST_HOME/lab/ledger: Ctrl-C loses one run, and the same command resumes. The files do not
depend on the code: after a change of the recipe, --force removes them.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from hashlib import sha256

import torch

from nanoghost import hardware
from nanoghost.data.registry import open_data_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.home import home, read_json, write_json
from nanoghost.lab.ablation_model import AblationModel
from nanoghost.lab.ablation_recipes import SPEED_ONLY, TOKENS_PER_STEP, Recipe, cumulative
from nanoghost.lab.ablation_training import AblationOptimizer, batch_shape, lr_multiplier, momentum, steps_for
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train.pretrain import accumulate_gradients

FIRST = (
    "+ chunked loss"  # the recipe of 2019 at today's speed: it starts the comparison, and its learning rate is theirs
)
MAX_SECONDS = 45.0  # of a run
LENGTHS = tuple(TOKENS_PER_STEP * n for n in (6, 12, 24, 48, 96, 144, 192))  # tokens of the runs
DEFAULT_LENGTH = TOKENS_PER_STEP * 96  # with half as many tokens the number of layers does not matter yet
TUNING_LENGTH = TOKENS_PER_STEP * 48  # of the runs that choose a learning rate
TUNING_LENGTH_FIRST = TOKENS_PER_STEP * 192  # the same for FIRST, which has hardly begun to learn after TUNING_LENGTH
LR_RATIO = 1.6  # between neighboring learning rates
TIMING_ROUNDS = 12


def build(recipe: Recipe, tokenizer, lr_scale: float, seed: int) -> tuple[AblationModel, AblationOptimizer]:
    torch.manual_seed(seed)
    model = AblationModel(recipe)
    model.set_character_features(tokenizer)
    model = model.cast(getattr(torch, recipe.dtype)).to(hardware.device())
    return model, AblationOptimizer(model, lr_scale)


def train_step(recipe: Recipe, model, optimizer, batch, progress: float, ema: dict) -> float:
    """One step; returns the loss. `ema` holds the moving average of the weights, if the recipe has one."""
    loss = accumulate_gradients(model, *batch, len(batch[0]))
    optimizer.set_momentum(momentum(recipe, progress))
    optimizer.step(lr_multiplier(recipe, progress))
    if recipe.ema_decay:
        for key, bucket in optimizer.buckets.items():
            if key not in ema:
                ema[key] = bucket.master.clone()
            ema[key].lerp_(bucket.master, 1 - recipe.ema_decay)
    return loss


def train(recipe: Recipe, tokenizer, dataset, tokens: int, lr_scale: float, seed: int, split: str, show) -> dict:
    """A run from random weights: {"bpb" of the held-out split, "tokens"}."""
    model, optimizer = build(recipe, tokenizer, lr_scale, seed)
    steps = steps_for(recipe, tokens)
    batches, trained_tokens, ema = {}, 0, {}
    for step in range(steps):
        progress = step / steps
        rows, context = batch_shape(recipe, progress)
        if (rows, context) not in batches:
            batches[rows, context] = dataset.batches(context, rows, seed)
        batch = batches[rows, context].at(round(trained_tokens / (rows * context)))
        loss = train_step(recipe, model, optimizer, batch, progress, ema)
        trained_tokens += rows * context
        show(step, steps, loss)
    for key, average in ema.items():
        optimizer.buckets[key].params.copy_(average)
    bpb = bits_per_byte(model, dataset.tokens(split), recipe.context, dataset.bytes(split))
    return {"bpb": bpb, "tokens": trained_tokens}


def measure_seconds_per_token(recipe: Recipe, tokenizer, dataset, steps: int = 6) -> float:
    """The fastest of some steps of each batch shape, at learning rate 0: disturbances only make steps slower."""
    model, optimizer = build(recipe, tokenizer, 0.0, 0)
    shapes = [batch_shape(recipe, i / 20) for i in range(20)]  # over the run, with repetitions
    fastest, ema = {}, {}
    for rows, context in dict.fromkeys(shapes):
        batches, times = dataset.batches(context, rows, 0), []
        for step in range(steps):
            start = time.perf_counter()
            train_step(recipe, model, optimizer, batches.at(step), 0.5, ema)
            times.append(time.perf_counter() - start)
        fastest[rows, context] = min(times)
    return sum(fastest[shape] for shape in shapes) / sum(rows * context for rows, context in shapes)


class Runs:
    """Runs by recipe, length and seed, and what follows from them."""

    def __init__(self, data: str, display: Display):
        self.source, self.display = open_data_source(data), display
        self.folder = home() / "lab" / "ledger"
        self.tokenized = cache(self._tokenized)
        self.lr_scale = cache(self._lr_scale)
        self.seconds_per_token = cache(self._seconds_per_token)

    def _tokenized(self, vocab_size: int):
        """(tokenizer, dataset)"""
        tokenizer = load_or_train_tokenizer(self.source, vocab_size, self.display.print, example_texts())
        return tokenizer, tokenize_source(self.source, tokenizer)

    def stored(self, key: dict, compute: Callable[[], dict]) -> dict:
        """The result with this key from its file, or computed and stored."""
        path = self.folder / f"{sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
        if not path.exists():
            write_json(path, key | compute())
        return read_json(path)

    def kneser_ney_bpb(self, split: str) -> float:
        """Bits per byte of the n-gram baseline."""

        def compute() -> dict:
            self.display.print("n-gram baseline ...")
            texts = {part: [d.text for d in self.source.documents() if d.split == part] for part in ("train", split)}
            return {"bpb": kneser_ney_bpb(texts["train"], texts[split])}

        return self.stored({"kneser_ney": self.source.fingerprint, "split": split}, compute)["bpb"]

    def run(self, name: str, recipe: Recipe, tokens: int, lr_scale: float, seed: int, split: str = "test") -> dict:
        tokenizer, dataset = self.tokenized(recipe.vocab_size)

        def show(step: int, steps: int, loss: float) -> None:
            event = {"stage": "ledger", "task": f"{name}, seed {seed}", "step": step, "steps": steps, "loss": loss}
            self.display.show(event)

        def compute() -> dict:
            return train(recipe, tokenizer, dataset, tokens, lr_scale, seed, split, show)

        key = {
            "recipe": asdict(recipe),
            "tokens": tokens,
            "lr_scale": lr_scale,
            "seed": seed,
            "split": split,
            "data": dataset.manifest["source"],
        }
        return self.stored(key, compute)

    def time_all(self, recipes: dict[str, Recipe]) -> None:
        """Time all recipes in turn, so that a slow phase of the machine affects all of them."""
        for timing_round in range(TIMING_ROUNDS):
            for name, recipe in recipes.items():
                self.time(name, recipe, timing_round)

    def time(self, name: str, recipe: Recipe, timing_round: int) -> float:
        """Seconds per token in one round."""
        tokenizer, dataset = self.tokenized(recipe.vocab_size)

        def compute() -> dict:
            self.display.print(f"timing {name}, round {timing_round + 1}")
            return {"seconds": measure_seconds_per_token(recipe, tokenizer, dataset)}

        return self.stored({"timed": asdict(recipe), "round": timing_round}, compute)["seconds"]

    def _seconds_per_token(self, name: str, recipe: Recipe) -> float:
        """Mean of the fastest third of the rounds; the minimum of all would depend on luck."""
        times = sorted(self.time(name, recipe, timing_round) for timing_round in range(TIMING_ROUNDS))
        return statistics.mean(times[: math.ceil(TIMING_ROUNDS / 3)])

    def _lr_scale(self, name: str, recipe: Recipe) -> float:
        """The multiplier on all learning rates that is best on the validation text with seed 0, by hill climbing."""
        if name in SPEED_ONLY:
            return self.lr_scale(FIRST, cumulative()[FIRST])
        length = TUNING_LENGTH_FIRST if name == FIRST else TUNING_LENGTH

        def bpb(power: int) -> float:
            return self.run(name, recipe, length, LR_RATIO**power, 0, "val")["bpb"]

        best = 0
        for direction in (1, -1):
            while bpb(best + direction) < bpb(best):
                best += direction
        return LR_RATIO**best

    def at(self, name: str, recipe: Recipe, tokens: int, seed: int) -> dict:
        """The run of this length at the best learning rate."""
        return self.run(name, recipe, tokens, self.lr_scale(name, recipe), seed)

    def longest(self, name: str, recipe: Recipe, max_tokens: int = LENGTHS[-1]) -> int:
        """The largest length of at most `max_tokens` that takes MAX_SECONDS or less; at least the shortest length."""
        seconds_per_token = self.seconds_per_token(name, recipe)
        lengths = [n for n in LENGTHS if n <= max_tokens and n * seconds_per_token <= MAX_SECONDS]
        return max(lengths, default=LENGTHS[0])

    def tokens_to(
        self, bpb: float, name: str, recipe: Recipe, seed: int, max_tokens: int = LENGTHS[-1]
    ) -> float | None:
        """Tokens until this many bits per byte, interpolated between lengths; None if more than `max_tokens`."""
        lengths = [n for n in LENGTHS if n <= max_tokens]
        i = min(LENGTHS.index(DEFAULT_LENGTH), len(lengths) - 1)
        while i > 0 and self.at(name, recipe, lengths[i], seed)["bpb"] <= bpb:
            i -= 1
        while i < len(lengths) - 1 and self.at(name, recipe, lengths[i + 1], seed)["bpb"] > bpb:
            i += 1
        if i == len(lengths) - 1:
            return None
        shorter, longer = lengths[i], lengths[i + 1]
        bpb_shorter, bpb_longer = (self.at(name, recipe, length, seed)["bpb"] for length in (shorter, longer))
        fraction = (bpb_shorter - bpb) / (bpb_shorter - bpb_longer)
        return math.exp(math.log(shorter) + fraction * math.log(longer / shorter))
