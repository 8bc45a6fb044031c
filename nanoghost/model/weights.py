"""Model folders on disk: what Hugging Face transformers and others read, and checkpoints for an exact resume."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from nanoghost.chat import CHAT_TEMPLATE
from nanoghost.errors import UserError
from nanoghost.runs import read_json, write_atomic, write_json
from nanoghost.tokenizer import Tokenizer

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def architecture(model_type: str):
    """(configuration class, model class), imported when they are needed."""
    if model_type == "nanoghost":
        from nanoghost.model.ghost import Ghost, GhostConfig

        return GhostConfig, Ghost
    if model_type in FAMILY:
        from nanoghost.model.llama import Llama, LlamaConfig

        return LlamaConfig, Llama
    known = ", ".join(("nanoghost", *FAMILY))
    raise UserError(f"a model of kind '{model_type}' cannot run here; nanoghost knows {known}")


def save_model(folder: Path, model, tokenizer: Tokenizer) -> None:
    """Write config, weights, tokenizer and chat template; the weights last. Of an adapted model only the adapter."""
    if model.adapters:
        from nanoghost.model.lora import save_adapter

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
        from nanoghost.model.lora import load_adapted

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
        from nanoghost.template import Dialect

        ends = set(eos if isinstance(eos, list) else [eos])
        tokenizer.dialect = Dialect(said["chat_template"], names, ends)
    return tokenizer


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, FileNotFoundError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None
