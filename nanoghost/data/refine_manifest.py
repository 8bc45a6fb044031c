"""The manifest of refined text: how much was dropped for which reason, and where the text comes from."""

import json
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nanoghost.data.sources import Source, sha256_of
from nanoghost.errors import UserError
from nanoghost.home import read_json, read_json_lines


def build_manifest(name: str, data: str, settings: dict, source: Source, work: Path) -> dict:
    """Count the documents in `work`. Raises UserError if none is left."""
    dropped = {}
    for folder in sorted((work / "output" / "dropped").glob("*")):
        dropped[folder.name] = dropped_counts(folder)
    files = {}
    for file in sorted((work / "output").glob("*.jsonl")):
        with open(file, "rb") as lines:
            sizes = [len(json.loads(line)["text"].encode()) for line in lines]
        files[file.name] = {"documents": len(sizes), "bytes": sum(sizes), "sha256": sha256_of(file)}
    if not files:
        raise UserError(f"nothing is left of {data}: {json.dumps(dropped)}")
    output_counts = {key: sum(f[key] for f in files.values()) for key in ("documents", "bytes")}
    input_counts = {key: output_counts[key] + sum(d[key] for d in dropped.values()) for key in output_counts}
    return {
        "format": 2,
        "name": name,
        "source": source.summary(),
        "refine_settings": settings,
        "held_out": read_json(work / "held_out.json"),
        "input": input_counts,
        "output": output_counts,
        "dropped": dropped,
        "files": files,
        "datatrove": metadata.version("datatrove"),
    }


def dropped_counts(folder: Path) -> dict:
    """Counts of the documents that were dropped for one reason, and of each detail of that reason."""
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        rows += read_json_lines(file)
    details = sorted({row["detail"] for row in rows if row.get("detail") is not None})
    by_detail = {detail: totals([row for row in rows if row["detail"] == detail]) for detail in details}
    return totals(rows) | {"details": by_detail}


def totals(rows: list[dict]) -> dict:
    return {"documents": len(rows), "bytes": sum(row["bytes"] for row in rows)}


def print_manifest(manifest: dict, folder: Path, console: Console) -> None:
    table = Table("", "documents", "bytes", title=f"{manifest['name']} ({manifest['source']['license']})")
    rows = {"input": manifest["input"]}
    for reason, counts in manifest["dropped"].items():
        rows[f"dropped: {reason}"] = counts
        for detail, detail_counts in counts["details"].items():
            rows[f"    {detail}"] = detail_counts
    rows["output"] = manifest["output"]
    for label, counts in rows.items():
        table.add_row(label, f"{counts['documents']:,}", f"{counts['bytes']:,}")
    console.print(table)
    console.print(f"{manifest['source']['attribution']}\nin {folder}", soft_wrap=True)
