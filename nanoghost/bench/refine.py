"""`nanoghost bench refine`: quality of near deduplication, and memory, time and crash safety of `data refine`.

Quality is measured on two editions of Shakespeare (editions.py). The larger texts, for memory and time, are lines drawn
at random from the same files, those of the held-out plays excepted.
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
    """Sizes of the texts to refine, comma-separated: memory must not grow with them. Empty: the editions only."""
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


def start_refine(folder: Path, data: str, home: Path, *flags: str) -> subprocess.Popen:
    """`data refine` as a process of its own, with a home folder that has the archive of the plays."""
    archive = fetch_plays()
    plays = home / "data" / "plays"
    plays.mkdir(parents=True, exist_ok=True)
    if not (plays / archive.name).exists():
        (plays / archive.name).symlink_to(archive)
    program = [sys.executable, "-m", "nanoghost", "data", "refine", str(folder / data), "--name", "refined", *flags]
    environment = os.environ | {"NANOGHOST_HOME": str(home)}
    return subprocess.Popen(program, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def output_folder(home: Path) -> Path:
    return home / "data" / "refined"


def refine(folder: Path, data: str, *flags: str) -> Path:
    """Refine to the end; returns the folder of the output."""
    home = Path(tempfile.mkdtemp(dir=folder))
    start_refine(folder, data, home, *flags).wait()
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
    """JSON lines of documents of 1 to 100 kB, of lines drawn at random."""
    works = PLAYS_TEST + PLAYS_VAL
    held_out = tuple(editions.FOLIO_TITLES.get(work, work) for work in works) + works
    lines = []
    for file in sorted(texts.iterdir()):
        if not file.stem.removeprefix("shkspr-").startswith(held_out):
            lines += [line for line in file.read_text().splitlines() if len(line.split()) > 3]
    rng = random.Random(seed)
    folder.mkdir()
    bytes_left = megabytes * 10**6
    with open(folder / "text.jsonl", "w") as f:
        while bytes_left > 0:
            text = "\n".join(rng.choices(lines, k=int(10 ** rng.uniform(1.4, 3.4))))
            f.write(json.dumps({"text": text}) + "\n")
            bytes_left -= len(text.encode())


def measure_run(folder: Path, data: str, megabytes: int) -> dict:
    """Time and peak memory; stores the manifest for `measure_killed_runs`."""
    home = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    process = start_refine(folder, data, home)
    memory = 0
    while process.poll() is None:
        memory = max(memory, group_memory_bytes(process.pid))
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    manifest = read_json(output_folder(home) / "manifest.json")
    write_json(folder / f"{data}.json", manifest)
    return {
        "megabytes": megabytes,
        "documents": manifest["input"]["documents"],
        "output": manifest["output"]["documents"],
        "seconds": round(seconds, 1),
        "megabytes_per_second": round(megabytes / seconds, 2),
        "memory_megabytes": round(memory / 2**20),
        "same": True,
        "kills": 0,
    }


def measure_killed_runs(folder: Path, data: str, megabytes: int, kills: int, seconds: float, seed: int = 0) -> dict:
    """Kill the run at random moments and resume it; compare the checksums of the output. `seconds`: of a whole run."""
    home = Path(tempfile.mkdtemp(dir=folder))
    rng = random.Random(seed)
    start = time.perf_counter()
    done = 0
    while True:
        process = start_refine(folder, data, home)
        try:
            process.wait(rng.uniform(0.1, 0.5) * seconds if done < kills else None)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
    same = True
    for name, expected in read_json(folder / f"{data}.json")["files"].items():
        same = same and sha256_of(output_folder(home) / name) == expected["sha256"]
    return {"megabytes": megabytes, "seconds": round(time.perf_counter() - start, 1), "kills": done, "same": same}


def print_figures(figures: dict, console: Console) -> None:
    table = Table(
        "words",
        "n",
        "lowest of the chosen pairs",
        "lowest of the other pairs",
        "highest of all others",
        "expected recall",
        "of the hardest pair",
        title="Jaccard similarity of sets of n words in a row",
    )
    for row in figures["similarities"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    quality = figures["editions"]
    console.print(f"{quality['clustered_pairs']} pairs found, {quality['pairs']} exist")
    console.print(f"precision {quality['precision']:.1%}, recall {quality['recall']:.1%}")
    console.print(f"recall of the pairs that were not used to choose the form {quality['recall_of_other_pairs']:.1%}")
    console.print(json.dumps(quality["by_default"], indent=2))
    for row in figures["rows"]:
        console.print("  ".join(f"{key} {value}" for key, value in row.items()))
