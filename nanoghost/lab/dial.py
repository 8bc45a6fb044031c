"""`nanoghost lab dial`: is what the dial chooses for the minutes one has the best that could be chosen?

Every choice of layers and vocabulary is trained for the same minutes by `pretrain` itself, and judged on the validation text. The
dial's own choice stands among them; how far it is from the best is told in percent of the bits per byte.
"""

import json
import re
import shutil
import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nanoghost import machine
from nanoghost.data.sources import open_source
from nanoghost.errors import UserError
from nanoghost.lists import numbers
from nanoghost.progress import Display
from nanoghost.runs import ModelFolder, home, read_json, write_json
from nanoghost.train import pretrain


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
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: DialSettings) -> None:
    machine.prepare()
    minutes = numbers("--minutes", settings.minutes, 0.01, float)
    choices = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)x(\d+)", settings.choices)]
    if ",".join(f"{depth}x{vocabulary}" for depth, vocabulary in choices) != settings.choices:
        raise UserError(f"--choices are like 4x4096,6x4096 (layers x vocabulary), not '{settings.choices}'")
    source, display, rows = open_source(settings.data), Display(), []
    for m in minutes:
        usual = (pretrain.depth_here(m, 1)[0], pretrain.PretrainSettings.vocab_size)
        for depth, vocabulary in sorted({*choices, usual}):
            runs = [run(settings.data, source, m, depth, vocabulary, seed, display) for seed in range(settings.seeds)]
            mean = {key: statistics.mean(r[key] for r in runs) for key in ("validation_bpb", "bpb", "seconds", "steps")}
            rows.append({"minutes": m, "depth": depth, "vocabulary": vocabulary, "dial": (depth, vocabulary) == usual, **mean})
    for row in rows:
        best = min(r["validation_bpb"] for r in rows if r["minutes"] == row["minutes"])
        row["from_best"] = row["validation_bpb"] / best - 1
    table = Table("minutes", "layers", "vocabulary", "", "validation bpb", "from the best", "test bpb", "seconds", "steps")
    for r in rows:
        figures = f"{r['validation_bpb']:.4f}", f"{r['from_best']:+.1%}", f"{r['bpb']:.4f}", f"{r['seconds']:.0f}", f"{r['steps']:.0f}"
        table.add_row(f"{r['minutes']:g}", str(r["depth"]), f"{r['vocabulary']:,}", "the dial" if r["dial"] else "", *figures)
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"rows": rows}))


def run(data: str, source, minutes: float, depth: int, vocabulary: int, seed: int, display) -> dict:
    """Figures of one run; from its file if it was made before. Ctrl-C loses nothing: it goes on where it was."""
    label = f"{source.fingerprint[:8]}-{minutes:g}-{depth}x{vocabulary}-{seed}"
    path = home() / "lab" / "dial" / f"{label}.json"
    if not path.exists():
        asked = pretrain.PretrainSettings(name=f"dial-{label}", data=data, depth=depth, vocab_size=vocabulary, minutes=minutes, seed=seed)
        figures = pretrain.main(asked, display) or ModelFolder(asked.name).card["figures"]
        write_json(path, figures)
        shutil.rmtree(ModelFolder(asked.name).path)
    return read_json(path)
