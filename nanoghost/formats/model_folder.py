"""Model folders on disk: config, weights, tokenizer and chat template, in the form of Hugging Face transformers.

A folder with `adapter_config.json` holds only a LoRA adapter, named BASE@NAME; its base is the folder BASE next to it.
"""

from pathlib import Path

import safetensors.torch
import torch

from nanoghost.errors import UserError
from nanoghost.formats.peft import base_folder, read_adapter, save_adapter
from nanoghost.formats.safetensors_file import read_tensors
from nanoghost.formats.stop_tokens import ids_of_field
from nanoghost.home import read_json, write_atomic, write_json
from nanoghost.model.lora import attach_adapters
from nanoghost.model.registry import config_from_json, config_to_json, new_model
from nanoghost.tokenizer.chat_format import CHAT_TEMPLATE, is_own_template
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer


def save_model(folder: Path, model, tokenizer: Tokenizer) -> None:
    """Write the files of a model folder, the weights last. If the model has an adapter, write only the adapter."""
    if model.adapters:
        save_adapter(folder, model.adapters[0])
        return
    template, special_tokens_map = tokenizer.chat_template, tokenizer.special_tokens_map
    token_ids = {"eos_token_id": sorted(tokenizer.stop_ids)}
    if "bos_token" in special_tokens_map:
        token_ids["bos_token_id"] = tokenizer.special_id(special_tokens_map["bos_token"])
    # Default sampling parameters for other programs.
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    write_json(folder / "config.json", config_to_json(model.config) | token_ids)
    write_json(folder / "generation_config.json", token_ids | sampling)
    tokenizer.save(folder)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **special_tokens_map,
            "model_max_length": model.config.context,
            "chat_template": template.to_json() if template else CHAT_TEMPLATE,
        },
    )
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.exported_tensors().items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def load_model(folder: Path, dtype: torch.dtype, device="cpu"):
    """(model in the compute dtype, tokenizer) of a model folder. Unreadable weights raise UserError."""
    if (folder / "adapter_config.json").exists():
        return load_with_adapters([folder], dtype, device)
    config = load_config(folder)
    model = new_model(config)
    tensors, _ = read_tensors(folder / "model.safetensors")
    for name, expected in model.exported_tensors().items():
        if name not in tensors or tensors[name].shape != expected.shape:
            raise UserError(
                f"the weights in {folder} do not fit its config.json, or are of another version (first: {name})"
            )
    model.import_tensors(tensors)
    return model.cast(dtype).to(device), load_tokenizer(folder)


def load_config(folder: Path):
    """GhostConfig or LlamaConfig of a model folder."""
    return config_from_json(read_json(folder / "config.json"))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer, with the chat template and the stop ids of its model if they are not nanoghost's own."""
    tokenizer = Tokenizer.load(folder)
    config = read_json(folder / "tokenizer_config.json")
    generation_config = read_json(folder / "generation_config.json")
    if not is_own_template(config["chat_template"]):
        special_tokens_map = {key: config[key] for key in ("bos_token", "eos_token") if config.get(key)}
        stop_ids = ids_of_field(generation_config["eos_token_id"])
        tokenizer.chat_template = ChatTemplate.from_json(config["chat_template"], special_tokens_map, stop_ids)
    return tokenizer


def load_with_adapters(folders: list[Path], dtype: torch.dtype, device="cpu"):
    """(model with the adapters of these folders in this order, tokenizer). All adapters must have the same base."""
    model, tokenizer = load_model(base_folder(folders[0]), dtype, device)
    attach_adapters(model, [read_adapter(folder, model.config, dtype) for folder in folders])
    return model, tokenizer
