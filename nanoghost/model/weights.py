"""Model folders on disk: what Hugging Face transformers and others read, and checkpoints for an exact resume."""

import importlib
import json
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from nanoghost.chat import CHAT_TEMPLATE
from nanoghost.errors import UserError
from nanoghost.runs import read_json, write_atomic, write_json
from nanoghost.tokenizer import Tokenizer

ARCHITECTURES = {"nanoghost": "ghost.Ghost"} | dict.fromkeys(
    ("llama", "mistral", "qwen2", "qwen3", "smollm3"), "llama.Llama"
)


def architecture(model_type: str):
    """(configuration class, model class), imported when they are needed."""
    if model_type not in ARCHITECTURES:
        raise UserError(f"a model of kind '{model_type}' cannot run here; nanoghost knows {', '.join(ARCHITECTURES)}")
    module, name = ARCHITECTURES[model_type].split(".")
    module = importlib.import_module(f"nanoghost.model.{module}")
    return getattr(module, f"{name}Config"), getattr(module, name)


def save_model(folder: Path, model, tokenizer: Tokenizer) -> None:
    """Write config, weights, tokenizer and chat template; the weights last."""
    dialect = tokenizer.dialect
    names = tokenizer.names
    ends = {"eos_token_id": sorted(dialect.ends) if dialect else tokenizer.special(names["eos_token"])}
    if "bos_token" in names:
        ends["bos_token_id"] = tokenizer.special(names["bos_token"])
    write_json(folder / "config.json", model.settings() | ends)
    write_json(folder / "generation_config.json", ends | {"do_sample": True, "temperature": 0.8, "top_p": 0.95})
    tokenizer.save(folder)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "model_max_length": model.config.context,
            "chat_template": dialect.source if dialect else CHAT_TEMPLATE,
        },
    )
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.exported_tensors().items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def load_model(folder: Path, dtype: torch.dtype, device="cpu"):
    """(model in the compute dtype, tokenizer) of a model folder. Unreadable weights raise UserError."""
    settings = read_json(folder / "config.json")
    config_class, model_class = architecture(settings["model_type"])
    model = model_class(config_class.from_settings(settings))
    tensors, _ = read_tensors(folder / "model.safetensors")
    expected = {name: tuple(t.shape) for name, t in model.exported_tensors().items()}
    if wrong := [n for n, shape in expected.items() if n not in tensors or tuple(tensors[n].shape) != shape]:
        raise UserError(f"the weights in {folder} do not fit its config.json (first: {wrong[0]})")
    model.import_tensors(tensors)
    return model.cast(dtype).to(device), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, and how its model writes conversations."""
    tokenizer = Tokenizer.load(folder)
    said, generation = read_json(folder / "tokenizer_config.json"), read_json(folder / "generation_config.json")
    if said["chat_template"] != CHAT_TEMPLATE:
        names = {key: said[key] for key in ("bos_token", "eos_token") if said.get(key)}
        eos = generation["eos_token_id"]
        template = importlib.import_module("nanoghost.template")  # only adopted models need Jinja
        ends = set(eos if isinstance(eos, list) else [eos])
        tokenizer.dialect = template.Dialect(said["chat_template"], names, ends)
    return tokenizer


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, FileNotFoundError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None


def copy_licences(source: Path, target: Path, before: str = "", after: str = "") -> None:
    """What must travel with the weights, from folder to folder; with names that begin otherwise `before` and `after`."""
    for path in source.iterdir():
        name = path.name.removeprefix(before)
        if before + name == path.name and re.fullmatch(r"(?i)(licen[cs]e[-\w]*|notice|copying)(\.txt|\.md)?", name):
            shutil.copyfile(path, target / (after + name))


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, kind of number) of each tensor of a safetensors file; takes no memory for the numbers."""
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None


def save_checkpoint(
    folder: Path, step: int, optimizer_state: dict[str, torch.Tensor], notes: dict, rank: int = 0
) -> None:
    """One file, one rename: masters, moments and the step they belong to, all or nothing."""
    metadata = {"step": str(step), "notes": json.dumps(notes)}
    content = safetensors.torch.save({k: t.cpu().contiguous() for k, t in optimizer_state.items()}, metadata)
    write_atomic(folder / "state" / f"checkpoint-{rank}.safetensors", content)


def load_checkpoint(folder: Path, rank: int = 0) -> tuple[int, dict[str, torch.Tensor], dict] | None:
    """(step, optimizer state, notes) of the last checkpoint, or None if there is none yet."""
    path = folder / "state" / f"checkpoint-{rank}.safetensors"
    if not path.exists():
        return None
    tensors, metadata = read_tensors(path)
    return int(metadata["step"]), tensors, json.loads(metadata["notes"])
