"""`nanoghost lab lecun1989`: the network of LeCun et al. 1989, which reads handwritten digits, modernized step by step.

LeCun et al., "Backpropagation Applied to Handwritten Zip Code Recognition" (1989): 9,760 weights, tanh, squared error,
one digit per step. Two details are not in the paper and are our assumption: which 8 of 12 feature maps a map of the
second layer sees (the one with its number and the next seven), and initial weights within 2.4 / sqrt(fan-in) (without
the root, nine in ten digits are wrong after an epoch).

The modern recipes follow Karpathy 2022, "Deep Neural Nets: 33 years ago and 33 years from now". Each adds one change to
the recipe before: softmax and cross-entropy; Adam, batches of 16 and more epochs; digits shifted by a pixel; ReLU and
dropout. Ablations of the last recipe: without each of the changes, twice the epochs, twice the maps, half the data.
"""

import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import select_names
from nanoghost.errors import UserError
from nanoghost.evals.svg import BarChart, bar_charts
from nanoghost.home import home, read_json, write_atomic, write_json
from nanoghost.lab.lecun1989_digits import Fold, bundled_digits, folds, mnist_digits
from nanoghost.lab.lecun1989_network import DigitRecipe, error_rates, train
from nanoghost.progress import Display, JsonFlag

CUMULATIVE = {  # each changes the recipe before
    "1989": {},
    "+ softmax": {"loss": "softmax"},
    "+ Adam, batches, 60 epochs": {"optimizer": "adam", "batch": 16, "epochs": 60},
    "+ shift by a pixel": {"shift": True},
    "+ ReLU, dropout": {"relu": True},
}
ABLATIONS = {  # each changes the last recipe of CUMULATIVE
    "without softmax": {"loss": "squared"},
    "without Adam, batches, epochs": {"optimizer": "sgd", "batch": 1, "epochs": 23},
    "without shift": {"shift": False},
    "without ReLU, dropout": {"relu": False},
    "twice the epochs": {"epochs": 120},
    "twice the maps": {"maps": 24},
    "half the data": {"data_fraction": 0.5},
}
LEARNING_RATES = {"sgd": (0.01, 0.03, 0.1), "adam": (3e-4, 1e-3, 3e-3)}
COLUMNS = ("", "error rate", "compared with the previous", "weights", "learning rate", "seconds")


@dataclass(frozen=True)
class Lecun1989Settings(JsonFlag):
    mnist: Path | None = None
    """Folder with the four files of MNIST. Default: scikit-learn's digits, with five-fold cross-validation."""
    seeds: int = 3
    """Number of networks for each fold."""
    recipes: str = ""
    """Comma-separated words: run only recipes whose name contains one of them. Default: all."""
    force: bool = False
    """Run finished recipes again."""
    out: Path | None = None
    """Markdown file to write the table to, with a bar chart of the same name (.svg)."""


def all_recipes() -> dict[str, DigitRecipe]:
    """CUMULATIVE and ABLATIONS by name."""
    recipes = {}
    recipe = DigitRecipe()
    for name, change in CUMULATIVE.items():
        recipe = replace(recipe, **change)
        recipes[name] = recipe
    return recipes | {name: replace(recipe, **change) for name, change in ABLATIONS.items()}


def command(settings: Lecun1989Settings) -> None:
    hardware.prepare()
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    display = Display()
    first_test = None
    if settings.mnist:
        digits, labels, first_test = mnist_digits(settings.mnist)
        data_name, description = f"mnist-{sha256(digits.numpy().tobytes()).hexdigest()[:8]}", "MNIST"
    else:
        digits, labels = bundled_digits()
        data_name, description = "digits", "scikit-learn's 1,797 digits, five-fold cross-validation"
    splits = folds(len(digits), first_test)
    recipes = all_recipes()
    results = {}
    for name in select_names("--recipes", settings.recipes, recipes):
        slug = "".join(character if character.isalnum() else "-" for character in name)
        path = home() / "lab" / "lecun1989" / f"{data_name}-{settings.seeds}-{slug}.json"
        if settings.force or not path.exists():
            show = partial(show_event, display, name)
            write_json(path, measure(recipes[name], digits, labels, splits, settings.seeds, show))
        results[name] = read_json(path)
        display.print(f"{name}: error rate {results[name]['error']:.2%}")
    print_table(results)
    if settings.out:
        write_report(settings.out, results, description, settings.seeds)
    if settings.json:
        print(json.dumps({"recipes": results}))


def show_event(display: Display, recipe_name: str, event: dict) -> None:
    display.show({**event, "task": recipe_name})


def measure(recipe: DigitRecipe, digits, labels, splits: list[Fold], seeds: int, show: Callable[[dict], None]) -> dict:
    """Choose the learning rate, then train and test one network for each fold and seed."""
    start = time.perf_counter()
    tuning_errors = error_by_learning_rate(recipe, digits, labels, splits[0][0], show)
    learning_rate = min(tuning_errors, key=tuning_errors.get)

    train_sets, test_sets, network_seeds = [], [], []
    for seed in range(1, seeds + 1):  # seed 0 chooses the learning rate
        for train_indices, test_indices in splits:
            train_sets.append(subset(recipe, train_indices))
            test_sets.append(test_indices)
            network_seeds.append(seed)
    learning_rates = [learning_rate] * len(network_seeds)
    networks = train(recipe, digits, labels, train_sets, network_seeds, learning_rates, show)
    errors = error_rates(networks, digits, labels, test_sets)  # all folds of the first seed, then of the next
    by_seed = [statistics.mean(errors[i : i + len(splits)]) for i in range(0, len(errors), len(splits))]
    return {
        "error": statistics.mean(by_seed),
        "spread": statistics.stdev(by_seed) if seeds > 1 else None,
        "by_seed": by_seed,
        "learning_rate": learning_rate,
        "tuning_errors": {str(rate): error for rate, error in tuning_errors.items()},
        "weights": networks.parameter_count(),
        "seconds": round(time.perf_counter() - start, 1),
    }


def error_by_learning_rate(
    recipe: DigitRecipe, digits, labels, train_indices: torch.Tensor, show: Callable[[dict], None]
) -> dict[float, float]:
    """Error rate with each learning rate on a fifth of the training digits, after training on the others."""
    learning_rates = list(LEARNING_RATES[recipe.optimizer])
    held_out = len(train_indices) // 5
    train_sets = [subset(recipe, train_indices[held_out:])] * len(learning_rates)
    networks = train(recipe, digits, labels, train_sets, [0] * len(learning_rates), learning_rates, show)
    errors = error_rates(networks, digits, labels, [train_indices[:held_out]] * len(learning_rates))
    return dict(zip(learning_rates, errors))


def subset(recipe: DigitRecipe, indices: torch.Tensor) -> torch.Tensor:
    """The training digits that the recipe uses."""
    return indices[: int(len(indices) * recipe.data_fraction)]


# -- output ------------------------------------------------------------------------------------------------------------


def table_rows(results: dict) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each recipe."""
    names = list(CUMULATIVE)
    previous = dict(zip(names[1:], names))
    rows = []
    for name, result in results.items():
        spread = f" ±{result['spread']:.2%}" if result["spread"] is not None else ""
        previous_result = results.get(previous.get(name))
        change = f"{result['error'] / previous_result['error'] - 1:+.0%}" if previous_result else ""
        rows.append(
            (
                name,
                f"{result['error']:.2%}{spread}",
                change,
                f"{result['weights']:,}",
                f"{result['learning_rate']:g}",
                f"{result['seconds']:.0f}",
            )
        )
    return rows


def print_table(results: dict) -> None:
    table = Table(*COLUMNS)
    for row in table_rows(results):
        table.add_row(*row)
    Console(stderr=True).print(table)


def write_report(path: Path, results: dict, digits: str, seeds: int) -> None:
    """Write the table as Markdown, and a bar chart as an SVG of the same name. `digits`: description of the data."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table_rows(results)]
    parts = [
        "# 1989 to now: a network that reads digits",
        f"Made by `{shlex.join(['nanoghost', *sys.argv[1:]])}`: {digits}, {seeds} seeds.",
        f"![Bar chart of the same figures]({path.stem}.svg)",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]
    write_atomic(path, "\n\n".join(parts) + "\n")
    errors = {}
    for name, result in results.items():
        spread = None if result["spread"] is None else 1000 * result["spread"]
        errors[name] = {"mean": 1000 * result["error"], "spread": spread}
    chart = BarChart("Errors on 1,000 held-out digits", errors, low=5.0, number_format="{:.1f}")
    write_atomic(path.with_suffix(".svg"), bar_charts([chart]))
