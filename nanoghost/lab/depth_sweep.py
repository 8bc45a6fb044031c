"""`nanoghost lab dial`: does the dial, which sets the depth from the training time, choose the best depth?

Each choice of depth and vocabulary is trained with `pretrain`, for as many steps as this machine makes in the given
minutes, and evaluated on the validation text. The dial's choice is one of them. The table shows how much worse each is
than the best one, in percent of the bits per byte.

Training speeds are measured beforehand, all new choices in turn, so that other work on the machine during a run does
not change a figure. `pretrain --minutes` makes a few steps less, because its time includes the step-time calibration,
and in runs of more than 15 minutes a few more, because it compiles the model.
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
from nanoghost.data.sources import Source
from nanoghost.data.tokenize_source import load_or_train_tokenizer, tokenize_source
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, home, read_json, write_json
from nanoghost.model.registry import config_for_depth
from nanoghost.optim.optimizer import Optimizer
from nanoghost.progress import Display, JsonFlag
from nanoghost.tasks.sft_mix import example_texts
from nanoghost.train import pretrain
from nanoghost.train.hyperparameters import depth_for, pretrain_groups, usable_gflops_per_second

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
    """Result of one choice for one training time. Bits per byte are means over the seeds."""

    minutes: float
    depth: int
    vocabulary: int
    dial: bool
    """Whether it is the dial's choice for these minutes."""
    steps: int
    validation_bpb: float
    bpb: float
    """Bits per byte of the test text."""
    from_best: float
    """validation_bpb relative to the best choice for these minutes: 0.01 is 1% worse."""


def command(settings: DialSettings) -> None:
    hardware.prepare()
    training_times = parse_numbers("--minutes", settings.minutes, 0.01, float)
    choices = parse_choices(settings.choices)
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    source, display = open_data_source(settings.data), Display()
    folder = home() / "lab" / "dial" / source.fingerprint[:8]
    if settings.force:
        shutil.rmtree(folder, ignore_errors=True)
    gflops = stored_gflops_per_second(folder)
    dial_choices = {}
    for minutes in training_times:
        depth, _ = depth_for(minutes, gflops)
        dial_choices[minutes] = (depth, pretrain.PretrainSettings.vocab_size)
    speeds = measure_training_speeds(source, sorted({*choices, *dial_choices.values()}), folder, display)
    rows: list[SweepRow] = []
    for minutes in training_times:
        results = {}
        for choice in sorted({*choices, dial_choices[minutes]}):
            steps = max(1, round(minutes * 60 * speeds[choice] / TOKENS_PER_STEP))
            runs = [train_choice(settings, folder, choice, steps, seed, display) for seed in range(settings.seeds)]
            results[choice] = steps, runs
            baseline_bpb = runs[0]["kneser_ney_bpb"]  # the same in all runs
        rows += make_rows(minutes, dial_choices[minutes], results)
    print_table(rows, baseline_bpb)
    if settings.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


def parse_choices(text: str) -> list[Choice]:
    """Parse "4x4096,6x4096" as [(4, 4096), (6, 4096)]. Raises UserError."""
    choices = [(int(depth), int(vocabulary)) for depth, vocabulary in re.findall(r"([1-9]\d*)x(\d+)", text)]
    if ",".join(map(choice_name, choices)) != text:
        raise UserError(f"--choices expects DEPTHxVOCABULARY, comma-separated, such as 4x4096,6x4096, not '{text}'")
    return choices


def choice_name(choice: Choice) -> str:
    depth, vocabulary = choice
    return f"{depth}x{vocabulary}"


def make_rows(minutes: float, dial_choice: Choice, results: dict[Choice, tuple[int, list[dict]]]) -> list[SweepRow]:
    """The rows of one training time. `results`: choice -> (steps, figures of the run with each seed)."""
    validation_bpbs = {}
    for choice, (_, runs) in results.items():
        validation_bpbs[choice] = statistics.mean(figures["validation_bpb"] for figures in runs)
    best = min(validation_bpbs.values())
    rows = []
    for choice, (steps, runs) in results.items():
        rows.append(
            SweepRow(
                minutes=minutes,
                depth=choice[0],
                vocabulary=choice[1],
                dial=choice == dial_choice,
                steps=steps,
                validation_bpb=validation_bpbs[choice],
                bpb=statistics.mean(figures["bpb"] for figures in runs),
                from_best=validation_bpbs[choice] / best - 1,
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
    """Matmul speed, measured once for this folder: with another measurement the dial's choice could change."""
    path = folder / "matmuls.json"
    if not path.exists():
        measured = hardware.matmul_gflops_per_second(hardware.compute_dtype(), 1.0)
        write_json(path, {"gflops_per_second": usable_gflops_per_second(measured)})
    return read_json(path)["gflops_per_second"]


def measure_training_speeds(
    source: Source, choices: list[Choice], folder: Path, display: Display
) -> dict[Choice, float]:
    """Tokens per second of each choice: stored, or the median of TIMING_ROUNDS, in which new choices run in turn."""
    path = folder / "speeds.json"
    speeds = read_json(path) if path.exists() else {}
    measurements = {}
    for choice in choices:
        if choice_name(choice) in speeds:
            continue
        depth, vocabulary = choice
        tokenizer = load_or_train_tokenizer(source, vocabulary, display.print, example_texts())
        text = tokenize_source(source, tokenizer).tokens("train")
        model = pretrain.make_model(config_for_depth("ghost", depth, tokenizer.vocab_size, CONTEXT), tokenizer)
        optimizer = Optimizer(model, pretrain_groups(model.config.width), hardware.compute_dtype())
        batches = Batches(text, CONTEXT, BATCH, 0)
        measurements[choice_name(choice)] = partial(run_steps, model, optimizer, batches, steps=4)
    if measurements:
        display.print("measuring training speed ...")
        new_speeds: dict[str, list[float]] = {name: [] for name in measurements}
        for timing_round in range(TIMING_ROUNDS + 1):
            for name, measure in measurements.items():
                tokens_per_second = measure()
                if timing_round > 0:  # the first round is slower: it allocates memory
                    new_speeds[name].append(tokens_per_second)
        for name in measurements:
            speeds[name] = statistics.median(new_speeds[name])
        write_json(path, speeds)
    return {choice: speeds[choice_name(choice)] for choice in choices}


def train_choice(settings: DialSettings, folder: Path, choice: Choice, steps: int, seed: int, display: Display) -> dict:
    """Figures of one run, from its file if it exists. After Ctrl-C the same command resumes."""
    depth, vocabulary = choice
    label = f"{choice_name(choice)}-{steps}-{seed}"
    path = folder / f"{label}.json"
    if not path.exists():
        pretrain_settings = pretrain.PretrainSettings(
            name=f"dial-{folder.name}-{label}",
            data=settings.data,
            depth=depth,
            vocab_size=vocabulary,
            steps=steps,
            seed=seed,
            force=settings.force,
        )
        model_folder = ModelFolder(pretrain_settings.name)
        # pretrain.main returns None if an earlier command finished the model
        figures = pretrain.main(pretrain_settings, display) or model_folder.card.figures
        write_json(path, figures)
        shutil.rmtree(model_folder.path)
    return read_json(path)
