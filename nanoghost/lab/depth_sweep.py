"""`nanoghost lab dial`: checks that the dial chooses the best depth for a given training time.

Each choice of depth and vocabulary is trained by `pretrain` for as many steps as this machine makes of it in the given
minutes, and evaluated on the validation text. The dial's own choice is one of them; the table shows how much worse it
is than the best, in percent of the bits per byte.

Steps are timed beforehand, the new choices of a command in turn, so that a disturbance during a run changes no figure.
The time of the step-time calibration is not subtracted, and nothing is compiled: `pretrain --minutes` makes a few steps
fewer, and in runs of more than 15 minutes a few more.
"""

import json
import re
import shutil
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.bench.pretrain import run_steps
from nanoghost.commands.arguments import parse_numbers
from nanoghost.data.batches import Batches
from nanoghost.data.registry import open_data_source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.errors import UserError
from nanoghost.hardware import matmul_gflops_per_second
from nanoghost.home import ModelFolder, home, read_json, write_json
from nanoghost.model.registry import config_for_depth
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import Display, JsonFlag
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train import pretrain
from nanoghost.train.hyperparameters import depth_for, pretrain_groups

CONTEXT, BATCH = pretrain.PretrainSettings.context, pretrain.PretrainSettings.batch
TOKENS_PER_STEP = CONTEXT * BATCH
TIMING_ROUNDS = 3

Choice = tuple[int, int]
"""(depth, vocabulary size)"""


@dataclass(frozen=True)
class DialSettings(JsonFlag):
    minutes: str = "1,4,10,30"
    """Comma-separated training times."""
    choices: str = "2x4096,4x2048,4x4096,4x8192,6x4096"
    """Comma-separated choices, DEPTHxVOCABULARY."""
    seeds: int = 1
    """Number of runs of each choice."""
    data: str = "plays"
    """Training text, as in `pretrain`."""
    force: bool = False
    """Remove all stored results and start again (not needed to resume after Ctrl-C)."""


@dataclass(frozen=True)
class SweepRow:
    """Result of one choice; bits per byte are means over the seeds."""

    minutes: float
    depth: int
    vocabulary: int
    dial: bool
    """Whether the dial chooses it for these minutes."""
    steps: int
    validation_bpb: float
    bpb: float
    """Bits per byte of the test text."""
    from_best: float
    """validation_bpb relative to the best choice for these minutes: 0.01 is 1% worse."""


def command(settings: DialSettings) -> None:
    hardware.prepare()
    minutes = parse_numbers("--minutes", settings.minutes, 0.01, float)
    choices = parse_choices(settings.choices)
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    source, display = open_data_source(settings.data), Display()
    folder = home() / "lab" / "dial" / source.fingerprint[:8]
    if settings.force:
        shutil.rmtree(folder, ignore_errors=True)
    gflops = stored_gflops_per_second(folder)
    dial_choices = {m: (depth_for(m, gflops)[0], pretrain.PretrainSettings.vocab_size) for m in minutes}
    speeds = tokens_per_second(source, sorted({*choices, *dial_choices.values()}), folder, display)
    rows: list[SweepRow] = []
    for m in minutes:
        results = {}
        for choice in sorted({*choices, dial_choices[m]}):
            steps = max(1, round(m * 60 * speeds[choice] / TOKENS_PER_STEP))
            runs = [run(settings, folder, choice, steps, seed, display) for seed in range(settings.seeds)]
            results[choice] = steps, runs
        rows += rows_of(m, dial_choices[m], results)
    baseline = runs[0]["kneser_ney_bpb"]
    print_table(rows, baseline)
    if settings.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


def parse_choices(text: str) -> list[Choice]:
    """ "4x4096,6x4096" -> [(4, 4096), (6, 4096)]. Raises UserError."""
    choices = [(int(depth), int(vocabulary)) for depth, vocabulary in re.findall(r"([1-9]\d*)x(\d+)", text)]
    if ",".join(f"{depth}x{vocabulary}" for depth, vocabulary in choices) != text:
        raise UserError(f"--choices expects DEPTHxVOCABULARY, comma-separated, such as 4x4096,6x4096, not '{text}'")
    return choices


def rows_of(minutes: float, dial_choice: Choice, results: dict[Choice, tuple[int, list[dict]]]) -> list[SweepRow]:
    def mean(choice: Choice, key: str) -> float:
        return statistics.mean(figures[key] for figures in results[choice][1])

    best = min(mean(choice, "validation_bpb") for choice in results)
    rows = []
    for choice, (steps, _) in results.items():
        validation_bpb = mean(choice, "validation_bpb")
        rows.append(
            SweepRow(
                minutes=minutes,
                depth=choice[0],
                vocabulary=choice[1],
                dial=choice == dial_choice,
                steps=steps,
                validation_bpb=validation_bpb,
                bpb=mean(choice, "bpb"),
                from_best=validation_bpb / best - 1,
            )
        )
    return rows


def print_table(rows: list[SweepRow], kneser_ney_bpb: float) -> None:
    columns = ("minutes", "depth", "vocabulary", "", "steps", "validation bpb", "compared with the best", "test bpb")
    table = Table(*columns)
    for row in rows:
        table.add_row(
            f"{row.minutes:g}",
            str(row.depth),
            f"{row.vocabulary:,}",
            "dial" if row.dial else "",
            str(row.steps),
            f"{row.validation_bpb:.4f}",
            f"{row.from_best:+.1%}",
            f"{row.bpb:.4f}",
        )
    table.add_row("", "", "", "", "", "", "6-gram baseline (Kneser-Ney)", f"{kneser_ney_bpb:.4f}")
    Console(stderr=True).print(table)


def stored_gflops_per_second(folder: Path) -> float:
    """Matmul speed as measured by the first command here: with a new measurement the dial could choose differently."""
    path = folder / "matmuls.json"
    if not path.exists():
        write_json(path, {"gflops_per_second": matmul_gflops_per_second(hardware.compute_dtype(), 1.0)})
    return read_json(path)["gflops_per_second"]


def tokens_per_second(source, choices: list[Choice], folder: Path, display: Display) -> dict[Choice, float]:
    """Training speed: the median of TIMING_ROUNDS, in which all choices without a stored speed take turns."""
    path = folder / "speeds.json"
    speeds = read_json(path) if path.exists() else {}
    measurements = {}
    for depth, vocabulary in choices:
        if f"{depth}x{vocabulary}" in speeds:
            continue
        tokenizer = load_or_train_tokenizer(source, vocabulary, display.print, example_texts())
        text = tokenize_source(source, tokenizer).tokens("train")
        model = pretrain.make_model(config_for_depth("ghost", depth, tokenizer.vocab_size, CONTEXT), tokenizer)
        optimizer = Optimizer(model, pretrain_groups(model.config.width), hardware.compute_dtype())
        batches = Batches(text, CONTEXT, BATCH, 0)
        measurements[f"{depth}x{vocabulary}"] = partial(run_steps, model, optimizer, batches, steps=4)
    if measurements:
        display.print("measuring training speed ...")
        rounds = [{name: measure() for name, measure in measurements.items()} for _ in range(TIMING_ROUNDS + 1)]
        for name in measurements:
            speeds[name] = statistics.median(of_round[name] for of_round in rounds[1:])  # the first one allocates
        write_json(path, speeds)
    return {(depth, vocabulary): speeds[f"{depth}x{vocabulary}"] for depth, vocabulary in choices}


def run(settings: DialSettings, folder: Path, choice: Choice, steps: int, seed: int, display: Display) -> dict:
    """Figures of one run, from its file if it exists. After Ctrl-C the same command resumes."""
    depth, vocabulary = choice
    label = f"{depth}x{vocabulary}-{steps}-{seed}"
    path = folder / f"{label}.json"
    if not path.exists():
        stage = pretrain.PretrainSettings(
            name=f"dial-{folder.name}-{label}",
            data=settings.data,
            depth=depth,
            vocab_size=vocabulary,
            steps=steps,
            seed=seed,
            force=settings.force,
        )
        figures = pretrain.main(stage, display) or ModelFolder(stage.name).card.figures
        write_json(path, figures)
        shutil.rmtree(ModelFolder(stage.name).path)
    return read_json(path)
