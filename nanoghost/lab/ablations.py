"""`nanoghost lab ledger`: what each part of the pretraining recipe is worth, in seconds on this computer.

Recipes (ablation_recipes.py) are trained from random weights in runs of at most 45 seconds. Learning rates are chosen
on the validation text with one seed; the figures are of the test text. There are three groups:

    cumulative      from a GPT-2 of 2019 to today's recipe, one addition at a time: seconds to a target in bits per byte
    leave-one-out   today's recipe without one part: the time to its final bits per byte, divided by the time in which
                    today's recipe reaches them
    alternatives    today's recipe with one change: the same

The cumulative group has two targets, because better recipes reach the first one in a few steps. Each is what a
reference recipe reaches at the end of its run; the second is for the recipes from the second reference on.

What helps in half a minute may not help in four, and the reverse. `--steps` and `--depth` compare the last two groups
in longer runs, at the learning rates of `pretrain`, by the bits per byte of the validation text. Runs should be shorter
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
from nanoghost.lab.ablation_runs import DEFAULT_LENGTH, FIRST_REFERENCE, LENGTHS, SECOND_REFERENCE, Runs
from nanoghost.progress import Display, JsonFlag

TODAY = "today"  # name of today's recipe in the last two groups


@dataclass(frozen=True)
class LedgerSettings(JsonFlag):
    seeds: int = 3
    """Number of runs of each recipe and length."""
    recipes: str = ""
    """Comma-separated words: run only recipes whose name contains one of them. Default: all."""
    steps: int | None = None
    """Only compare the leave-one-out recipes and the alternatives, after this many steps."""
    depth: int | None = None
    """Number of layers with --steps. Default: as in the other runs."""
    data: str = "plays"
    """Training text, as in `pretrain`."""
    force: bool = False
    """Remove all stored runs and start again (not needed to resume after Ctrl-C)."""
    out: Path | None = None
    """Markdown file to write the tables to, with a figure of the same name (.svg)."""


def todays_recipe() -> Recipe:
    return list(cumulative().values())[-1]


def mean_and_spread(values: list[float]) -> dict:
    """Mean and standard deviation; the latter is None for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "spread": spread}


# -- cumulative -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The bits per byte that a reference recipe reaches."""

    reference: str
    """Name of the reference recipe."""
    tokens: int
    """Length of its run."""
    bpb: float
    """Mean over the seeds."""


def reference_target(runs: Runs, reference: str, max_tokens: int, seeds: list[int]) -> Target:
    """Train the reference recipe for at most `max_tokens` and MAX_SECONDS."""
    recipe = cumulative()[reference]
    tokens = runs.longest_length(reference, recipe, max_tokens)
    bpbs = [runs.tuned_run(reference, recipe, tokens, seed)["bpb"] for seed in seeds]
    return Target(reference, tokens, statistics.mean(bpbs))


def seconds_to_target(runs: Runs, name: str, target: Target, seeds: list[int]) -> dict:
    """Seconds until a recipe reaches a target, mean and spread; {} if a run of MAX_SECONDS is too short for it."""
    recipes = cumulative()
    # The recipe that is trained for it: those of SPEED_ONLY would need the same tokens, but more time
    trained_name = FIRST_REFERENCE if name in SPEED_ONLY else name
    if trained_name == target.reference:
        tokens = [target.tokens]
    else:
        recipe = recipes[trained_name]
        max_tokens = runs.longest_length(trained_name, recipe)
        tokens = [runs.tokens_to(target.bpb, trained_name, recipe, seed, max_tokens) for seed in seeds]
    if None in tokens:
        return {}
    seconds_per_token = runs.seconds_per_token(name, recipes[name])
    return mean_and_spread([count * seconds_per_token for count in tokens])


def cumulative_figures(runs: Runs, recipes: dict[str, Recipe], seeds: list[int]) -> tuple[list[float], dict[str, dict]]:
    """(the two targets in bits per byte, figures of each of the given recipes)."""
    names = list(cumulative())
    previous = dict(zip(names[1:], names))
    figures = {}
    for name, recipe in recipes.items():
        length = runs.longest_length(name, recipe, DEFAULT_LENGTH)
        used_seeds = seeds[:1] if name in SPEED_ONLY else seeds
        figures[name] = {
            "previous": previous.get(name),
            "seconds": [None, None],
            "bpb": mean_and_spread([runs.tuned_run(name, recipe, length, seed)["bpb"] for seed in used_seeds]),
            "length": length,
            "seconds_per_token": runs.seconds_per_token(name, recipe),
            "lr_scale": runs.lr_scale(name, recipe),
        }
    middle = names.index(SECOND_REFERENCE)
    first_target = reference_target(runs, FIRST_REFERENCE, LENGTHS[-1], seeds)
    for name in names[: middle + 1]:
        if name in recipes:
            figures[name]["seconds"][0] = seconds_to_target(runs, name, first_target, seeds)
    second_target = reference_target(runs, SECOND_REFERENCE, DEFAULT_LENGTH, seeds)
    for name in names[middle:]:
        if name in recipes:
            figures[name]["seconds"][1] = seconds_to_target(runs, name, second_target, seeds)
    return [first_target.bpb, second_target.bpb], figures


# -- leave-one-out and alternatives -----------------------------------------------------------------------------------


def relative_figures(runs: Runs, recipes: dict[str, Recipe], seeds: list[int]) -> dict[str, dict]:
    """Figures of each recipe; its time is relative to that of today's recipe to the same bits per byte."""
    today = todays_recipe()
    figures = {}
    for name, recipe in recipes.items():
        length = runs.longest_length(name, recipe, DEFAULT_LENGTH)
        bpbs, differences, relative_times = [], [], []
        for seed in seeds:
            result = runs.tuned_run(name, recipe, length, seed)
            bpbs.append(result["bpb"])
            differences.append(result["bpb"] - runs.tuned_run(TODAY, today, length, seed)["bpb"])
            relative_times.append(relative_time(runs, name, recipe, result, seed))
        figures[name] = {
            "bpb": mean_and_spread(bpbs),
            "bpb_difference": mean_and_spread(differences),
            "relative_time": None if None in relative_times else mean_and_spread(relative_times),
            "length": length,
            "seconds_per_token": runs.seconds_per_token(name, recipe),
            "lr_scale": runs.lr_scale(name, recipe),
        }
    return figures


def relative_time(runs: Runs, name: str, recipe: Recipe, result: dict, seed: int) -> float | None:
    """Time of a run, divided by the time that today's recipe needs for its bits per byte; None if that is too long."""
    today = todays_recipe()
    today_tokens = runs.tokens_to(result["bpb"], TODAY, today, seed)
    if today_tokens is None:
        return None
    seconds = result["tokens"] * runs.seconds_per_token(name, recipe)
    return seconds / (today_tokens * runs.seconds_per_token(TODAY, today))


def longer_run_figures(runs: Runs, recipes: dict[str, Recipe], seeds: list[int], steps: int) -> dict[str, dict]:
    """Bits per byte of the validation text after this many steps. `recipes` contains today's recipe, as TODAY."""
    tokens = steps * recipes[TODAY].rows * recipes[TODAY].context
    bpbs = {}
    for name, recipe in recipes.items():
        bpbs[name] = [runs.run(name, recipe, tokens, 1.0, seed, "val")["bpb"] for seed in seeds]
    figures = {}
    for name, recipe in recipes.items():
        differences = [bpb - today_bpb for bpb, today_bpb in zip(bpbs[name], bpbs[TODAY])]
        figures[name] = {
            "bpb": mean_and_spread(bpbs[name]),
            "bpb_difference": mean_and_spread(differences),
            "seconds_per_token": runs.seconds_per_token(name, recipe),
        }
    return figures


def with_depth(recipes: dict[str, Recipe], depth: int) -> dict[str, Recipe]:
    """The recipes of today's size at another depth, without those whose heads do not divide the new width.

    The width grows with the depth as in `pretrain`.
    """
    width = 64 * depth
    today = recipes[TODAY]
    resized = {}
    for name, recipe in recipes.items():
        has_todays_size = (recipe.depth, recipe.width) == (today.depth, today.width)
        if has_todays_size and width % recipe.head_width == 0:
            resized[name] = replace(recipe, depth=depth, width=width)
    return resized


# -- command ----------------------------------------------------------------------------------------------------------


def command(settings: LedgerSettings) -> None:
    hardware.prepare()
    for name in ("seeds", "steps", "depth"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1")
    if settings.depth and not settings.steps:
        raise UserError("--depth needs --steps: the other runs have a fixed depth")
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
    """All runs of the command, of the recipes whose names are `selected`."""

    def select(group: dict[str, Recipe]) -> dict[str, Recipe]:
        return {name: recipe for name, recipe in group.items() if name in selected}

    seeds = list(range(1, settings.seeds + 1))  # seed 0 chooses the learning rates
    every_recipe, today = cumulative(), todays_recipe()
    figures = LedgerFigures(runs.kneser_ney_bpb("val" if settings.steps else "test"))
    if settings.steps:
        recipes = {TODAY: today} | select(leave_one_out() | alternatives())
        recipes = with_depth(recipes, settings.depth or today.depth)
        runs.time_all(recipes)
        figures.longer_runs = longer_run_figures(runs, recipes, seeds, settings.steps)
        return figures
    references = {name: every_recipe[name] for name in (FIRST_REFERENCE, SECOND_REFERENCE)} | {TODAY: today}
    runs.time_all(references | select(every_recipe | leave_one_out() | alternatives()))
    if select(every_recipe):
        figures.targets, figures.cumulative = cumulative_figures(runs, select(every_recipe), seeds)
    figures.leave_one_out = relative_figures(runs, select(leave_one_out()), seeds)
    figures.alternatives = relative_figures(runs, select(alternatives()), seeds)
    return figures
