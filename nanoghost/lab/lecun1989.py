"""`nanoghost lab lecun1989`: the network of LeCun et al. 1989, which reads handwritten digits, modernized step by step.

LeCun et al., "Backpropagation Applied to Handwritten Zip Code Recognition" (1989): 9,760 weights, tanh, squared error,
one digit per step. Two details are not in the paper and are our assumption: which 8 of 12 maps a map of the second
layer sees (its own and the next seven), and initial weights within 2.4 / sqrt(fan-in) (without the root, nine in ten
digits are wrong after an epoch).

Then, each change on top of those before (after Karpathy 2022, "Deep Neural Nets: 33 years ago and 33 years from now"):
softmax and cross-entropy; Adam, batches of 16 and more epochs; digits shifted by a pixel; ReLU and dropout. Finally
ablations of the last recipe: each change left out alone, twice the epochs, twice the maps, half the data.
"""

import json
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import select_names
from nanoghost.errors import UserError
from nanoghost.evals.svg import bar_charts
from nanoghost.home import home, read_json, write_atomic, write_json
from nanoghost.lab.lecun1989_digits import bundled_digits, folds, mnist_digits
from nanoghost.lab.lecun1989_network import DigitRecipe, error_rates, train
from nanoghost.progress import Display, JsonFlag

CUMULATIVE = {  # each on top of those before
    "1989": {},
    "+ softmax": {"loss": "softmax"},
    "+ Adam, batches, 60 epochs": {"optimizer": "adam", "batch": 16, "epochs": 60},
    "+ shift by a pixel": {"shift": True},
    "+ ReLU, dropout": {"relu": True},
}
ABLATIONS = {  # each a change of the last of those
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
    """Comma-separated words; only recipes with one of them in the name are run. Default: all."""
    force: bool = False
    """Run finished recipes again."""
    out: Path | None = None
    """Markdown file to write the table to, with a figure of the same name (.svg)."""


def all_recipes() -> dict[str, DigitRecipe]:
    recipes, settings = {}, {}
    for name, change in CUMULATIVE.items():
        settings |= change
        recipes[name] = DigitRecipe(**settings)
    last = DigitRecipe(**settings)
    return recipes | {name: replace(last, **change) for name, change in ABLATIONS.items()}


def command(settings: Lecun1989Settings) -> None:
    hardware.prepare()
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    display = Display()
    first_test = None
    if settings.mnist:
        digits, labels, first_test = mnist_digits(settings.mnist)
        data, description = f"mnist-{sha256(digits.numpy().tobytes()).hexdigest()[:8]}", "MNIST"
    else:
        digits, labels = bundled_digits()
        data, description = "digits", "scikit-learn's 1,797 digits, five-fold cross-validation"
    results = {}
    for name in select_names("--recipes", settings.recipes, all_recipes()):
        slug = "".join(c if c.isalnum() else "-" for c in name)
        path = home() / "lab" / "lecun1989" / f"{data}-{settings.seeds}-{slug}.json"
        if settings.force or not path.exists():
            splits = folds(len(digits), first_test)
            write_json(path, measure(name, all_recipes()[name], digits, labels, splits, settings.seeds, display))
        results[name] = read_json(path)
        display.print(f"{name}: error rate {results[name]['error']:.2%}")
    print_table(results)
    if settings.out:
        write_report(settings.out, results, description, settings.seeds)
    if settings.json:
        print(json.dumps({"recipes": results}))


def measure(name: str, recipe: DigitRecipe, digits, labels, splits, seeds: int, display: Display) -> dict:
    """Choose the learning rate on a fifth of the first fold's training digits, then train and test on all folds."""
    start = time.perf_counter()

    def show(event: dict) -> None:
        display.show({**event, "task": name})

    def used(indices):
        return indices[: int(len(indices) * recipe.data_fraction)]

    candidates = LEARNING_RATES[recipe.optimizer]
    train_indices = splits[0][0]
    held_out = len(train_indices) // 5
    tuning_indices = [used(train_indices[held_out:])] * len(candidates)
    networks = train(recipe, digits, labels, tuning_indices, [0] * len(candidates), list(candidates), show)
    errors = error_rates(networks, digits, labels, [train_indices[:held_out]] * len(candidates))
    learning_rate = candidates[errors.index(min(errors))]

    runs = [(fold, seed) for seed in range(seeds) for fold in splits]
    train_sets, test_sets = [used(fold[0]) for fold, _ in runs], [fold[1] for fold, _ in runs]
    network_seeds = [1 + seed for _, seed in runs]
    networks = train(recipe, digits, labels, train_sets, network_seeds, [learning_rate] * len(runs), show)
    rates = error_rates(networks, digits, labels, test_sets)
    by_seed = [statistics.mean(rates[i * len(splits) : (i + 1) * len(splits)]) for i in range(seeds)]
    return {
        "error": statistics.mean(by_seed),
        "spread": statistics.stdev(by_seed) if seeds > 1 else None,
        "by_seed": by_seed,
        "learning_rate": learning_rate,
        "tuning_errors": dict(zip(map(str, candidates), errors)),
        "weights": networks.parameter_count(),
        "seconds": round(time.perf_counter() - start, 1),
    }


# -- display -----------------------------------------------------------------------------------------------------------


def table_rows(results: dict) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each recipe."""
    names = list(CUMULATIVE)
    previous = dict(zip(names[1:], names))
    rows = []
    for name, r in results.items():
        spread = f" ±{r['spread']:.2%}" if r["spread"] is not None else ""
        before = results.get(previous.get(name))
        change = f"{r['error'] / before['error'] - 1:+.0%}" if before else ""
        weights, learning_rate, seconds = f"{r['weights']:,}", f"{r['learning_rate']:g}", f"{r['seconds']:.0f}"
        rows.append((name, f"{r['error']:.2%}{spread}", change, weights, learning_rate, seconds))
    return rows


def print_table(results: dict) -> None:
    table = Table(*COLUMNS)
    for row in table_rows(results):
        table.add_row(*row)
    Console(stderr=True).print(table)


def write_report(path: Path, results: dict, digits: str, seeds: int) -> None:
    """Write the table as Markdown, and a figure as an SVG of the same name."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *table_rows(results)]
    parts = [
        "# 1989 to now: a network that reads digits",
        f"Made by `{shlex.join(['nanoghost', *sys.argv[1:]])}`: {digits}, {seeds} seeds.",
        f"![Bar chart of the same figures]({path.stem}.svg)",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
    ]
    write_atomic(path, "\n\n".join(parts) + "\n")
    errors = {}
    for name, r in results.items():
        spread = None if r["spread"] is None else 1000 * r["spread"]
        errors[name] = {"mean": 1000 * r["error"], "spread": spread}
    write_atomic(path.with_suffix(".svg"), bar_charts([("Errors on 1,000 held-out digits", errors, 5.0, "{:.1f}")]))
