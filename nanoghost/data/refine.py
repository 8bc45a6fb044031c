"""`nanoghost data refine`: text without copies, near copies, junk and what models are examined on.

    $NANOGHOST_HOME/data/NAME/
        00000.jsonl ...     what is kept, one {"name", "text"} a line; "cluster" where others were nearly the same
        dropped/REASON/     names of what is not, with details
        manifest.json       counts by reason, license and attribution of the source, settings, SHA-256 of the files

`--data NAME` is then a source like any other. Until it is finished all lies in .refine-NAME, and the same command goes on
from there; the steps themselves are in refine_pipeline.py.
"""

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import chain, groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from nanoghost.data.shingles import shingles, word_hashes
from nanoghost.data.sources import Source, open_source, sha256_of
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, home, read_json, read_json_lines, write_json

SHARD = 2**22
"""Bytes of text to a task: what is done again after a kill, and how finely work is dealt out. Every 64 tasks it grows by as
much again, since a stage opens a file of each: 1,000 hold 35 GB."""
PROBLEMS = 500
"""Of each task; `nanoghost eval` asks as many."""
HELD_OUT_WORDS = 13
FEWEST_WORDS = 8
"""A text that shares 13 words in a row with the evaluation is contaminated, as in GPT-3 (Brown and others 2020, appendix C);
shorter problems count whole, below 8 words they can't be told from ordinary speech."""


@dataclass(frozen=True)
class RefineSettings:
    data: Annotated[str, tyro.conf.Positional]
    """What to refine: all that `nanoghost data` reads."""
    name: str
    """Name of the new data, for --data NAME."""
    similarity: float = 0.5
    """Share of three-word sequences in common from which two documents are nearly the same (spelling aside)."""
    quality: str = "gopher"
    """gopher: drop what is no prose by the rules of Gopher (Rae and others 2021); none."""
    decontaminate: str = "plays,tasks"
    """What must not be in it: plays (the held-out ones), tasks (their held-out problems), files; none."""
    workers: int = os.cpu_count() or 1
    """Processes; the result does not depend on them."""
    json: bool = False
    """Print the manifest as JSON on standard output."""


def command(settings: RefineSettings) -> None:
    manifest = refine(settings, Console(stderr=True, markup=False, highlight=False))
    if settings.json:
        print(json.dumps(manifest))


def refine(settings: RefineSettings, console: Console) -> dict:
    """Returns the manifest of what is there already, or is made now."""
    check(settings)
    refine_pipeline = import_pipeline()
    folder, work = home() / "data" / settings.name, home() / "data" / f".refine-{settings.name}"
    source = open_source(settings.data)
    work.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(work):  # its workers hold the lock, too: after a kill the next run waits for them
        if not (folder / "manifest.json").exists():
            stages = prepare(settings, source)[1]
            refine_pipeline.run(stages, work / "done", say=console.print, workers=settings.workers)
            write_json(work / "output" / "manifest.json", summary(settings, source, work))
            (work / "output").replace(folder)
        shutil.rmtree(work, ignore_errors=True)
    manifest = read_json(folder / "manifest.json")
    if manifest["asked"] != asked(settings, source):
        raise UserError(
            f"{settings.name} was made with other settings or of other text: remove {folder}, or take another --name"
        )
    show(manifest, folder, console)
    return manifest


def prepare(settings: RefineSettings, source: Source | None = None) -> tuple[Path, list]:
    """Write what the stages read; returns the folder they work in, and the stages."""
    source = source or open_source(settings.data)
    work = home() / "data" / f".refine-{settings.name}"
    work.mkdir(parents=True, exist_ok=True)
    if (work / "asked.json").exists() and read_json(work / "asked.json") != asked(settings, source):
        raise UserError(f"{settings.name} was begun with other settings or text: remove {work}, or take another --name")
    write_json(work / "asked.json", asked(settings, source))
    shards = stage_input(source, work / "input")
    build_index(settings.decontaminate, work / "held_out.npz")
    return work, import_pipeline().stages(work, shards, settings.similarity, settings.quality)


def asked(settings: RefineSettings, source: Source) -> dict:
    """What decides the result."""
    keys = ("similarity", "quality", "decontaminate")
    return {key: getattr(settings, key) for key in keys} | {"fingerprint": source.fingerprint}


def import_pipeline():
    try:
        from nanoghost.data import refine_pipeline
    except ImportError:
        raise UserError("refining needs an extra: pip install 'nanoghost[refine]'") from None
    return refine_pipeline


def check(settings: RefineSettings) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", settings.name) or settings.name in (
        "plays",
        "tokenizers",
        "cache",
    ):
        raise UserError(f"--name can't be '{settings.name}': use letters, digits, '.', '_' and '-'")
    if not 0.2 <= settings.similarity <= 0.95:
        raise UserError(f"--similarity is between 0.2 and 0.95, not {settings.similarity:g}")
    if settings.quality not in ("gopher", "none"):
        raise UserError(f"--quality is gopher or none, not '{settings.quality}'")
    if settings.workers < 1:
        raise UserError(f"--workers is at least 1, not {settings.workers}")


# ── what goes in ─────────────────────────────────────────────────────────────────────────────────────────────────────


def stage_input(source: Source, folder: Path) -> int:
    """Write the documents, whole, into files of about SHARD bytes; returns how many. Goes on where it was killed."""
    folder.mkdir(exist_ok=True)
    position = folder / "position.json"
    done = read_json(position) if position.exists() else {"shards": 0, "documents": 0, "complete": False}
    texts = whole_texts(source, done["documents"])
    while not done["complete"]:
        size, rows, last = 0, 0, None
        with open(folder / ".partial", "w") as f:
            for name, text, count in texts:
                f.write(json.dumps({"name": name, "text": text}) + "\n")
                size, rows = size + len(text.encode()), rows + count
                if size >= SHARD * (1 + done["shards"] // 64):
                    break
            else:
                last = True
        os.replace(folder / ".partial", folder / f"{done['shards']:05d}.jsonl")
        done = {"shards": done["shards"] + 1, "documents": done["documents"] + rows, "complete": bool(last)}
        write_json(position, done)
    return done["shards"]


def whole_texts(source: Source, skip: int) -> Iterator[tuple[str, str, int]]:
    """(name, text, parts): documents that were cut into splits are put together again; the new source splits anew."""
    for name, parts in groupby(source.documents(skip), key=lambda d: d.name):
        parts = [part.text for part in parts]
        yield name, "".join(parts), len(parts)


def build_index(names: str, file: Path) -> None:
    """Shingles of what is held out, by "NAME:WORDS"; beside it how many texts there were, and how many were too short."""
    if file.exists():
        return
    found, counts = defaultdict(list), {}
    for name in names.split(",") if names != "none" else ():
        counts[name] = {"texts": 0, "too_short": 0}
        for text in held_out(name):
            hashes = word_hashes(text)
            n = min(HELD_OUT_WORDS, len(hashes))
            if n >= FEWEST_WORDS:
                found[f"{name}:{n}"].append(shingles(hashes, n))
            counts[name]["texts"] += 1
            counts[name]["too_short"] += n < FEWEST_WORDS
    write_json(file.with_suffix(".json"), counts)
    with open(file.with_suffix(".partial"), "wb") as f:
        np.savez(f, **{key: np.unique(np.concatenate(arrays)) for key, arrays in found.items()})
    file.with_suffix(".partial").replace(file)


def held_out(name: str) -> Iterator[str]:
    if name == "tasks":
        from nanoghost.tasks.base import distinct_problems, text_of
        from nanoghost.tasks.registry import all_tasks

        tasks = all_tasks({"stage": "adopt", "parameters": 1}, "ghost")
        problems = chain.from_iterable(distinct_problems(task, PROBLEMS) for task in tasks.values())
        return ("\n".join(text_of(message) for message in problem.messages) for problem in problems)
    documents = open_source(name).documents()
    return (d.text for d in documents if name != "plays" or d.split != "train")


# ── what comes out ───────────────────────────────────────────────────────────────────────────────────────────────────


def summary(settings: RefineSettings, source: Source, work: Path) -> dict:
    """The manifest: counts by reason, and where the text comes from."""
    dropped = {}
    for folder in sorted((work / "output" / "dropped").glob("*")):
        rows = [row for file in sorted(folder.glob("*.jsonl")) for row in read_json_lines(file)]
        details = sorted({row.get("detail") for row in rows} - {None})
        dropped[folder.name] = count(rows) | {
            "details": {d: count([r for r in rows if r["detail"] == d]) for d in details}
        }
    files = {}
    for file in sorted((work / "output").glob("*.jsonl")):
        with open(file) as lines:
            sizes = [{"bytes": len(json.loads(line)["text"].encode())} for line in lines]
        files[file.name] = count(sizes) | {"sha256": sha256_of(file)}
    if not files:
        raise UserError(f"nothing is left of {settings.data}: {json.dumps(dropped)}")
    kept = {key: sum(f[key] for f in files.values()) for key in ("documents", "bytes")}
    read = {key: kept[key] + sum(d[key] for d in dropped.values()) for key in kept}
    about = {
        "name": source.name,
        "fingerprint": source.fingerprint,
        "license": source.license,
        "attribution": source.attribution,
    }
    return {"format": 1, "name": settings.name, "source": about, "asked": asked(settings, source),
            "held_out": read_json(work / "held_out.json"), "read": read, "kept": kept, "dropped": dropped,
            "files": files, "datatrove": metadata.version("datatrove")}  # fmt: skip


def count(rows: list[dict]) -> dict:
    return {"documents": len(rows), "bytes": sum(row["bytes"] for row in rows)}


def show(manifest: dict, folder: Path, console: Console) -> None:
    table = Table("", "documents", "bytes", title=f"{manifest['name']} ({manifest['source']['license']})")
    rows = {"read": manifest["read"]}
    for reason, counts in manifest["dropped"].items():
        rows[f"dropped: {reason}"] = counts
        rows |= {f"    {detail}": c for detail, c in counts["details"].items()}
    for what, counts in (rows | {"kept": manifest["kept"]}).items():
        table.add_row(what, f"{counts['documents']:,}", f"{counts['bytes']:,}")
    console.print(table)
    console.print(f"{manifest['source']['attribution']}\nin {folder}", soft_wrap=True)
