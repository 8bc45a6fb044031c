"""Reading safetensors files."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanoghost.errors import UserError


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, FileNotFoundError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None
