"""Training runs of the ablations. Each run and each timing is made once, and its result is stored in a file.

The time to a target is the number of tokens to it times the seconds per token. The tokens are interpolated between runs
of different lengths. The seconds are measured beforehand, in rounds over all recipes, so that other work on the machine
during a run does not change a figure.

The files are in $NANOGHOST_HOME/lab/ledger: several commands share them, and after Ctrl-C the same command resumes. A
file is named after the recipe, not after the code; after a change of the code, --force starts again.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.data.registry import open_data_source
from nanoghost.data.token_dataset import TokenDataset
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.home import home, read_json, write_json
from nanoghost.lab.ablation_model import AblationModel
from nanoghost.lab.ablation_recipes import SPEED_ONLY, TOKENS_PER_STEP, Recipe, cumulative
from nanoghost.lab.ablation_training import AblationOptimizer, batch_shape, lr_multiplier, momentum, steps_for
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.tokenizer.tokenizer import Tokenizer
from nanoghost.train.pretrain import accumulate_gradients

# The recipes whose final bits per byte are the two targets of the cumulative group. The first is the recipe of 2019 at
# today's speed; the recipes of SPEED_ONLY take over its learning rate.
FIRST_REFERENCE = "+ chunked loss"
SECOND_REFERENCE = "+ NorMuon, cautious decay"

MAX_SECONDS = 45.0  # of a run
# Lengths of runs, in tokens
LENGTHS = tuple(TOKENS_PER_STEP * n for n in (6, 12, 24, 48, 96, 144, 192))
DEFAULT_LENGTH = TOKENS_PER_STEP * 96  # with half as many tokens the number of layers does not matter yet
TUNING_LENGTH = TOKENS_PER_STEP * 48  # of the runs that choose a learning rate
LONG_TUNING_LENGTH = TOKENS_PER_STEP * 192  # for FIRST_REFERENCE, which has hardly begun to learn after TUNING_LENGTH
LR_RATIO = 1.6  # between neighboring learning rates
TIMING_ROUNDS = 12
SHAPE_SAMPLES = 20  # points of a run at which its batch shape is looked up


def build_model(recipe: Recipe, tokenizer, lr_scale: float, seed: int) -> tuple[AblationModel, AblationOptimizer]:
    """(model, optimizer) with random weights."""
    torch.manual_seed(seed)
    model = AblationModel(recipe)
    model.set_character_features(tokenizer)
    model = model.cast(getattr(torch, recipe.dtype)).to(hardware.device())
    return model, AblationOptimizer(model, lr_scale)


def train_step(
    recipe: Recipe, model: AblationModel, optimizer: AblationOptimizer, batch, progress: float, ema: dict
) -> float:
    """One step; returns the loss. If the recipe averages the weights, `ema` is updated: bucket -> moving average."""
    loss = accumulate_gradients(model, *batch, len(batch[0]))
    optimizer.set_momentum(momentum(recipe, progress))
    optimizer.step(lr_multiplier(recipe, progress))
    if recipe.ema_decay:
        for key, bucket in optimizer.buckets.items():
            if key not in ema:
                ema[key] = bucket.master.clone()
            ema[key].lerp_(bucket.master, 1 - recipe.ema_decay)
    return loss


def train(
    recipe: Recipe,
    tokenizer,
    dataset: TokenDataset,
    tokens: int,
    lr_scale: float,
    seed: int,
    split: str,
    show_progress: Callable[[int, int, float], None],
) -> dict:
    """Train from random weights on about `tokens` tokens: {"bpb" of the text of `split`, "tokens"}.

    `show_progress` is called with (step, steps, loss) after each step.
    """
    model, optimizer = build_model(recipe, tokenizer, lr_scale, seed)
    steps = steps_for(recipe, tokens)
    trained_tokens = 0
    batches = {}  # batch shape -> Batches
    ema = {}
    for step in range(steps):
        progress = step / steps
        rows, context = batch_shape(recipe, progress)
        if (rows, context) not in batches:
            batches[rows, context] = dataset.batches(context, rows, seed)
        batch_index = round(trained_tokens / (rows * context))  # the text continues after a change of the shape
        batch = batches[rows, context].at(batch_index)
        loss = train_step(recipe, model, optimizer, batch, progress, ema)
        trained_tokens += rows * context
        show_progress(step, steps, loss)
    for key, average in ema.items():
        optimizer.buckets[key].params.copy_(average)
    bpb = bits_per_byte(model, dataset.tokens(split), recipe.context, dataset.bytes(split))
    return {"bpb": bpb, "tokens": trained_tokens}


def measure_seconds_per_token(recipe: Recipe, tokenizer, dataset: TokenDataset, steps: int = 6) -> float:
    """Seconds per token, averaged over the batch shapes of a run, at learning rate 0.

    The fastest of `steps` steps counts for each shape: other work on the machine only makes steps slower.
    """
    model, optimizer = build_model(recipe, tokenizer, lr_scale=0.0, seed=0)
    shapes = [batch_shape(recipe, i / SHAPE_SAMPLES) for i in range(SHAPE_SAMPLES)]  # most of them several times
    fastest, ema = {}, {}
    for rows, context in dict.fromkeys(shapes):
        batches = dataset.batches(context, rows, seed=0)
        times = []
        for step in range(steps):
            start = time.perf_counter()
            train_step(recipe, model, optimizer, batches.at(step), 0.5, ema)
            times.append(time.perf_counter() - start)
        fastest[rows, context] = min(times)
    return sum(fastest[shape] for shape in shapes) / sum(rows * context for rows, context in shapes)


class Runs:
    """Trains and times recipes on one text, and stores the results; chooses learning rates, interpolates tokens."""

    def __init__(self, data: str, display: Display):
        self.source, self.display = open_data_source(data), display
        self.folder = home() / "lab" / "ledger"
        # Caches that live as long as this object; the decorator on a method would make one for all objects
        self.tokenized = cache(self._tokenized)
        self.lr_scale = cache(self._lr_scale)
        self.seconds_per_token = cache(self._seconds_per_token)

    def _tokenized(self, vocab_size: int) -> tuple[Tokenizer, TokenDataset]:
        tokenizer = load_or_train_tokenizer(self.source, vocab_size, self.display.print, example_texts())
        return tokenizer, tokenize_source(self.source, tokenizer)

    def result_path(self, key: dict) -> Path:
        """The file for the result of what `key` describes. It contains the key and the result."""
        return self.folder / f"{sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"

    def kneser_ney_bpb(self, split: str) -> float:
        """Bits per byte of the n-gram baseline."""
        key = {"kneser_ney": self.source.fingerprint, "split": split}
        path = self.result_path(key)
        if not path.exists():
            self.display.print("n-gram baseline ...")
            texts = {part: [d.text for d in self.source.documents() if d.split == part] for part in ("train", split)}
            write_json(path, key | {"bpb": kneser_ney_bpb(texts["train"], texts[split])})
        return read_json(path)["bpb"]

    # -- training -----------------------------------------------------------------------------------------------------

    def run(self, name: str, recipe: Recipe, tokens: int, lr_scale: float, seed: int, split: str = "test") -> dict:
        """Train a recipe: {"bpb", "tokens"} and the key of the run."""
        tokenizer, dataset = self.tokenized(recipe.vocab_size)
        key = {
            "recipe": asdict(recipe),
            "tokens": tokens,
            "lr_scale": lr_scale,
            "seed": seed,
            "split": split,
            "data": dataset.manifest["source"],
        }
        path = self.result_path(key)
        if not path.exists():
            show_progress = partial(self.show_progress, f"{name}, seed {seed}")
            result = train(recipe, tokenizer, dataset, tokens, lr_scale, seed, split, show_progress)
            write_json(path, key | result)
        return read_json(path)

    def show_progress(self, task: str, step: int, steps: int, loss: float) -> None:
        self.display.show({"stage": "ledger", "task": task, "step": step, "steps": steps, "loss": loss})

    def _lr_scale(self, name: str, recipe: Recipe) -> float:
        """The multiplier on all learning rates that is best on the validation text with seed 0, by hill climbing."""
        if name in SPEED_ONLY:
            return self.lr_scale(FIRST_REFERENCE, cumulative()[FIRST_REFERENCE])
        length = LONG_TUNING_LENGTH if name == FIRST_REFERENCE else TUNING_LENGTH

        def bpb(power: int) -> float:
            return self.run(name, recipe, length, LR_RATIO**power, 0, "val")["bpb"]

        best_power = 0
        for direction in (1, -1):
            while bpb(best_power + direction) < bpb(best_power):
                best_power += direction
        return LR_RATIO**best_power

    def tuned_run(self, name: str, recipe: Recipe, tokens: int, seed: int) -> dict:
        """The run of this length at the best learning rate."""
        return self.run(name, recipe, tokens, self.lr_scale(name, recipe), seed)

    def tokens_to(
        self, bpb: float, name: str, recipe: Recipe, seed: int, max_tokens: int = LENGTHS[-1]
    ) -> float | None:
        """Tokens until this many bits per byte, interpolated between lengths; None if more than `max_tokens`."""
        lengths = [length for length in LENGTHS if length <= max_tokens]

        def bpb_after(i: int) -> float:
            return self.tuned_run(name, recipe, lengths[i], seed)["bpb"]

        # Find the longest run that does not reach the target. Start at the usual length, whose run exists already.
        last = len(lengths) - 1
        i = min(LENGTHS.index(DEFAULT_LENGTH), last)
        while i > 0 and bpb_after(i) <= bpb:
            i -= 1
        while i < last and bpb_after(i + 1) > bpb:
            i += 1
        if i == last:
            return None
        # Between two lengths, bits per byte are taken as linear in the logarithm of the tokens
        fraction = (bpb_after(i) - bpb) / (bpb_after(i) - bpb_after(i + 1))
        return math.exp(math.log(lengths[i]) + fraction * math.log(lengths[i + 1] / lengths[i]))

    # -- timing -------------------------------------------------------------------------------------------------------

    def time_all(self, recipes: dict[str, Recipe]) -> None:
        """Time all recipes in turn, so that a slow phase of the machine affects all of them."""
        for timing_round in range(TIMING_ROUNDS):
            for name, recipe in recipes.items():
                self.seconds_per_token_in_round(name, recipe, timing_round)

    def seconds_per_token_in_round(self, name: str, recipe: Recipe, timing_round: int) -> float:
        tokenizer, dataset = self.tokenized(recipe.vocab_size)
        key = {"timed": asdict(recipe), "round": timing_round}
        path = self.result_path(key)
        if not path.exists():
            self.display.print(f"timing {name}, round {timing_round + 1}")
            write_json(path, key | {"seconds": measure_seconds_per_token(recipe, tokenizer, dataset)})
        return read_json(path)["seconds"]

    def _seconds_per_token(self, name: str, recipe: Recipe) -> float:
        """Mean of the fastest third of the rounds; the minimum of all would depend on luck."""
        rounds = range(TIMING_ROUNDS)
        times = sorted(self.seconds_per_token_in_round(name, recipe, timing_round) for timing_round in rounds)
        return statistics.mean(times[: math.ceil(TIMING_ROUNDS / 3)])

    def longest_length(self, name: str, recipe: Recipe, max_tokens: int = LENGTHS[-1]) -> int:
        """The largest length of at most `max_tokens` that takes MAX_SECONDS or less; at least the shortest length."""
        seconds_per_token = self.seconds_per_token(name, recipe)
        lengths = [n for n in LENGTHS if n <= max_tokens and n * seconds_per_token <= MAX_SECONDS]
        return max(lengths, default=LENGTHS[0])
