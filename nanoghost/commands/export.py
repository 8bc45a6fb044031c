"""`nanoghost export`: write a model as one GGUF file, for llama.cpp and the programs that are built on it.

Hugging Face transformers and vLLM load the model folder itself. A ghost model runs in nanoghost only.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoghost.commands.arguments import ModelArgument
from nanoghost.errors import UserError
from nanoghost.formats.gguf_writer import QUANTIZATIONS, Provenance, write_gguf
from nanoghost.formats.licenses import copy_license_files
from nanoghost.formats.model_card import ModelCard
from nanoghost.formats.model_folder import load_model
from nanoghost.home import open_model, rename_on_success
from nanoghost.model.lora import merge_adapter
from nanoghost.progress import JsonFlag

MAX_PREFIX = 200  # bytes: with the name of a license after it, a name may have 255


@dataclass(frozen=True)
class ExportSettings(ModelArgument, JsonFlag):
    gguf: bool = False
    """Write a GGUF file. This is the default and the only format."""
    quant: str = "f16"
    """Type of the matrices: f32, f16, bf16, q8_0, q4_1 or q4_0."""
    out: Path | None = None
    """File to write; default: NAME.QUANT.gguf in the current folder."""
    force: bool = False
    """Replace the file if it exists."""


def main(settings: ExportSettings) -> dict:
    """Write the GGUF file; returns its path and size. An adapter is exported as one model, merged into its base.

    Raises UserError if the model or the settings do not allow it. A failed export leaves no file.
    """
    folder = open_model(settings.model)
    if settings.quant not in QUANTIZATIONS:
        raise UserError(f"--quant is '{settings.quant}'; expected one of {', '.join(QUANTIZATIONS)}")
    if folder.card.arch == "ghost":
        raise UserError(
            f"'{folder.name}' is a ghost, which other engines cannot run: train with `nanoghost pretrain --arch llama`"
        )
    path = settings.out or Path(f"{folder.name}.{settings.quant}.gguf")
    if path.exists() and not settings.force:
        raise UserError(f"{path} exists; choose another --out, or --force to replace it")
    model, tokenizer = load_model(folder.path, torch.float32)
    provenance = provenance_of(folder.name, folder.card, settings.quant)
    temporary = path.with_name(f".{os.getpid()}.gguf.tmp")  # short: names have 255 bytes
    with rename_on_success(temporary, path):
        write_gguf(temporary, merge_adapter(model), tokenizer, provenance, settings.quant)
    prefix = path.stem.encode()[:MAX_PREFIX].decode(errors="ignore")
    copy_license_files(folder.path, path.parent, add_prefix=f"{prefix}.")
    return {"name": folder.name, "path": str(path), "bytes": path.stat().st_size, "quant": settings.quant}


def provenance_of(name: str, card: ModelCard, quantization: str) -> Provenance:
    """Where the weights come from and what was changed: licenses require that derived weights state it."""
    sources = [f"{entry['name']} ({entry['license']}; {entry['attribution']})" for entry in card.data]
    changes = [entry["changes"] for entry in card.data if "changes" in entry]
    changes += [f"nanoghost {ancestor.stage}" for ancestor in card.lineage() if ancestor.stage != "adopt"]
    changes.append(f"matrices stored as {quantization.upper()}")
    licenses = dict.fromkeys(entry["license"] for entry in card.data)
    return Provenance(
        name=name,
        license=" and ".join(licenses),
        description=f"Made from {'; '.join(sources)}. Changed: {'; '.join(changes)}.",
    )


def command(settings: ExportSettings) -> None:
    figures = main(settings)
    print(f"{figures['path']}: {figures['bytes'] / 1e6:.1f} MB", file=sys.stderr)
    if settings.json:
        print(json.dumps(figures))
