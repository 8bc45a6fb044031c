"""`nanoghost lab ledger`: what each part of the recipe is worth, in seconds on this computer.

Every rung (ablation_model.py) learns from the start, in runs of 45 seconds or less (today's recipe, the yardstick, up to LENGTHS' end); its
learning rate is chosen on the validation text with one seed, what is told is of the test text. Three groups:

    the ladder   from a GPT-2 of 2019 to today's recipe, a part at a time: how long until the bits per byte at which the first
                 rung ends, and where that takes a few steps only, until those of the rung at half height
    left out     today's recipe without one part each, and how much sooner the whole recipe is where that ends ("off the scale": LENGTHS
                 do not go so far)
    tried        today's recipe with something else: the same

What pays in half a minute may not in four, and the other way round: `--steps` and `--depth` ask the last two groups again in longer
runs, at the recipe's own learning rates, judged on the validation text. They are for one epoch or less: what `pretrain` does about
later ones is not done here.

Time is tokens (by interpolation over the logarithm of the lengths of two runs) times the seconds that the rung takes for one, which
are measured beforehand, all rungs in turn: so whatever disturbs a run changes no figure, and several commands may share the runs.
A run is a file in $NANOGHOST_HOME/lab/ledger: Ctrl-C loses one run, and the same command goes on. Files do not know the code that made
them: after a change of the recipe, --force (once) forgets them.
"""

import json
import math
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.commands.arguments import select_names
from nanoghost.data.registry import open_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.errors import UserError
from nanoghost.evals.bits_per_byte import bits_per_byte
from nanoghost.evals.kneser_ney import kneser_ney_bpb
from nanoghost.home import home, read_json, write_json
from nanoghost.lab.ablation_model import AblationModel
from nanoghost.lab.ablation_recipes import SPEED_ONLY, TOKENS_PER_STEP, Recipe, alternatives, cumulative, leave_one_out
from nanoghost.lab.ablation_report import tell, write
from nanoghost.lab.ablation_training import AblationOptimizer, batch_shape, lr_multiplier, momentum, steps_for
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train.pretrain import accumulate_gradients

TODAY = "today"
FIRST = "+ chunked loss"  # what a step teaches is as in 2019, and it is as fast as today
HALF = "+ NorMuon, cautious decay"  # where it ends is the second mark, for the rungs from there on
LONGEST = 45.0  # seconds of a run
LENGTHS = tuple(TOKENS_PER_STEP * n for n in (6, 12, 24, 48, 96, 144, 192))  # in tokens
LENGTH = TOKENS_PER_STEP * 96  # of what is left out or tried: after half of that, layers do not matter yet
TUNING = TOKENS_PER_STEP * 48  # to choose a learning rate
SLOW = TOKENS_PER_STEP * 192  # to choose a learning rate for FIRST, which has hardly begun to learn after TUNING
RATIO = 1.6  # between learning rates that are tried
ROUNDS = 12  # times that the steps of all rungs are timed, in turn


@dataclass(frozen=True)
class LedgerSettings:
    seeds: int = 3
    """Runs of each rung and length."""
    rungs: str = ""
    """Only those whose name has one of these words in it, with commas between; default: all."""
    steps: int | None = None
    """Ask again what is left out and what is tried, after so many steps."""
    depth: int | None = None
    """Layers, where --steps asks again; default: as many as elsewhere."""
    data: str = "plays"
    """Text to learn, as in `pretrain`."""
    force: bool = False
    """Forget all runs that are kept, and begin again; after Ctrl-C go on without it."""
    out: Path | None = None
    """Write the tables into this file too, and the picture beside it."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def made(rung: Recipe, tokenizer, scale: float, seed: int) -> tuple[AblationModel, AblationOptimizer]:
    torch.manual_seed(seed)
    model = AblationModel(rung)
    model.set_character_features(tokenizer)
    model = model.cast(getattr(torch, rung.dtype)).to(hardware.device())
    return model, AblationOptimizer(model, scale)


def teach(rung: Recipe, model, optimizer, batch, progress: float, average: dict) -> float:
    """One step; its loss. `average` is that of the weights, if the rung has one."""
    loss = accumulate_gradients(model, *batch, len(batch[0]))
    optimizer.set_momentum(momentum(rung, progress))
    optimizer.step(lr_multiplier(rung, progress))
    if rung.ema_decay:
        for key, bucket in optimizer.buckets.items():
            if key not in average:
                average[key] = bucket.master.clone()
            average[key].lerp_(bucket.master, 1 - rung.ema_decay)
    return loss


def train(rung: Recipe, tokenizer, shards, tokens: int, scale: float, seed: int, split: str, show) -> dict:
    """One run from the start: bits per byte of the held-out text."""
    model, optimizer = made(rung, tokenizer, scale, seed)
    steps = steps_for(rung, tokens)
    batches, read, average = {}, 0, {}
    for step in range(steps):
        progress = step / steps
        rows, context = batch_shape(rung, progress)
        if (rows, context) not in batches:
            batches[rows, context] = shards.batches(context, rows, seed)
        loss = teach(
            rung, model, optimizer, batches[rows, context].at(round(read / (rows * context))), progress, average
        )
        read += rows * context
        show(step, steps, loss)
    for key in average:
        optimizer.buckets[key].params.copy_(average[key])
    return {"bpb": bits_per_byte(model, shards.tokens(split), rung.context, shards.bytes(split)), "tokens": read}


def seconds_a_token(rung: Recipe, tokenizer, shards, steps: int = 6) -> float:
    """Where nothing is learned: the fastest of a few steps of each size that the rung has, since whatever disturbs makes them slower."""
    model, optimizer = made(rung, tokenizer, 0.0, 0)
    sizes = [batch_shape(rung, i / 20) for i in range(20)]
    times, average = {}, {}
    for rows, context in dict.fromkeys(sizes):
        batches, found = shards.batches(context, rows, 0), []
        for step in range(steps):
            start = time.perf_counter()
            teach(rung, model, optimizer, batches.at(step), 0.5, average)
            found.append(time.perf_counter() - start)
        times[rows, context] = min(found)
    return sum(times[size] for size in sizes) / sum(rows * context for rows, context in sizes)


class Runs:
    """Runs by rung, length, seed, and what follows from them; each is made once and kept in a file."""

    def __init__(self, data: str, display: Display):
        self.source, self.display = open_source(data), display
        self.folder = home() / "lab" / "ledger"
        self.text = cache(self._text)
        self.scale = cache(self._scale)
        self.rate = cache(self._rate)

    def _text(self, vocab_size: int):
        tokenizer = load_or_train_tokenizer(self.source, vocab_size, self.display.print, example_texts())
        return tokenizer, tokenize_source(self.source, tokenizer)

    def kept(self, what: dict, make) -> dict:
        """What was made before, or is made now."""
        path = self.folder / f"{sha256(json.dumps(what).encode()).hexdigest()[:20]}.json"
        if not path.exists():
            write_json(path, what | make())
        return read_json(path)

    def counting(self, split: str) -> float:
        """What counting bytes reaches, the floor of every table."""

        def make():
            self.display.print("counting bytes ...")
            texts = {part: [d.text for d in self.source.documents() if d.split == part] for part in ("train", split)}
            return {"bpb": kneser_ney_bpb(texts["train"], texts[split])}

        return self.kept({"counted": self.source.fingerprint, "split": split}, make)["bpb"]

    def run(self, name: str, rung: Recipe, tokens: int, scale: float, seed: int, split: str = "test") -> dict:
        tokenizer, shards = self.text(rung.vocab_size)

        def show(step, steps, loss):
            self.display(
                {"stage": "ledger", "task": f"{name}, seed {seed}", "step": step, "steps": steps, "loss": loss}
            )

        what = {
            "rung": asdict(rung),
            "tokens": tokens,
            "scale": scale,
            "seed": seed,
            "split": split,
            "data": shards.manifest["source"],
        }
        return self.kept(what, lambda: train(rung, tokenizer, shards, tokens, scale, seed, split, show))

    def time_all(self, asked: dict[str, Recipe]) -> None:
        """Take the times of all these rungs, in turn, so that a slow hour is slow for all."""
        for turn in range(ROUNDS):
            for name, rung in asked.items():
                self.time(name, rung, turn)

    def time(self, name: str, rung: Recipe, turn: int) -> float:
        tokenizer, shards = self.text(rung.vocab_size)

        def make():
            self.display.print(f"timing {name}, round {turn + 1}")
            return {"seconds": seconds_a_token(rung, tokenizer, shards)}

        return self.kept({"timed": asdict(rung), "round": turn}, make)["seconds"]

    def _rate(self, name: str, rung: Recipe) -> float:
        """Seconds a token, the mean of the fastest third of the rounds: one single round may have had luck."""
        return statistics.mean(sorted(self.time(name, rung, turn) for turn in range(ROUNDS))[: math.ceil(ROUNDS / 3)])

    def _scale(self, name: str, rung: Recipe) -> float:
        """The factor on all learning rates that is best on the validation text, seed 0; neighbours of the best were tried."""
        if name in SPEED_ONLY:
            return self.scale(FIRST, cumulative()[FIRST])

        def bpb(power: int) -> float:
            return self.run(name, rung, SLOW if name == FIRST else TUNING, RATIO**power, 0, "val")["bpb"]

        best = 0
        for direction in (1, -1):
            while bpb(best + direction) < bpb(best):
                best += direction
        return RATIO**best

    def at(self, name: str, rung: Recipe, tokens: int, seed: int) -> dict:
        return self.run(name, rung, tokens, self.scale(name, rung), seed)

    def longest(self, name: str, rung: Recipe, most: int = LENGTHS[-1]) -> int:
        """The largest length of at most `most` tokens that takes LONGEST or less."""
        return max(n for n in LENGTHS if n <= most and (n == LENGTHS[0] or n * self.rate(name, rung) <= LONGEST))

    def tokens_to(self, bpb: float, name: str, rung: Recipe, seed: int, most: int = LENGTHS[-1]) -> float | None:
        """Tokens until this many bits per byte, between two lengths; None if it takes more than `most`."""
        fits = [n for n in LENGTHS if n <= most]
        i = min(LENGTHS.index(LENGTH), len(fits) - 1)
        while i > 0 and self.at(name, rung, fits[i], seed)["bpb"] <= bpb:
            i -= 1
        while i < len(fits) - 1 and self.at(name, rung, fits[i + 1], seed)["bpb"] > bpb:
            i += 1
        if i == len(fits) - 1:
            return None
        low, high = (self.at(name, rung, n, seed)["bpb"] for n in fits[i : i + 2])
        return math.exp(math.log(fits[i]) + (low - bpb) / (low - high) * math.log(fits[i + 1] / fits[i]))


# ── what follows ────────────────────────────────────────────────────────────────────────────────────────────────────


def mean_and_spread(values: list[float]) -> dict:
    """Of one value there is no spread."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def climbed(runs: Runs, asked: dict[str, Recipe], seeds: list[int]) -> tuple[list[float], dict[str, dict]]:
    """(the two marks in bits per byte, figures of each rung of the ladder; its seconds to a mark that is not its own are None, {} if LONGEST is too short)."""
    whole, marks, found = cumulative(), [], {}
    before = dict(zip(list(whole)[1:], whole))
    for name, rung in asked.items():
        length = runs.longest(name, rung, LENGTH)
        some = seeds[:1] if name in SPEED_ONLY else seeds
        bpb = mean_and_spread([runs.at(name, rung, length, seed)["bpb"] for seed in some])
        found[name] = {
            "before": before.get(name), "seconds": [None, None], "bpb": bpb, "length": length,
            "rate": runs.rate(name, rung), "scale": runs.scale(name, rung),
        }  # fmt: skip
    half = list(whole).index(HALF)
    for i, (mark, most, names) in enumerate(
        ((FIRST, LENGTHS[-1], list(whole)[: half + 1]), (HALF, LENGTH, list(whole)[half:]))
    ):
        length = runs.longest(mark, whole[mark], most)
        marks.append(statistics.mean(runs.at(mark, whole[mark], length, seed)["bpb"] for seed in seeds))
        for name in (name for name in names if name in asked):
            of = FIRST if name in SPEED_ONLY else name  # what a step teaches is the same: only its time is measured
            if of == mark:
                tokens = [length]
            else:
                most = runs.longest(of, whole[of])
                tokens = [runs.tokens_to(marks[i], of, whole[of], seed, most) for seed in seeds]
            found[name]["seconds"][i] = (
                mean_and_spread([n * found[name]["rate"] for n in tokens]) if None not in tokens else {}
            )
    return marks, found


def compared(runs: Runs, asked: dict[str, Recipe], seeds: list[int]) -> dict[str, dict]:
    """How many times as long each takes as today's recipe, to where it ends."""
    today, found = list(cumulative().values())[-1], {}
    for name, rung in asked.items():
        length = runs.longest(name, rung, LENGTH)
        ends = [runs.at(name, rung, length, seed) for seed in seeds]
        same = [runs.at(TODAY, today, length, seed)["bpb"] for seed in seeds]
        tokens = [runs.tokens_to(end["bpb"], TODAY, today, seed) for end, seed in zip(ends, seeds)]
        ours, its = runs.rate(TODAY, today), runs.rate(name, rung)
        found[name] = {
            "bpb": mean_and_spread([end["bpb"] for end in ends]), "more_bpb": mean_and_spread([e["bpb"] - b for e, b in zip(ends, same)]),
            "times": mean_and_spread([end["tokens"] * its / (n * ours) for end, n in zip(ends, tokens)]) if None not in tokens else None,
            "length": length, "rate": its, "scale": runs.scale(name, rung),
        }  # fmt: skip
    return found


def asked_again(runs: Runs, asked: dict[str, Recipe], seeds: list[int], steps: int) -> dict[str, dict]:
    """Bits per byte of the validation text after this many steps, and how much less today's recipe has; the first of `asked`."""
    tokens = steps * asked[TODAY].rows * asked[TODAY].context
    ends = {
        name: [runs.run(name, rung, tokens, 1.0, seed, "val")["bpb"] for seed in seeds] for name, rung in asked.items()
    }
    return {
        name: {
            "bpb": mean_and_spread(ends[name]), "more_bpb": mean_and_spread([b - t for b, t in zip(ends[name], ends[TODAY])]),
            "rate": runs.rate(name, rung),
        }
        for name, rung in asked.items()
    }  # fmt: skip


def resized(asked: dict[str, Recipe], depth: int) -> dict[str, Recipe]:
    """With other layers, those that are as large as today's recipe and whose heads fit."""
    width, today = 64 * depth, asked[TODAY]
    return {
        name: replace(rung, depth=depth, width=width) for name, rung in asked.items()
        if (rung.depth, rung.width) == (today.depth, today.width) and width % rung.head_width == 0
    }  # fmt: skip


def command(settings: LedgerSettings) -> None:
    hardware.prepare()
    for name in ("seeds", "steps", "depth"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if settings.depth and not settings.steps:
        raise UserError("--depth is for --steps: the ledger itself has a size of its own")
    chosen = select_names("--rungs", settings.rungs, [*cumulative(), *leave_one_out(), *alternatives()])

    def asked(group: dict[str, Recipe]) -> dict[str, Recipe]:
        return {name: rung for name, rung in group.items() if name in chosen}

    runs, seeds = Runs(settings.data, Display()), list(range(1, settings.seeds + 1))  # seed 0 chose the learning rates
    if settings.force:
        shutil.rmtree(runs.folder, ignore_errors=True)
    counted = runs.counting("val" if settings.steps else "test")
    whole, figures = (
        cumulative(),
        {"marks": [], "ladder": {}, "left_out": {}, "tried": {}, "again": {}, "counting": counted},
    )
    today = list(whole.values())[-1]
    if settings.steps:
        larger = resized({TODAY: today} | asked(leave_one_out() | alternatives()), settings.depth or today.depth)
        runs.time_all(larger)
        figures["again"] = asked_again(runs, larger, seeds, settings.steps)
    else:
        runs.time_all(
            {FIRST: whole[FIRST], HALF: whole[HALF], TODAY: today} | asked(whole | leave_one_out() | alternatives())
        )
        if asked(whole):
            figures["marks"], figures["ladder"] = climbed(runs, asked(whole), seeds)
        figures["left_out"], figures["tried"] = (
            compared(runs, asked(group), seeds) for group in (leave_one_out(), alternatives())
        )
    tell(figures)
    if settings.out:
        write(settings.out, figures, shlex.join(["nanoghost", *sys.argv[1:]]))
    if settings.json:
        print(json.dumps(figures))
