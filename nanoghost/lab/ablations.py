"""`nanoghost lab ledger`: what each part of the pretraining recipe is worth, in seconds on this computer.

Recipes (ablation_recipes.py) are trained from random weights in runs of at most 45 seconds. Learning rates are chosen
on the validation text with one seed; the figures are of the test text. There are three groups:

    cumulative      from a GPT-2 of 2019 to today's recipe, one addition at a time: seconds to the bits per byte at
                    which FIRST ends; from the middle of the list on, where that takes only a few steps, seconds to
                    those at which MIDDLE ends
    leave-one-out   today's recipe without one part: its time relative to today's recipe, to the bits per byte at which
                    it ends
    alternatives    today's recipe with one change: the same

What helps in half a minute may not help in four, and the reverse. `--steps` and `--depth` compare the last two groups
in longer runs, at the recipe's own learning rates, by the bits per byte of the validation text. Runs should be shorter
than an epoch: what `pretrain` does in later epochs (embedding-row dropout) is not part of these recipes.
"""

import json
import shlex
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nanoghost import hardware
from nanoghost.commands.arguments import select_names
from nanoghost.errors import UserError
from nanoghost.lab.ablation_recipes import SPEED_ONLY, Recipe, alternatives, cumulative, leave_one_out
from nanoghost.lab.ablation_report import LedgerFigures, print_tables, write_report
from nanoghost.lab.ablation_runs import DEFAULT_LENGTH, FIRST, LENGTHS, Runs
from nanoghost.progress import Display, JsonFlag

TODAY = "today"
MIDDLE = "+ NorMuon, cautious decay"  # its bits per byte are the second target, for the recipes from here on


@dataclass(frozen=True)
class LedgerSettings(JsonFlag):
    seeds: int = 3
    """Number of runs of each recipe and length."""
    recipes: str = ""
    """Comma-separated words; only recipes with one of them in the name are run. Default: all."""
    steps: int | None = None
    """Compare the leave-one-out recipes and the alternatives after this many steps instead."""
    depth: int | None = None
    """Number of layers with --steps. Default: as in the other runs."""
    data: str = "plays"
    """Training text, as in `pretrain`."""
    force: bool = False
    """Remove all stored runs and start again (not needed to resume after Ctrl-C)."""
    out: Path | None = None
    """Markdown file to write the tables to, with a figure of the same name (.svg)."""


def mean_and_spread(values: list[float]) -> dict:
    """Mean and standard deviation; a single value has no spread."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def cumulative_figures(runs: Runs, recipes: dict[str, Recipe], seeds: list[int]) -> tuple[list[float], dict[str, dict]]:
    """(the two targets in bits per byte, figures of each recipe).

    `seconds` of a recipe are its times to the targets: None if the target is not measured for the recipe, {} if a run
    of MAX_SECONDS is too short.
    """
    every_recipe = cumulative()
    names = list(every_recipe)
    previous = dict(zip(names[1:], names))
    figures = {}
    for name, recipe in recipes.items():
        length = runs.longest(name, recipe, DEFAULT_LENGTH)
        used_seeds = seeds[:1] if name in SPEED_ONLY else seeds
        figures[name] = {
            "previous": previous.get(name),
            "seconds": [None, None],
            "bpb": mean_and_spread([runs.at(name, recipe, length, seed)["bpb"] for seed in used_seeds]),
            "length": length,
            "seconds_per_token": runs.seconds_per_token(name, recipe),
            "lr_scale": runs.lr_scale(name, recipe),
        }
    middle = names.index(MIDDLE)
    targets = []
    for i, (target_name, max_tokens, measured_names) in enumerate(
        [(FIRST, LENGTHS[-1], names[: middle + 1]), (MIDDLE, DEFAULT_LENGTH, names[middle:])]
    ):
        target_recipe = every_recipe[target_name]
        length = runs.longest(target_name, target_recipe, max_tokens)
        targets.append(statistics.mean(runs.at(target_name, target_recipe, length, seed)["bpb"] for seed in seeds))
        for name in measured_names:
            if name not in recipes:
                continue
            learns_as = FIRST if name in SPEED_ONLY else name  # they differ in speed, not in what they learn
            if learns_as == target_name:
                tokens = [length]
            else:
                recipe = every_recipe[learns_as]
                longest = runs.longest(learns_as, recipe)
                tokens = [runs.tokens_to(targets[i], learns_as, recipe, seed, longest) for seed in seeds]
            seconds = {}
            if None not in tokens:
                seconds = mean_and_spread([n * figures[name]["seconds_per_token"] for n in tokens])
            figures[name]["seconds"][i] = seconds
    return targets, figures


def relative_figures(runs: Runs, recipes: dict[str, Recipe], seeds: list[int]) -> dict[str, dict]:
    """Time of each recipe relative to today's recipe, to the bits per byte at which the recipe ends."""
    today = list(cumulative().values())[-1]
    today_seconds = runs.seconds_per_token(TODAY, today)
    figures = {}
    for name, recipe in recipes.items():
        length = runs.longest(name, recipe, DEFAULT_LENGTH)
        results = [runs.at(name, recipe, length, seed) for seed in seeds]
        today_bpbs = [runs.at(TODAY, today, length, seed)["bpb"] for seed in seeds]
        today_tokens = [runs.tokens_to(result["bpb"], TODAY, today, seed) for result, seed in zip(results, seeds)]
        seconds_per_token = runs.seconds_per_token(name, recipe)
        relative_time = None
        if None not in today_tokens:
            relative_time = mean_and_spread(
                [r["tokens"] * seconds_per_token / (n * today_seconds) for r, n in zip(results, today_tokens)]
            )
        figures[name] = {
            "bpb": mean_and_spread([result["bpb"] for result in results]),
            "bpb_difference": mean_and_spread([r["bpb"] - bpb for r, bpb in zip(results, today_bpbs)]),
            "relative_time": relative_time,
            "length": length,
            "seconds_per_token": seconds_per_token,
            "lr_scale": runs.lr_scale(name, recipe),
        }
    return figures


def longer_run_figures(runs: Runs, recipes: dict[str, Recipe], seeds: list[int], steps: int) -> dict[str, dict]:
    """Bits per byte of the validation text after this many steps. `recipes` contains today's."""
    tokens = steps * recipes[TODAY].rows * recipes[TODAY].context
    bpbs = {
        name: [runs.run(name, recipe, tokens, 1.0, seed, "val")["bpb"] for seed in seeds]
        for name, recipe in recipes.items()
    }
    figures = {}
    for name, recipe in recipes.items():
        differences = [bpb - today for bpb, today in zip(bpbs[name], bpbs[TODAY])]
        figures[name] = {
            "bpb": mean_and_spread(bpbs[name]),
            "bpb_difference": mean_and_spread(differences),
            "seconds_per_token": runs.seconds_per_token(name, recipe),
        }
    return figures


def with_depth(recipes: dict[str, Recipe], depth: int) -> dict[str, Recipe]:
    """The recipes of today's size with another depth, except those whose heads do not divide the new width."""
    width, today = 64 * depth, recipes[TODAY]
    return {
        name: replace(recipe, depth=depth, width=width)
        for name, recipe in recipes.items()
        if (recipe.depth, recipe.width) == (today.depth, today.width) and width % recipe.head_width == 0
    }


def command(settings: LedgerSettings) -> None:
    hardware.prepare()
    for name in ("seeds", "steps", "depth"):
        if getattr(settings, name) is not None and getattr(settings, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if settings.depth and not settings.steps:
        raise UserError("--depth needs --steps: without it the depth is fixed")
    selected = select_names("--recipes", settings.recipes, [*cumulative(), *leave_one_out(), *alternatives()])
    runs = Runs(settings.data, Display())
    if settings.force:
        shutil.rmtree(runs.folder, ignore_errors=True)
    figures = measure(runs, settings, selected)
    print_tables(figures)
    if settings.out:
        write_report(settings.out, figures, shlex.join(["nanoghost", *sys.argv[1:]]))
    if settings.json:
        print(json.dumps(asdict(figures)))


def measure(runs: Runs, settings: LedgerSettings, selected: list[str]) -> LedgerFigures:
    def select(group: dict[str, Recipe]) -> dict[str, Recipe]:
        return {name: recipe for name, recipe in group.items() if name in selected}

    seeds = list(range(1, settings.seeds + 1))  # seed 0 chooses the learning rates
    every_recipe = cumulative()
    today = list(every_recipe.values())[-1]
    figures = LedgerFigures(runs.kneser_ney_bpb("val" if settings.steps else "test"))
    if settings.steps:
        recipes = {TODAY: today} | select(leave_one_out() | alternatives())
        recipes = with_depth(recipes, settings.depth or today.depth)
        runs.time_all(recipes)
        figures.longer_runs = longer_run_figures(runs, recipes, seeds, settings.steps)
        return figures
    references = {FIRST: every_recipe[FIRST], MIDDLE: every_recipe[MIDDLE], TODAY: today}
    runs.time_all(references | select(every_recipe | leave_one_out() | alternatives()))
    if select(every_recipe):
        figures.targets, figures.cumulative = cumulative_figures(runs, select(every_recipe), seeds)
    figures.leave_one_out = relative_figures(runs, select(leave_one_out()), seeds)
    figures.alternatives = relative_figures(runs, select(alternatives()), seeds)
    return figures
