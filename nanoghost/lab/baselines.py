"""`nanoghost lab baselines`: other people's small trainers beside ours, on this machine, the same text and the same split.

Every point is a run of its own, to the end of its schedule: seconds of training (compiling included, reading the text and the last
evaluation not; ours with the rehearsal and nine looks at the validation text, theirs without any) and bits per byte of the test text.
Peers run in a clone that you name, unchanged, as their own pages tell for a CPU, with the Python that runs nanoghost (install what they
need beside it).

    nanochat   depth 4, heads of 64, whole attention, 256 tokens, 16 rows at once, 8,192 tokens a step, vocabulary of 4,096 by its own
               tokenizer. It drops what does not fit into its rows, so texts are handed over in pieces of about 700 characters.
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
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import parse_numbers
from nanoghost.data.registry import open_source
from nanoghost.data.sources import Source
from nanoghost.errors import UserError
from nanoghost.evals.svg import log_x_line_chart
from nanoghost.home import ModelFolder, home, read_json, write_atomic, write_json
from nanoghost.progress import Display
from nanoghost.train import pretrain

PIECE = 700  # characters
NANOCHAT = (
    "--depth=4", "--head-dim=64", "--window-pattern=L", "--max-seq-len=256", "--device-batch-size=16", "--total-batch-size=8192",
    "--core-metric-every=-1", "--sample-every=-1",
)  # fmt: skip
NANOGPT = (
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--log_interval=1", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0", "--eval_iters=200",
)  # fmt: skip


@dataclass(frozen=True)
class BaselinesSettings:
    minutes: str = "0.5,1,2,4"
    """Lengths of our runs."""
    nanochat: Path | None = None
    """A clone of karpathy/nanochat."""
    nanochat_steps: str = "40,80,120"
    """Lengths of its runs."""
    nanogpt: Path | None = None
    """A clone of karpathy/nanoGPT."""
    nanogpt_steps: str = "2000"
    """Lengths of its runs."""
    data: str = "plays"
    """Text, as in `pretrain`."""
    seeds: int = 1
    """Our runs of each length; the peers have one seed."""
    force: bool = False
    """Forget what was measured, ours and theirs: after a change of the recipe it no longer holds. After Ctrl-C go on without it."""
    out: Path | None = None
    """Draw the curves into this SVG file."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: BaselinesSettings) -> None:
    hardware.prepare()
    source, display = open_source(settings.data), Display()
    folder = home() / "lab" / "race" / f"{source.name}-{source.fingerprint[:8]}"
    if settings.seeds < 1:
        raise UserError("--seeds must be at least 1")
    runs = []
    for minutes in parse_numbers("--minutes", settings.minutes, 0.01, float):
        for seed in range(settings.seeds):
            label = f"{minutes}-{seed}"
            name = f"race-{source.fingerprint[:8]}-{label}"
            run = partial(
                ours,
                pretrain.PretrainSettings(
                    name=name, data=settings.data, minutes=minutes, seed=seed, force=settings.force
                ),
            )
            runs.append(("nanoghost", folder / f"nanoghost-{label}.json", run))
    for name, script, train in (("nanochat", "scripts/base_train.py", nanochat), ("nanogpt", "train.py", nanogpt)):
        clone, lengths = getattr(settings, name), parse_numbers(f"--{name}-steps", getattr(settings, f"{name}_steps"))
        if clone and not (clone / script).exists():
            raise UserError(f"{clone} is no clone of {name}")
        if clone:
            place = folder / f"{name}-{sha256(str(clone.resolve()).encode()).hexdigest()[:8]}"
            runs += [
                (name, place.with_name(f"{place.name}-{n}.json"), partial(train, clone.resolve(), source, place, n))
                for n in lengths
            ]
    if settings.force:
        shutil.rmtree(folder, ignore_errors=True)
    points: dict[str, list] = {}
    for name, path, run in runs:
        if not path.exists():
            display.print(f"{path.stem} ...")
            write_json(path, dict(zip(("seconds", "bpb"), run())))
        found = read_json(path)
        points.setdefault(name, []).append((found["seconds"], found["bpb"]))
        display.print(f"{name}: {found['bpb']:.3f} bits per byte after {found['seconds']:.0f} s")
    if settings.out:
        write_atomic(settings.out, log_x_line_chart("Bits per byte of held-out text, by seconds of training", points, "s"))
    table = Table("", "seconds", "bits per byte")
    for name, found in points.items():
        for seconds, bpb in found:
            table.add_row(name, f"{seconds:.0f}", f"{bpb:.3f}")
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"points": points}))


def ours(settings: pretrain.PretrainSettings) -> tuple[float, float]:
    figures = pretrain.main(settings) or ModelFolder(settings.name).card.figures
    shutil.rmtree(ModelFolder(settings.name).path)
    return figures["seconds"], figures["bpb"]


def told(words: list, folder: Path, **environment) -> str:
    """What a command prints; a failure is told with its last line."""
    found = subprocess.run(
        list(map(str, words)), cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    if found.returncode:
        raise UserError(
            f"{' '.join(map(str, words[:4]))} in {folder} failed: {(found.stderr.strip().splitlines() or ['no word'])[-1]}"
        )
    return found.stdout


def nanochat(clone: Path, source: Source, place: Path, steps: int) -> tuple[float, float]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kept = {"NANOCHAT_BASE_DIR": str(place), "PYTHONPATH": str(clone), "WANDB_MODE": "disabled"}
    texts = place / "base_data_climbmix"
    if not (place / "tokenizer" / "token_bytes.pt").exists():
        texts.mkdir(parents=True, exist_ok=True)
        for number, split in enumerate(("train", "test")):
            pq.write_table(
                pa.table({"text": pieces(source, split)}), texts / f"shard_{number:05d}.parquet", row_group_size=512
            )
        told([sys.executable, "-m", "scripts.tok_train", "--vocab-size=4096"], clone, **kept)
    length = sum(len(p) for p in pieces(source, "test"))
    scored = f"--eval-tokens={max(1, round(length / 3 / 4096)) * 4096}"
    said = told(
        [
            sys.executable,
            "-m",
            "scripts.base_train",
            *NANOCHAT,
            f"--num-iterations={steps}",
            "--eval-every=100000",
            scored,
        ],
        clone,
        **kept,
    )
    seconds = sum(map(float, re.findall(r"^step .*\| dt: ([\d.]+)ms", said, re.MULTILINE))) / 1000
    return round(seconds, 1), float(re.findall(r"Validation bpb: ([\d.]+)", said)[-1])


def pieces(source: Source, split: str) -> list[str]:
    """The text in pieces of about PIECE characters, each of whole lines."""
    found = [""]
    for document in source.documents():
        for line in document.text.splitlines(keepends=True) if document.split == split else ():
            if len(found[-1]) + len(line) > PIECE:
                found.append("")
            found[-1] += line
    return [piece for piece in found if piece]


def nanogpt(clone: Path, source: Source, place: Path, steps: int) -> tuple[float, float]:
    shutil.copytree(clone, place, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    texts = {split: "".join(d.text for d in source.documents() if d.split == split) for split in ("train", "test")}
    letters = {letter: i for i, letter in enumerate(sorted(set("".join(texts.values()))))}
    data = place / "data" / "race"
    data.mkdir(exist_ok=True)
    for name, split in (("train", "train"), ("val", "test")):
        np.array([letters[c] for c in texts[split]], dtype=np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(letters), "stoi": letters, "itos": {i: c for c, i in letters.items()}})
    )
    lengths = (
        f"--max_iters={steps}",
        f"--lr_decay_iters={steps}",
        f"--eval_interval={steps}",
        "--dataset=race",
        "--out_dir=out-race",
    )
    said = told([sys.executable, "train.py", *NANOGPT, *lengths], place)
    nats = float(re.findall(r"val loss ([\d.]+)", said)[-1])
    times = [float(t) / 1000 for t in re.findall(r"^iter \d+: .*time ([\d.]+)ms", said, re.MULTILINE)]
    typical = statistics.median(times)  # the time of the two steps that evaluate is not training
    bpb = nats / math.log(2) * len(texts["test"]) / len(texts["test"].encode())
    return round(sum(min(t, 10 * typical) for t in times), 1), round(bpb, 4)
