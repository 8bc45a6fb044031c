"""LoRA: small corrections beside the matrices of a model that itself stays as it is (Hu et al. 2021).

    y = x W^T + scale (x A^T) B^T        A is random at the start and B zero: the model is exactly its base

An adapter takes a few megabytes. Several share one base, and each row of a batch goes through the one it asks for. On
disk an adapter is a folder in PEFT's form, named BASE@NAME; the base is read from the folder BASE beside it.

B batch, T time, M and N width of a matrix's input and output, R rank.
"""

from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from nanoghost.errors import UserError
from nanoghost.model.weights import load_model, read_tensors
from nanoghost.runs import ModelFolder, read_json, write_atomic, write_json

MODULES = {  # our names of the matrices, and PEFT's
    **{p: f"self_attn.{p}_proj" for p in "qkv"},
    "out": "self_attn.o_proj",
    **{p: f"mlp.{p}_proj" for p in ("gate", "up", "down")},
}


@dataclass
class Adapter:
    """One set of corrections."""

    rank: int
    """Of each of them."""
    alpha: float
    """Their strength, in PEFT's words: scale is alpha / rank."""
    pairs: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, float]]
    """(layer, matrix) -> (A (R, M), B (N, R), scale)."""

    def tensors(self) -> list[torch.Tensor]:
        return [t for a_RM, b_NR, _ in self.pairs.values() for t in (a_RM, b_NR)]

    @property
    def targets(self) -> list[str]:
        return [name for name in MODULES if any(name == matrix for _, matrix in self.pairs)]

    def summary(self) -> dict:
        """For the card."""
        parameters = sum(t.numel() for t in self.tensors())
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "parameters": parameters}


def correct(y_BTN, x_BTM, key: tuple[int, str], adapted):
    """Add to y = x W^T what the adapters of its rows say; `adapted` comes from `rows_of`, `key` is (layer, matrix)."""
    for rows, adapter in adapted:
        if key not in adapter.pairs:
            continue
        a_RM, b_NR, scale = adapter.pairs[key]
        if rows is None:
            h_XR = (x_BTM.flatten(0, 1) @ a_RM.T) * scale
            y_BTN = torch.addmm(y_BTN.flatten(0, 1), h_XR, b_NR.T).view_as(y_BTN)
        else:
            y_BTN = y_BTN.index_add(0, rows, (x_BTM[rows] @ a_RM.T) @ b_NR.T * scale)
    return y_BTN


def rows_of(adapters: list[Adapter], adapters_B: torch.Tensor | None) -> list[tuple[torch.Tensor | None, Adapter]]:
    """(rows, adapter) for each adapter in use; rows None stands for all of them.

    `adapters_B` numbers each row's adapter, -1 for none. It may be left out where there is only one.
    """
    if adapters_B is None:
        assert len(adapters) <= 1, "with several adapters a batch must say which row uses which"
        return [(None, adapter) for adapter in adapters]
    rows = [(adapters_B == i).nonzero()[:, 0] for i in range(len(adapters))]
    return [(some, adapter) for some, adapter in zip(rows, adapters) if len(some)]


def attach(model, adapters: list[Adapter]) -> None:
    """From here on the model computes with these adapters, and nothing else of it can be trained."""
    model.requires_grad_(False)
    model.adapters = adapters


def check(rank: int, targets: str | None) -> None:
    """Whether such an adapter can be made; to be called before any work is done."""
    if rank < 1:
        raise UserError(f"--lora is the rank of the adapter, at least 1, not {rank}")
    if unknown := set((targets or "q").split(",")) - set(MODULES):
        raise UserError(f"--lora-targets knows {', '.join(MODULES)}, not '{', '.join(sorted(unknown))}'")


def whole_name(settings, parent: ModelFolder) -> str:
    """BASE@NAME, of a new adapter on `parent` or of one that goes on with the parent's."""
    if settings.lora is not None:
        if parent.card["arch"] == "ghost":
            raise UserError(f"--lora is for models of the Llama family, and '{parent.name}' is a ghost")
        if "@" in parent.name:
            raise UserError(f"'{parent.name}' has an adapter already, which goes on as it is: leave out --lora")
        check(settings.lora, settings.lora_targets)
    return f"{parent.base}@{settings.name.removeprefix(f'{parent.base}@')}"


def check_base(folder: Path) -> None:
    """An adapter of ours is of use only beside the model that it was made for."""
    base = folder.with_name(folder.name.partition("@")[0])
    card = read_json(folder / "card.json")["parent"]
    while "@" in card["name"]:
        card = card["parent"]
    if read_json(base / "card.json").get("finished") != card["finished"]:
        raise UserError(
            f"adapter '{folder.name}' was made for another model '{base.name}' than the one that is there now"
        )


def new_adapter(model, rank: int, alpha: float | None, targets: str | None, seed: int) -> Adapter:
    """An adapter that changes nothing yet. `targets` is a list with commas; None: all matrices."""
    names = targets.split(",") if targets else list(MODULES)
    # Scale 32 / rank: then one learning rate does for all ranks (Schulman et al. 2025, "LoRA Without Regret")
    alpha = 32.0 if alpha is None else alpha
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer, block in enumerate(model.blocks):
        for name in names:
            w_NM = getattr(block, name)[0]
            a_RM = torch.empty(rank, w_NM.size(1)).uniform_(-1, 1, generator=generator) * w_NM.size(1) ** -0.5
            pairs[layer, name] = (
                nn.Parameter(a_RM.to(w_NM)),
                nn.Parameter(w_NM.new_zeros(len(w_NM), rank)),
                alpha / rank,
            )
    return Adapter(rank, alpha, pairs)


def merged(model):
    """The model with its one adapter added to its matrices (in place), which needs no LoRA to run; others as they are."""
    for _, adapter in rows_of(model.adapters, None):
        for (layer, name), (a_RM, b_NR, scale) in adapter.pairs.items():
            matrix = getattr(model.blocks[layer], name).data[0]
            matrix.copy_(matrix.float() + scale * (b_NR.detach().float() @ a_RM.detach().float()))
    model.adapters = []
    return model


# ── folders in PEFT's form ──────────────────────────────────────────────────────────────────────────────────────────


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


def load_adapted(folders: list[Path], dtype: torch.dtype, device="cpu"):
    """(base with the adapters of these folders on it, in their order, tokenizer); they must have the same base."""
    base = folders[0].with_name(folders[0].name.partition("@")[0])
    model, tokenizer = load_model(base, dtype, device)
    attach(model, [read_adapter(folder, model.config, dtype) for folder in folders])
    return model, tokenizer


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
