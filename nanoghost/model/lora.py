"""LoRA: small corrections beside the matrices of a model that itself stays as it is (Hu et al. 2021).

    y = x W^T + scale (x A^T) B^T        A is random at the start and B zero: the model is exactly its base

An adapter takes a few megabytes. Several share one base, and each row of a batch goes through the one it asks for. On
disk an adapter is a folder in PEFT's form, named BASE@NAME; the base is read from the folder BASE beside it.

B batch, T time, M and N width of a matrix's input and output, R rank.
"""

from dataclasses import dataclass

import torch
from torch import nn

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
