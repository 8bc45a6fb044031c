"""Read safetensors files: all tensors, or only their shapes and types."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanoghost.errors import UserError


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, type such as "BF16") of each tensor; reads no tensor data."""
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None
