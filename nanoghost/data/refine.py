"""`nanoghost data refine`: remove duplicates, near duplicates, text that is not prose, and evaluation text.

    $NANOGHOST_HOME/data/NAME/
        00000.jsonl ...     the output, one {"name", "text"} a line; "cluster" if near duplicates were removed
        dropped/REASON/     names of the dropped documents, with details
        manifest.json       counts by reason, license and attribution of the source, settings, SHA-256 of the files

`--data NAME` is then a source like any other. Until it is finished, everything is in .refine-NAME, and the same command
resumes there. The stages are in refine_pipeline.py.
"""

import json
import shutil
from pathlib import Path

from rich.console import Console

from nanoghost.data import refine_pipeline
from nanoghost.data.decontamination import build_index
from nanoghost.data.refine_input import write_input
from nanoghost.data.refine_manifest import build_manifest, print_manifest
from nanoghost.data.refine_settings import RefineSettings, check_settings
from nanoghost.data.registry import open_data_source
from nanoghost.data.sources import Source
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, home, read_json, write_json


def command(settings: RefineSettings) -> None:
    manifest = refine(settings, Console(stderr=True, markup=False, highlight=False))
    if settings.json:
        print(json.dumps(manifest))


def refine(settings: RefineSettings, console: Console) -> dict:
    """Refine the text, unless it is done already. Returns the manifest."""
    check_settings(settings)
    source = open_data_source(settings.data)
    folder, work = home() / "data" / settings.name, work_folder(settings)
    work.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(work):  # the workers inherit the lock: after a kill the next run waits for them
        if not (folder / "manifest.json").exists():
            _, stages = prepare(settings, source)
            refine_pipeline.run_stages(stages, work / "done", log=console.print, workers=settings.workers)
            manifest = build_manifest(settings.name, settings.data, result_settings(settings, source), source, work)
            write_json(work / "output" / "manifest.json", manifest)
            (work / "output").replace(folder)
        shutil.rmtree(work, ignore_errors=True)
    manifest = read_json(folder / "manifest.json")
    if manifest["refine_settings"] != result_settings(settings, source):
        raise UserError(
            f"{settings.name} was made with other settings or of other text: remove {folder}, or choose another --name"
        )
    print_manifest(manifest, folder, console)
    return manifest


def prepare(settings: RefineSettings, source: Source | None = None) -> tuple[Path, list[refine_pipeline.Stage]]:
    """Write the input of the stages. Returns their work folder, and the stages, for any executor of datatrove."""
    source = source or open_data_source(settings.data)
    work = work_folder(settings)
    work.mkdir(parents=True, exist_ok=True)
    stored = work / "settings.json"
    if stored.exists() and read_json(stored) != result_settings(settings, source):
        raise UserError(
            f"{settings.name} was started with other settings or text: remove {work}, or choose another --name"
        )
    write_json(stored, result_settings(settings, source))
    tasks = write_input(source, work / "input")
    build_index(settings.decontaminate, work / "held_out.npz")
    return work, refine_pipeline.build_stages(work, tasks, settings.similarity, settings.quality)


def work_folder(settings: RefineSettings) -> Path:
    return home() / "data" / f".refine-{settings.name}"


def result_settings(settings: RefineSettings, source: Source) -> dict:
    """Everything that the output depends on."""
    return {
        "similarity": settings.similarity,
        "quality": settings.quality,
        "decontaminate": settings.decontaminate,
        "fingerprint": source.fingerprint,
    }
