"""LoRA adapters on disk, as folders in PEFT's form.

An adapter is named BASE@NAME; its base is read from the folder BASE next to it.

M and N are the widths of a matrix's input and output, R is the rank.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from nanoghost.errors import UserError
from nanoghost.formats.safetensors_file import read_tensors
from nanoghost.home import finish_time, read_card, read_json, write_atomic, write_json
from nanoghost.model.lora import MODULES, Adapter


def check_base(folder: Path) -> None:
    """An adapter of ours is of use only beside the model that it was made for."""
    base = folder.with_name(folder.name.partition("@")[0])
    card = read_card(folder).parent
    while "@" in card.name:
        card = card.parent
    if finish_time(base / "card.json") != card.finished:
        raise UserError(
            f"adapter '{folder.name}' was made for another model '{base.name}' than the one that is there now"
        )


def save_adapter(folder: Path, adapter: Adapter, base: str | None = None) -> None:
    """Write the settings and the weights, the weights last. `base`: its name, if the folder is not called BASE@NAME."""
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base or folder.name.partition("@")[0],
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "target_modules": [MODULES[name].split(".")[1] for name in adapter.targets],
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        },
    )
    tensors = {
        _their_name(*key, part): t.detach().cpu().contiguous()
        for key, (a_RM, b_NR, _) in adapter.pairs.items()
        for part, t in (("A", a_RM), ("B", b_NR))
    }
    write_atomic(folder / "adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))


def read_adapter(folder: Path, config, dtype: torch.dtype) -> Adapter:
    """The adapter of a folder, ours or another's, for a base of this configuration. What cannot be represented raises UserError."""
    if (folder / "card.json").exists():
        check_base(folder)
    c = read_json(folder / "adapter_config.json")
    refuse = {
        f"the method {c.get('peft_type')}": c.get("peft_type") != "LORA",
        "DoRA": c.get("use_dora"),
        "biases of its own": c.get("bias", "none") != "none",
        "whole modules of its own": c.get("modules_to_save"),
        "ranks that differ": c.get("rank_pattern") or c.get("alpha_pattern"),
    }
    if reasons := [reason for reason, applies in refuse.items() if applies]:
        raise UserError(f"the adapter in {folder} has {' and '.join(reasons)}, which nanoghost cannot represent")
    rank, alpha = c["r"], float(c["lora_alpha"])
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    pairs = {}
    for layer in range(config.depth):
        for name, (N, M) in config.matrix_shapes().items():
            names = [_their_name(layer, name, part) for part in "AB"]
            if names[0] in tensors or names[1] in tensors:
                found = [tensors.pop(n, None) for n in names]
                shapes = [None if t is None else tuple(t.shape) for t in found]
                if shapes != [(rank, M), (N, rank)]:
                    raise UserError(f"the adapter in {folder} does not fit the base's {name} of layer {layer}")
                scale = alpha / (rank**0.5 if c.get("use_rslora") else rank)
                pairs[layer, name] = (*(nn.Parameter(t.to(dtype)) for t in found), scale)
    if tensors or not pairs:
        raise UserError(f"the adapter in {folder} is not for this base: {min(tensors, default='it holds no weights')}")
    return Adapter(rank, alpha, pairs)


def _their_name(layer: int, name: str, part: str) -> str:
    return f"base_model.model.model.layers.{layer}.{MODULES[name]}.lora_{part}.weight"
