"""LoRA: low-rank updates of the matrices of a frozen model (Hu et al. 2021).

    y = x W^T + scale (x A^T) B^T        A is random at the start and B is zero, so the model starts as its base

An adapter takes a few megabytes. Several adapters share one base, and each row of a batch uses the adapter that it
names. On disk an adapter is a folder in PEFT's form (formats/peft.py).

B batch, T time, M and N width of a matrix's input and output, R rank, X = B * T.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nanoghost.model.layers import Linear
from nanoghost.model.tensor_names import MATRIX_MODULES

MatrixKey = tuple[int, str]
"""(layer, name of the matrix, a key of tensor_names.MATRIX_MODULES)."""


class LowRankUpdate(NamedTuple):
    """scale * B @ A, to be added to a matrix."""

    a_RM: torch.Tensor
    b_NR: torch.Tensor
    scale: float


@dataclass
class Adapter:
    """The updates of one adapter."""

    rank: int
    """Rank of each update."""
    alpha: float
    """LoRA alpha, as in PEFT: scale is alpha / rank."""
    updates: dict[MatrixKey, LowRankUpdate]

    def tensors(self) -> list[torch.Tensor]:
        return [t for a_RM, b_NR, _ in self.updates.values() for t in (a_RM, b_NR)]

    @property
    def targets(self) -> list[str]:
        """Names of the matrices that have an update in some layer."""
        names = {name for _, name in self.updates}
        return [name for name in MATRIX_MODULES if name in names]

    def summary(self) -> dict:
        """Description of the adapter for the model card."""
        parameters = sum(t.numel() for t in self.tensors())
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "parameters": parameters}


AdapterRows = list[tuple[torch.Tensor | None, Adapter]]
"""For each adapter in use the rows of the batch that use it; None: all rows."""


def rows_by_adapter(adapters: list[Adapter], adapters_B: torch.Tensor | None) -> AdapterRows:
    """`adapters_B`: index of each row's adapter, -1 for none. It may be omitted if there is at most one adapter."""
    if adapters_B is None:
        assert len(adapters) <= 1, "with several adapters, adapters_B must name the adapter of each row"
        return [(None, adapter) for adapter in adapters]
    rows = [(adapters_B == i).nonzero()[:, 0] for i in range(len(adapters))]
    return [(adapter_rows, adapter) for adapter_rows, adapter in zip(rows, adapters) if len(adapter_rows)]


class LoRALinear(Linear):
    """A linear layer plus the updates of the adapters in use."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, *, key: MatrixKey):
        super().__init__(in_features, out_features, bias)
        self.key = key

    def forward(self, x_BTM, adapter_rows: AdapterRows = ()):
        y_BTN = super().forward(x_BTM)
        for rows, adapter in adapter_rows:
            if self.key in adapter.updates:
                y_BTN = add_update(y_BTN, x_BTM, rows, adapter.updates[self.key])
        return y_BTN


def add_update(y_BTN, x_BTM, rows: torch.Tensor | None, update: LowRankUpdate):
    """y = x W^T plus the update in these rows; None: in all."""
    a_RM, b_NR, scale = update
    if rows is None:
        h_XR = (x_BTM.flatten(0, 1) @ a_RM.T) * scale
        return torch.addmm(y_BTN.flatten(0, 1), h_XR, b_NR.T).view_as(y_BTN)
    return y_BTN.index_add(0, rows, (x_BTM[rows] @ a_RM.T) @ b_NR.T * scale)


def attach_adapters(model, adapters: list[Adapter]) -> None:
    """The model computes with these adapters from now on; its own weights are frozen."""
    model.requires_grad_(False)
    model.adapters = adapters


def new_adapter(model, rank: int, alpha: float | None, targets: str | None, seed: int) -> Adapter:
    """An adapter that changes nothing yet. `targets`: comma-separated names of matrices; None: all matrices."""
    names = targets.split(",") if targets else list(MATRIX_MODULES)
    # With scale 32 / rank, one learning rate fits all ranks (Schulman et al. 2025, "LoRA Without Regret")
    alpha = 32.0 if alpha is None else alpha
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for layer, block in enumerate(model.blocks):
        for name in names:
            w_NM = block.matrix(name)
            N, M = w_NM.shape
            a_RM = torch.empty(rank, M).uniform_(-1, 1, generator=generator) * M**-0.5
            a_RM, b_NR = nn.Parameter(a_RM.to(w_NM)), nn.Parameter(w_NM.new_zeros(N, rank))
            updates[layer, name] = LowRankUpdate(a_RM, b_NR, alpha / rank)
    return Adapter(rank, alpha, updates)


def merge_adapter(model):
    """Add the model's one adapter to its matrices, in place, and detach it. A model without adapters stays as it is."""
    for _, adapter in rows_by_adapter(model.adapters, None):
        for (layer, name), (a_RM, b_NR, scale) in adapter.updates.items():
            matrix = model.blocks[layer].matrix(name).data
            matrix.copy_(matrix.float() + scale * (b_NR.detach().float() @ a_RM.detach().float()))
    model.adapters = []
    return model
