"""The input of the refine pipeline: one file of JSON lines for each task."""

import json
import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from nanoghost.data.sources import Source
from nanoghost.home import read_json, write_json

TASK_BYTES = 2**22
"""Text per task: the unit of work, which is repeated after a kill. A stage opens one file for each task, so the size
grows by this much every TASKS_PER_SIZE tasks: 1,000 tasks hold 35 GB."""
TASKS_PER_SIZE = 64


def write_input(source: Source, folder: Path) -> int:
    """Write the documents into 00000.jsonl, 00001.jsonl ...; returns the number of files. Resumes after a kill."""
    folder.mkdir(exist_ok=True)
    position_file = folder / "position.json"
    if position_file.exists():
        position = read_json(position_file)
    else:
        position = {"files": 0, "documents": 0, "complete": False}
    documents = whole_documents(source, position["documents"])
    while not position["complete"]:
        size, parts = 0, 0
        max_size = TASK_BYTES * (1 + position["files"] // TASKS_PER_SIZE)
        complete = True
        with open(folder / ".partial", "w") as f:
            for name, text, part_count in documents:
                f.write(json.dumps({"name": name, "text": text}) + "\n")
                size += len(text.encode())
                parts += part_count
                if size >= max_size:
                    complete = False
                    break
        os.replace(folder / ".partial", folder / f"{position['files']:05d}.jsonl")
        position = {
            "files": position["files"] + 1,
            "documents": position["documents"] + parts,
            "complete": complete,
        }
        write_json(position_file, position)
    return position["files"]


def whole_documents(source: Source, skip: int) -> Iterator[tuple[str, str, int]]:
    """Yield (name, text, number of parts). The splits of cut documents are joined: the output is split again."""
    for name, documents in groupby(source.documents(skip), key=lambda document: document.name):
        parts = [document.text for document in documents]
        yield name, "".join(parts), len(parts)
