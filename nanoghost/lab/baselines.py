"""`nanoghost lab baselines`: pretraining compared with nanochat and nanoGPT, on this machine, the same text and split.

Every point is a complete run with its own schedule: seconds of training and bits per byte of the test text. The seconds
include compilation, but not reading the text or the final evaluation. Those of nanoghost also include the step-time
calibration and nine evaluations on the validation text; the baselines have neither.

A baseline runs unchanged from a clone that you name, with the settings that its documentation gives for a CPU, in the
Python environment of nanoghost (install what it needs there).

    nanochat   depth 4, heads of 64, full attention, 256 tokens, 16 rows at once, 8,192 tokens per step, and its own
               tokenizer with 4,096 tokens. It drops text that does not fit into its rows, so the text is split into
               chunks of about 700 characters.
    nanogpt    its setting for a laptop: characters, 4 layers of 128, context 64, 12 rows, 2,000 steps
"""

import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import parse_numbers
from nanoghost.data.registry import open_data_source
from nanoghost.data.sources import Source
from nanoghost.errors import UserError
from nanoghost.evals.svg import log_x_line_chart
from nanoghost.home import ModelFolder, home, read_json, write_atomic, write_json
from nanoghost.progress import Display, JsonFlag
from nanoghost.train import pretrain

CHUNK_CHARACTERS = 700
NANOCHAT_BATCH_TOKENS = 16 * 256  # of one forward pass
NANOCHAT_FLAGS = (
    "--depth=4",
    "--head-dim=64",
    "--window-pattern=L",
    "--max-seq-len=256",
    "--device-batch-size=16",
    "--total-batch-size=8192",
    "--core-metric-every=-1",
    "--sample-every=-1",
    "--eval-every=100000",
)
NANOGPT_FLAGS = (
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--dropout=0.0",
    "--eval_iters=200",
    "--dataset=nanoghost",
    "--out_dir=out-nanoghost",
)

Result = tuple[float, float]
"""(seconds of training, bits per byte of the test text)"""


@dataclass(frozen=True)
class BaselinesSettings(JsonFlag):
    minutes: str = "0.5,1,2,4"
    """Comma-separated lengths of our runs, in minutes."""
    nanochat: Path | None = None
    """A clone of karpathy/nanochat."""
    nanochat_steps: str = "40,80,120"
    """Comma-separated lengths of its runs, in steps."""
    nanogpt: Path | None = None
    """A clone of karpathy/nanoGPT."""
    nanogpt_steps: str = "2000"
    """Comma-separated lengths of its runs, in steps."""
    data: str = "plays"
    """Training text, as in `pretrain`."""
    seeds: int = 1
    """Number of our runs of each length; the baselines have one seed."""
    force: bool = False
    """Remove all stored results and start again (not needed to resume after Ctrl-C)."""
    out: Path | None = None
    """SVG file to draw the curves into."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of one system."""

    system: str
    path: Path
    """File that stores the result."""
    run: Callable[[], Result]


def command(settings: BaselinesSettings) -> None:
    hardware.prepare()
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    source, display = open_data_source(settings.data), Display()
    folder = home() / "lab" / "baselines" / f"{source.name}-{source.fingerprint[:8]}"
    planned_runs = plan_our_runs(settings, source, folder) + plan_baseline_runs(settings, source, folder)
    if settings.force:
        shutil.rmtree(folder, ignore_errors=True)
    points: dict[str, list[Result]] = {}
    for planned_run in planned_runs:
        if not planned_run.path.exists():
            display.print(f"{planned_run.path.stem} ...")
            seconds, bpb = planned_run.run()
            write_json(planned_run.path, {"seconds": seconds, "bpb": bpb})
        result = read_json(planned_run.path)
        points.setdefault(planned_run.system, []).append((result["seconds"], result["bpb"]))
        display.print(f"{planned_run.system}: {result['bpb']:.3f} bits per byte after {result['seconds']:.0f} s")
    if settings.out:
        title = "Bits per byte of held-out text, by seconds of training"
        write_atomic(settings.out, log_x_line_chart(title, points, "s"))
    table = Table("", "seconds", "bits per byte")
    for system, results in points.items():
        for seconds, bpb in results:
            table.add_row(system, f"{seconds:.0f}", f"{bpb:.3f}")
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"points": points}))


def plan_our_runs(settings: BaselinesSettings, source: Source, folder: Path) -> list[PlannedRun]:
    planned = []
    for minutes in parse_numbers("--minutes", settings.minutes, 0.01, float):
        for seed in range(settings.seeds):
            label = f"{minutes}-{seed}"
            pretrain_settings = pretrain.PretrainSettings(
                name=f"baselines-{source.fingerprint[:8]}-{label}",
                data=settings.data,
                minutes=minutes,
                seed=seed,
                force=settings.force,
            )
            run = partial(run_nanoghost, pretrain_settings)
            planned.append(PlannedRun("nanoghost", folder / f"nanoghost-{label}.json", run))
    return planned


def plan_baseline_runs(settings: BaselinesSettings, source: Source, folder: Path) -> list[PlannedRun]:
    """The runs of the baselines that the settings name. Raises UserError if one is not a clone."""
    planned = []
    for name, script, run in (
        ("nanochat", "scripts/base_train.py", run_nanochat),
        ("nanogpt", "train.py", run_nanogpt),
    ):
        clone = getattr(settings, name)
        lengths = parse_numbers(f"--{name}-steps", getattr(settings, f"{name}_steps"))
        if not clone:
            continue
        if not (clone / script).exists():
            raise UserError(f"--{name}: {clone} is not a clone of {name} ({script} is missing)")
        clone = clone.resolve()
        workspace = folder / f"{name}-{sha256(str(clone).encode()).hexdigest()[:8]}"
        for steps in lengths:
            path = workspace.with_name(f"{workspace.name}-{steps}.json")
            planned.append(PlannedRun(name, path, partial(run, clone, source, workspace, steps)))
    return planned


def run_nanoghost(settings: pretrain.PretrainSettings) -> Result:
    model_folder = ModelFolder(settings.name)
    figures = pretrain.main(settings) or model_folder.card.figures  # None if it was finished by an earlier command
    shutil.rmtree(model_folder.path)
    return figures["seconds"], figures["bpb"]


def run_nanochat(clone: Path, source: Source, workspace: Path, steps: int) -> Result:
    environment = {"NANOCHAT_BASE_DIR": str(workspace), "PYTHONPATH": str(clone), "WANDB_MODE": "disabled"}
    if not (workspace / "tokenizer" / "token_bytes.pt").exists():
        data = workspace / "base_data_climbmix"
        data.mkdir(parents=True, exist_ok=True)
        for shard, split in enumerate(("train", "test")):  # nanochat validates on the last shard
            table = pa.table({"text": split_into_chunks(source, split)})
            pq.write_table(table, data / f"shard_{shard:05d}.parquet", row_group_size=512)
        run_python(["-m", "scripts.tok_train", "--vocab-size=4096"], clone, environment)
    characters = sum(len(chunk) for chunk in split_into_chunks(source, "test"))
    eval_batches = max(1, round(characters / 3 / NANOCHAT_BATCH_TOKENS))  # about three characters per token
    eval_tokens = eval_batches * NANOCHAT_BATCH_TOKENS
    flags = [*NANOCHAT_FLAGS, f"--num-iterations={steps}", f"--eval-tokens={eval_tokens}"]
    log = run_python(["-m", "scripts.base_train", *flags], clone, environment)
    milliseconds = re.findall(r"^step .*\| dt: ([\d.]+)ms", log, re.MULTILINE)
    bpbs = re.findall(r"Validation bpb: ([\d.]+)", log)
    return round(sum(map(float, milliseconds)) / 1000, 1), float(bpbs[-1])


def split_into_chunks(source: Source, split: str) -> list[str]:
    """The text of a split in chunks of whole lines, about CHUNK_CHARACTERS long."""
    chunks = [""]
    for document in source.documents():
        if document.split != split:
            continue
        for line in re.split(r"(?<=\n)", document.text):
            if len(chunks[-1]) + len(line) > CHUNK_CHARACTERS:
                chunks.append("")
            chunks[-1] += line
    return [chunk for chunk in chunks if chunk]


def run_nanogpt(clone: Path, source: Source, workspace: Path, steps: int) -> Result:
    shutil.copytree(clone, workspace, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    texts = {split: "".join(d.text for d in source.documents() if d.split == split) for split in ("train", "test")}
    write_nanogpt_data(workspace / "data" / "nanoghost", texts)
    lengths = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}"]
    log = run_python(["train.py", *NANOGPT_FLAGS, *lengths], workspace, {})
    nats_per_character = float(re.findall(r"val loss ([\d.]+)", log)[-1])
    milliseconds = re.findall(r"^iter \d+: .*time ([\d.]+)ms", log, re.MULTILINE)
    step_seconds = [float(text) / 1000 for text in milliseconds]
    limit = 10 * statistics.median(step_seconds)  # the two steps that also evaluate take much longer
    seconds = sum(min(duration, limit) for duration in step_seconds)
    bpb = nats_per_character / math.log(2) * len(texts["test"]) / len(texts["test"].encode())
    return round(seconds, 1), round(bpb, 4)


def write_nanogpt_data(folder: Path, texts: dict[str, str]) -> None:
    """Write a data set in nanoGPT's format: character ids as uint16, and the vocabulary."""
    folder.mkdir(exist_ok=True)
    characters = sorted(set("".join(texts.values())))
    ids = {character: i for i, character in enumerate(characters)}
    for name, split in (("train", "train"), ("val", "test")):
        text_ids = [ids[character] for character in texts[split]]
        np.array(text_ids, dtype=np.uint16).tofile(folder / f"{name}.bin")
    meta = {"vocab_size": len(ids), "stoi": ids, "itos": dict(enumerate(characters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def run_python(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Run a program of a baseline; returns its output. If it fails, raises UserError with its last line of errors."""
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    if process.returncode:
        last_line = (process.stderr.strip() or "it printed no error").split("\n")[-1]
        raise UserError(f"{' '.join(arguments[:3])} in {folder} failed: {last_line}")
    return process.stdout
