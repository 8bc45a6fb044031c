"""Datasets of the Hugging Face Hub: their parquet and JSON files, pinned to the current revision."""

import re
import sys
from fnmatch import fnmatch

from nanoghost.data.file_reader import ALL_SUFFIXES, text_suffix
from nanoghost.data.remote import RemoteFiles, list_files
from nanoghost.data.retry import request_errors
from nanoghost.data.sources import Source, folder_name
from nanoghost.errors import UserError

MAX_HUB_BYTES = 1_000_000_000
"""Maximum amount of text from one dataset. Some have terabytes (FineWeb-Edu)."""

NON_COMMERCIAL = {"climbmix": "CC BY-NC 4.0"}
"""Datasets whose license forbids commercial use, by a part of their name: copies do not always repeat the license."""


def open_hub(spec: str, max_bytes: int = MAX_HUB_BYTES) -> Source:
    """The training split of the dataset "hub:OWNER/NAME[:CONFIG]"."""
    name, _, config = spec.removeprefix("hub:").partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"'{spec}' is not a Hub dataset: write hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
    try:
        import huggingface_hub  # optional
    except ImportError:
        raise UserError("data from the Hub needs an extra: pip install 'nanoghost[hub]'") from None
    try:
        info = huggingface_hub.HfApi().dataset_info(name, timeout=30)
    except (ValueError, *request_errors()) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot read '{name}' from the Hub (is the name right, is there a network?): {reason}"
        ) from error
    card = info.card_data or {}
    license = license_of(name, card)
    if re.search(r"\bnc\b", license, re.IGNORECASE):
        print(f"warning: {name} is {license}: models made from it may not be used commercially", file=sys.stderr)

    fs = huggingface_hub.HfFileSystem()
    root = fs._strip_protocol(f"datasets/{name}@{info.sha}")
    files = {file.path.removeprefix(root + "/"): file for file in list_files(fs, root, spec, ALL_SUFFIXES)}
    paths = training_files(list(files), card.get("configs") or [], config)
    if not paths:
        raise UserError(f"{spec}: no file for training among {', '.join(list(files)[:5])} ...")
    return RemoteFiles(fs, root, [files[path] for path in paths], max_bytes).source(
        folder_name(name.replace("/", "--") + ("-" + config if config else "")),
        license,
        attribution=f"https://huggingface.co/datasets/{name} at revision {info.sha}",
    )


def license_of(name: str, card: dict) -> str:
    for part, license in NON_COMMERCIAL.items():
        if part in name.lower():
            return license
    return str(card.get("license") or "unknown")


def training_files(paths: list[str], configs: list[dict], config: str) -> list[str]:
    """The files that the dataset card lists for the split "train"; without such a list, files chosen by their names."""
    if config:
        configs = [c for c in configs if c.get("config_name") == config]
    configs = sorted(configs, key=lambda c: not c.get("default"))  # the default config first
    if configs and configs[0].get("data_files"):
        patterns = training_patterns(configs[0]["data_files"])
        return [path for path in paths if any(fnmatch(path, pattern) for pattern in patterns)]
    folder = (configs[0].get("data_dir") if configs else None) or config
    if folder:
        paths = [path for path in paths if path.startswith(f"{folder}/")]
    readable = [path for path in paths if text_suffix(path) in (".parquet", ".jsonl")]  # not README.md
    readable = readable or [path for path in paths if text_suffix(path) == ".json"]  # often settings
    return [path for path in readable if "train" in path] or readable


def training_patterns(data_files: str | dict | list) -> list[str]:
    """File patterns of the split "train" in the `data_files` of a dataset card, which has several forms."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns = []
    for entry in entries:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry["split"] == "train":
            path = entry["path"]
            patterns += [path] if isinstance(path, str) else path
    return patterns
