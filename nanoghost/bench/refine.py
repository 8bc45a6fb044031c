"""`nanoghost bench refine`: quality of near deduplication, and memory, time and crash safety of `data refine`.

Quality is measured on two editions of Shakespeare (editions.py). The larger texts, for memory and time, consist of
random lines of the same files, without those of the held-out plays.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.bench import editions
from nanoghost.bench.processes import group_memory_bytes
from nanoghost.data.plays import PLAYS_TEST, PLAYS_VAL, fetch_plays
from nanoghost.data.sources import sha256_of
from nanoghost.errors import UserError
from nanoghost.home import read_json, write_json
from nanoghost.progress import JsonFlag


@dataclass(frozen=True)
class RefineBenchSettings(JsonFlag):
    megabytes: str = "10,100"
    """Sizes of the larger texts, comma-separated. Memory must not grow with the size. Empty: only the two editions."""
    kills: int = 0
    """Kill the run on the largest text this many times (SIGKILL, at random moments), and check that it resumes."""


def command(settings: RefineBenchSettings) -> None:
    sizes = parse_sizes(settings.megabytes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = folder / "texts"
        editions.extract_texts(texts)
        rows = []
        figures = {"similarities": editions.similarities(texts), "editions": measure_editions(folder), "rows": rows}
        for size in sizes:
            make_text(texts, folder / str(size), size)
            row = measure_run(folder, str(size), size)
            rows.append(row)
            if size == max(sizes) and settings.kills:
                rows.append(measure_killed_runs(folder, str(size), size, settings.kills, row["seconds"]))
    print_figures(figures, Console(stderr=True, markup=False, highlight=False))
    if settings.json:
        print(json.dumps(figures))


def parse_sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",") if size]
    except ValueError:
        raise UserError(f"--megabytes expects comma-separated whole numbers, not '{text}'") from None


# -- runs -------------------------------------------------------------------------------------------------------------


def start_refine(folder: Path, text: str, home: Path, *flags: str) -> subprocess.Popen:
    """Start `data refine` of folder/text in its own process, with a home folder that has the archive of the plays."""
    archive = fetch_plays()
    plays = home / "data" / "plays"
    plays.mkdir(parents=True, exist_ok=True)
    if not (plays / archive.name).exists():
        (plays / archive.name).symlink_to(archive)
    program = [sys.executable, "-m", "nanoghost", "data", "refine", str(folder / text), "--name", "refined", *flags]
    environment = os.environ | {"NANOGHOST_HOME": str(home)}
    return subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def output_folder(home: Path) -> Path:
    return home / "data" / "refined"


def refine(folder: Path, text: str, *flags: str) -> Path:
    """Refine folder/text; returns the folder of the output."""
    home = Path(tempfile.mkdtemp(dir=folder))
    start_refine(folder, text, home, *flags).wait()
    return output_folder(home)


def measure_editions(folder: Path) -> dict:
    """Recall and precision of near deduplication alone, and what the default settings drop from the editions."""
    deduplicated = refine(folder, "texts", "--decontaminate", "none", "--quality", "none")
    figures = editions.deduplication_quality(folder / "texts", deduplicated)
    refined = refine(folder, "texts")
    manifest = read_json(refined / "manifest.json")
    figures["by_default"] = {key: manifest[key] for key in ("input", "output", "dropped")}
    figures["names"] = {}
    for reason in manifest["dropped"]:
        figures["names"][reason] = editions.text_names((refined / "dropped" / reason).glob("*.jsonl"))
    return figures


def make_text(texts: Path, folder: Path, megabytes: int, seed: int = 0) -> None:
    """Write text.jsonl: documents of 1 to 100 kB, of random lines."""
    works = PLAYS_TEST + PLAYS_VAL
    held_out = tuple(editions.FOLIO_TITLES.get(work, work) for work in works) + works
    lines = []
    for file in sorted(texts.iterdir()):
        if not file.stem.removeprefix("shkspr-").startswith(held_out):
            lines += [line for line in file.read_text(encoding="utf-8").split("\n") if len(line.split()) > 3]
    rng = random.Random(seed)
    folder.mkdir()
    bytes_left = megabytes * 10**6
    with open(folder / "text.jsonl", "w") as f:
        while bytes_left > 0:
            line_count = int(10 ** rng.uniform(1.4, 3.4))  # 25 to 2,500
            text = "\n".join(rng.choices(lines, k=line_count))
            f.write(json.dumps({"text": text}) + "\n")
            bytes_left -= len(text.encode())


def measure_run(folder: Path, text: str, megabytes: int) -> dict:
    """Time and peak memory of a run. Stores its manifest for `measure_killed_runs`."""
    home = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    process = start_refine(folder, text, home)
    peak_memory = 0
    while process.poll() is None:
        peak_memory = max(peak_memory, group_memory_bytes(process.pid))
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    manifest = read_json(output_folder(home) / "manifest.json")
    write_json(folder / f"{text}.json", manifest)
    return {
        "megabytes": megabytes,
        "documents": manifest["input"]["documents"],
        "output": manifest["output"]["documents"],
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(megabytes / seconds, 2),
        "memory_megabytes": round(peak_memory / 2**20),
        "same": True,
        "kills": 0,
    }


def measure_killed_runs(folder: Path, text: str, megabytes: int, kills: int, seconds: float, seed: int = 0) -> dict:
    """Kill a run at random moments and resume it, then compare the checksums of the output with those of a whole run.

    `seconds`: duration of the whole run.
    """
    home = Path(tempfile.mkdtemp(dir=folder))
    rng = random.Random(seed)
    start = time.perf_counter()
    process = start_refine(folder, text, home)
    killed = 0
    while killed < kills:
        try:
            process.wait(rng.uniform(0.1, 0.5) * seconds)
            break  # finished before it could be killed
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            process = start_refine(folder, text, home)
    process.wait()
    files = read_json(folder / f"{text}.json")["files"]
    same = all(sha256_of(output_folder(home) / name) == expected["sha256"] for name, expected in files.items())
    return {"megabytes": megabytes, "seconds": round(time.perf_counter() - start, 1), "kills": killed, "same": same}


# -- output -----------------------------------------------------------------------------------------------------------


def print_figures(figures: dict, console: Console) -> None:
    table = Table(
        "words",
        "n",
        "lowest of the development pairs",
        "lowest of the test pairs",
        "highest of unrelated texts",
        "expected recall",
        "of the hardest pair",
        title="Jaccard similarity of the sets of n words in a row",
    )
    for row in figures["similarities"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    quality = figures["editions"]
    console.print(f"{quality['clustered_pairs']} pairs found, {quality['pairs']} exist")
    console.print(f"precision {quality['precision']:.1%}, recall {quality['recall']:.1%}")
    console.print(f"recall of the test pairs {quality['recall_of_test_pairs']:.1%}")
    console.print(json.dumps(quality["by_default"], indent=2))
    for row in figures["rows"]:
        console.print("  ".join(f"{key} {value}" for key, value in row.items()))
