"""`nanoghost lab dial`: is what the dial chooses for the minutes one has the best that could be chosen?

Every choice of layers and vocabulary is trained by `pretrain` itself for as many steps as this machine makes of it in those
minutes, and judged on the validation text. The dial's own choice stands among them; how far it is from the best is told in percent of
the bits per byte. Steps are timed beforehand, the new choices of a command in turn: what disturbs a run later changes no figure.
Rehearsals are not subtracted and nothing is compiled: `pretrain --minutes` makes a few steps fewer, and in runs over 15 minutes more.
"""

import json
import re
import shutil
import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.bench.pretrain import step_of
from nanoghost.commands.arguments import parse_numbers
from nanoghost.data.batches import Batches
from nanoghost.data.registry import open_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.errors import UserError
from nanoghost.hardware import matmul_gflops_per_second
from nanoghost.home import ModelFolder, home, read_json, write_json
from nanoghost.model.registry import config_for_depth
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import Display
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train import pretrain
from nanoghost.train.hyperparameters import depth_for, pretrain_groups

CONTEXT, BATCH = pretrain.PretrainSettings.context, pretrain.PretrainSettings.batch
TOKENS = CONTEXT * BATCH  # of a step
ROUNDS = 3


@dataclass(frozen=True)
class DialSettings:
    minutes: str = "1,4,10,30"
    """Lengths of the runs."""
    choices: str = "2x4096,4x2048,4x4096,4x8192,6x4096"
    """Layers x vocabulary."""
    seeds: int = 1
    """Runs of each choice."""
    data: str = "plays"
    """Text, as in `pretrain`."""
    force: bool = False
    """Forget what was measured: after a change of the recipe it no longer holds. After Ctrl-C go on without it."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: DialSettings) -> None:
    hardware.prepare()
    minutes = parse_numbers("--minutes", settings.minutes, 0.01, float)
    choices = [tuple(map(int, pair)) for pair in re.findall(r"([1-9]\d*)x(\d+)", settings.choices)]
    if ",".join(f"{depth}x{vocabulary}" for depth, vocabulary in choices) != settings.choices:
        raise UserError(f"--choices are like 4x4096,6x4096 (layers x vocabulary), not '{settings.choices}'")
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    source, display, rows = open_source(settings.data), Display(), []
    folder = home() / "lab" / "dial" / source.fingerprint[:8]
    if settings.force:
        shutil.rmtree(folder, ignore_errors=True)
    usual = {m: (depth_for(m, products(folder))[0], pretrain.PretrainSettings.vocab_size) for m in minutes}
    rates = tokens_per_second(source, sorted({*choices, *usual.values()}), folder, display)
    for m in minutes:
        for choice in sorted({*choices, usual[m]}):
            steps = max(1, round(m * 60 * rates[choice] / TOKENS))
            runs = [run(settings, folder, *choice, steps, seed, display) for seed in range(settings.seeds)]
            mean = {key: statistics.mean(r[key] for r in runs) for key in ("validation_bpb", "bpb")}
            rows.append(
                {
                    "minutes": m,
                    "depth": choice[0],
                    "vocabulary": choice[1],
                    "dial": choice == usual[m],
                    "steps": steps,
                    **mean,
                }
            )
    for row in rows:
        best = min(r["validation_bpb"] for r in rows if r["minutes"] == row["minutes"])
        row["from_best"] = row["validation_bpb"] / best - 1
    table = Table("minutes", "layers", "vocabulary", "", "steps", "validation bpb", "from the best", "test bpb")
    for r in rows:
        figures = f"{r['validation_bpb']:.4f}", f"{r['from_best']:+.1%}", f"{r['bpb']:.4f}"
        table.add_row(
            f"{r['minutes']:g}",
            str(r["depth"]),
            f"{r['vocabulary']:,}",
            "the dial" if r["dial"] else "",
            str(r["steps"]),
            *figures,
        )
    table.add_row("", "", "", "", "", "", "counting bytes", f"{runs[0]['kneser_ney_bpb']:.4f}")
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"rows": rows}))


def products(folder) -> float:
    """GFLOP/s of matrix products, as they were when the dial was first asked here."""
    path = folder / "products.json"
    if not path.exists():
        write_json(path, {"gflops_per_second": matmul_gflops_per_second(hardware.compute_dtype(), 1.0)})
    return read_json(path)["gflops_per_second"]


def tokens_per_second(source, choices: list[tuple[int, int]], folder, display) -> dict[tuple[int, int], float]:
    """Of whole steps; the median of ROUNDS in which all that are not known yet take turns."""
    path = folder / "rates.json"
    known = read_json(path) if path.exists() else {}
    works = {}
    for depth, vocabulary in choices:
        if f"{depth}x{vocabulary}" not in known:
            tokenizer = load_or_train_tokenizer(source, vocabulary, display.print, example_texts())
            text = tokenize_source(source, tokenizer).tokens("train")
            model = pretrain.make_model(config_for_depth("ghost", depth, tokenizer.vocab_size, CONTEXT), tokenizer)
            optimizer = Optimizer(model, pretrain_groups(model.config.width), hardware.compute_dtype())
            works[f"{depth}x{vocabulary}"] = step_of(model, optimizer, Batches(text, CONTEXT, BATCH, 0), steps=4)
    display.print("how fast are they? ..." if works else "how fast they are is known")
    rounds = [{name: work() for name, work in works.items()} for _ in range(ROUNDS + 1)][1:]  # the first one allocates
    known |= {name: statistics.median(r[name] for r in rounds) for name in works}
    write_json(path, known)
    return {(depth, vocabulary): known[f"{depth}x{vocabulary}"] for depth, vocabulary in choices}


def run(settings: DialSettings, folder, depth: int, vocabulary: int, steps: int, seed: int, display) -> dict:
    """Figures of one run; from its file if it was made before. Ctrl-C loses nothing: it goes on where it was."""
    label = f"{depth}x{vocabulary}-{steps}-{seed}"
    path = folder / f"{label}.json"
    if not path.exists():
        name = f"dial-{folder.name}-{label}"
        data, force = settings.data, settings.force
        asked = pretrain.PretrainSettings(
            name=name, data=data, depth=depth, vocab_size=vocabulary, steps=steps, seed=seed, force=force
        )
        figures = pretrain.main(asked, display) or ModelFolder(name).card.figures
        write_json(path, figures)
        shutil.rmtree(ModelFolder(name).path)
    return read_json(path)
