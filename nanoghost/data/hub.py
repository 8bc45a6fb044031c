"""Data sets of the Hub: their parquet and JSON lines, pinned to today's revision."""

import re
import sys
from fnmatch import fnmatch

from nanoghost.data.remote import listed, source_of
from nanoghost.data.sources import Source, folder_name
from nanoghost.errors import UserError

HUB_BYTES = 1_000_000_000
"""Take at most this much text: many sets hold more than any disk (FineWeb-Edu: terabytes)."""

NON_COMMERCIAL = {"climbmix": "CC BY-NC 4.0"}
"""Sets whose license forbids commercial use, by a part of their name (copies don't always carry the license over)."""


def open_hub(spec: str, max_bytes: int = HUB_BYTES) -> Source:
    """The training rows of a data set by "hub:owner/name[:config]"."""
    name, _, config = spec.removeprefix("hub:").partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"'{spec}' is not a Hub data set: write hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("data from the Hub needs an extra: pip install 'nanoghost[hub]'") from None
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=30)
    except Exception as error:  # an edge: HTTP clients and their versions each raise their own
        why = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot read '{name}' from the Hub (is the name right, is there a network?): {why}") from error
    card = info.card_data or {}
    license = str(card.get("license") or "unknown")
    license = next((known for part, known in NON_COMMERCIAL.items() if part in name.lower()), license)
    if re.search(r"\bnc\b", license, re.IGNORECASE):
        print(f"warning: {name} is {license}: models made from it may not be used commercially", file=sys.stderr)

    fs = huggingface_hub.HfFileSystem()
    root = fs._strip_protocol(f"datasets/{name}@{info.sha}")
    files = {f.path.removeprefix(root + "/"): f for f in listed(fs, root, spec)}
    chosen = training_files(list(files), card.get("configs") or [], config)
    if not chosen:
        raise UserError(f"{spec}: no file for training among {', '.join(list(files)[:5])} ...")
    return source_of(
        fs,
        [files[path] for path in chosen],
        root,
        folder_name(name.replace("/", "--") + ("-" + config if config else "")),
        license,
        f"https://huggingface.co/datasets/{name} at revision {info.sha}",
        max_bytes,
    )


def training_files(paths: list[str], configs: list[dict], config: str) -> list[str]:
    """Those that the data set's card names for the split "train"; without such a card, by their names."""
    named = [c for c in configs if c.get("config_name") == config] if config else configs
    named = sorted(named, key=lambda c: not c.get("default"))  # the default first, if one is marked
    if named and named[0].get("data_files"):
        entries = named[0]["data_files"]
        entries = [entries] if isinstance(entries, (str, dict)) else entries
        entries = [e if isinstance(e, dict) else {"split": "train", "path": e} for e in entries]
        patterns = [
            p
            for e in entries
            if e["split"] == "train"
            for p in ([e["path"]] if isinstance(e["path"], str) else e["path"])
        ]
        return [path for path in paths if any(fnmatch(path, pattern) for pattern in patterns)]
    folder = (named[0].get("data_dir") if named else None) or config
    inside = [path for path in paths if path.startswith(f"{folder}/")] if folder else paths
    readable = [path for path in inside if path.endswith((".parquet", ".jsonl"))]  # not README.md
    return [path for path in readable if "train" in path] or readable
