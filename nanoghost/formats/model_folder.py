"""Model folders on disk: what Hugging Face transformers and others read, and checkpoints for an exact resume."""

from pathlib import Path

import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.peft import read_adapter, save_adapter
from nanoghost.formats.safetensors_file import read_tensors
from nanoghost.home import read_json, write_atomic, write_json
from nanoghost.model.lora import attach
from nanoghost.model.registry import architecture
from nanoghost.tokenizer.chat_format import CHAT_TEMPLATE
from nanoghost.tokenizer.jinja_template import Dialect
from nanoghost.tokenizer.tokenizer import Tokenizer


def save_model(folder: Path, model, tokenizer: Tokenizer) -> None:
    """Write config, weights, tokenizer and chat template; the weights last. Of an adapted model only the adapter."""
    if model.adapters:
        return save_adapter(folder, model.adapters[0])
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
    if (folder / "adapter_config.json").exists():
        return load_adapted([folder], dtype, device)
    config = load_config(folder)
    model = architecture(config.model_type)[1](config)
    tensors, _ = read_tensors(folder / "model.safetensors")
    expected = {name: tuple(t.shape) for name, t in model.exported_tensors().items()}
    if wrong := [n for n, shape in expected.items() if n not in tensors or tuple(tensors[n].shape) != shape]:
        raise UserError(f"the weights in {folder} do not fit its config.json (first: {wrong[0]})")
    model.import_tensors(tensors)
    return model.cast(dtype).to(device), load_tokenizer(folder)


def load_config(folder: Path):
    """The configuration that a model folder is of."""
    settings = read_json(folder / "config.json")
    return architecture(settings["model_type"])[0].from_settings(settings)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, and how its model writes conversations."""
    tokenizer = Tokenizer.load(folder)
    said, generation = read_json(folder / "tokenizer_config.json"), read_json(folder / "generation_config.json")
    if said["chat_template"] != CHAT_TEMPLATE:
        names = {key: said[key] for key in ("bos_token", "eos_token") if said.get(key)}
        eos = generation["eos_token_id"]
        ends = set(eos if isinstance(eos, list) else [eos])
        tokenizer.dialect = Dialect(said["chat_template"], names, ends)
    return tokenizer


def load_adapted(folders: list[Path], dtype: torch.dtype, device="cpu"):
    """(base with the adapters of these folders on it, in their order, tokenizer); they must have the same base."""
    base = folders[0].with_name(folders[0].name.partition("@")[0])
    model, tokenizer = load_model(base, dtype, device)
    attach(model, [read_adapter(folder, model.config, dtype) for folder in folders])
    return model, tokenizer
