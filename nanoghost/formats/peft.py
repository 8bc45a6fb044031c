"""LoRA adapters on disk: folders in PEFT's format.

An adapter is named BASE@NAME; its base is read from the folder BASE next to it.

M and N are the numbers of inputs and outputs of a matrix, R is the rank.
"""

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from nanoghost.errors import UserError
from nanoghost.formats.safetensors_file import read_tensors
from nanoghost.home import finish_time, read_card, read_json, write_atomic, write_json
from nanoghost.model.lora import Adapter, LowRankUpdate
from nanoghost.model.tensor_names import peft_name, peft_target


def base_folder(folder: Path) -> Path:
    """Folder of the model that an adapter belongs to."""
    base_name, _, _ = folder.name.partition("@")
    return folder.with_name(base_name)


def check_base(folder: Path) -> None:
    """Raise UserError if the base was replaced by another model since this adapter was trained on it."""
    base_card = read_card(folder).parent
    while "@" in base_card.name:
        base_card = base_card.parent
    base = base_folder(folder)
    if finish_time(base / "card.json") != base_card.finished:
        raise UserError(
            f"adapter '{folder.name}' was trained on another model '{base.name}' than the one that is there now:"
            " train the adapter again, or restore its base"
        )


def save_adapter(folder: Path, adapter: Adapter, base: str | None = None) -> None:
    """Write settings and weights, the weights last. `base`: name of the base, if the folder is not named BASE@NAME."""
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base or base_folder(folder).name,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "target_modules": [peft_target(name) for name in adapter.targets],
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        },
    )
    tensors = {}
    for (layer, name), (a_RM, b_NR, _) in adapter.updates.items():
        tensors[peft_name(layer, name, "A")] = a_RM.detach().cpu().contiguous()
        tensors[peft_name(layer, name, "B")] = b_NR.detach().cpu().contiguous()
    write_atomic(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def read_adapter(folder: Path, config, dtype: torch.dtype) -> Adapter:
    """The adapter of a folder that nanoghost or PEFT wrote, for a base with this config.

    Raises UserError if the adapter does not fit the base or has features that nanoghost does not support.
    """
    if (folder / "card.json").exists():
        check_base(folder)
    settings = read_json(folder / "adapter_config.json")
    unsupported = list(_unsupported_features(settings))
    if unsupported:
        raise UserError(f"the adapter in {folder} has {' and '.join(unsupported)}, which nanoghost does not support")
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    updates = {}
    for layer in range(config.depth):
        for name, (N, M) in config.matrix_shapes().items():
            a_RM = tensors.pop(peft_name(layer, name, "A"), None)
            b_NR = tensors.pop(peft_name(layer, name, "B"), None)
            if a_RM is None and b_NR is None:
                continue
            if a_RM is None or b_NR is None or a_RM.shape != (rank, M) or b_NR.shape != (N, rank):
                raise UserError(f"the adapter in {folder} does not fit the base's {name} of layer {layer}")
            factors = nn.Parameter(a_RM.to(dtype)), nn.Parameter(b_NR.to(dtype))
            updates[layer, name] = LowRankUpdate(*factors, scale)
    if tensors:
        raise UserError(f"the adapter in {folder} has a tensor that does not fit this base: {min(tensors)}")
    if not updates:
        raise UserError(f"the adapter in {folder} holds no weights")
    return Adapter(rank, alpha, updates)


def _unsupported_features(settings: dict) -> Iterator[str]:
    if settings.get("peft_type") != "LORA":
        yield f"the method {settings.get('peft_type')}"
    if settings.get("use_dora"):
        yield "DoRA"
    if settings.get("bias", "none") != "none":
        yield "biases"
    if settings.get("modules_to_save"):
        yield "whole modules (modules_to_save)"
    if settings.get("rank_pattern") or settings.get("alpha_pattern"):
        yield "ranks that differ between modules"
