"""Rotary position embedding: which angle each pair of a head's channels turns by at each position.

Su et al. 2021; stretched to longer contexts than were trained by position interpolation (Chen et al. 2023), by Llama 3's
blend of wavelengths, or by YaRN (Peng et al. 2023).
"""

import math

import torch


def rope_table(length: int, head_width: int, base: float, scaling: dict | None = None):
    """cos and sin of every position and frequency: two (length, K/2) tensors."""
    frequency, size = frequencies(head_width, base, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return (angle.cos() * size).float(), (angle.sin() * size).float()


def frequencies(head_width: int, base: float, scaling: dict | None):
    """(radians per token of each pair, (K/2,) fp64; what cos and sin are multiplied by).

    `scaling` is Hugging Face's `rope_scaling`, of the kinds that `KINDS` names.
    """
    plain = base ** -(torch.arange(0, head_width // 2, dtype=torch.float64) / (head_width // 2))
    return KINDS[kind_of(scaling)](plain, base, scaling) if scaling else (plain, 1.0)


def kind_of(scaling: dict) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _default(frequency, base, s):
    return frequency, 1.0


def _linear(frequency, base, s):
    """Positions are divided by a factor."""
    return frequency / s["factor"], 1.0


def _llama3(frequency, base, s):
    """Long waves are stretched, short ones are not, those between are blended."""
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)  # of each wave, over the trained context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * keep + frequency / s["factor"] * (1 - keep), 1.0


def _yarn(frequency, base, s):
    """As Llama 3's, with a ramp over channels; queries and keys grow a little, which sharpens attention."""
    factor, half, trained = s["factor"], len(frequency), s["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        """Where the wave makes so many turns over the trained context."""
        return half * math.log(trained / (turns * 2 * math.pi)) / math.log(base)

    low, high = channel(s.get("beta_fast") or 32.0), channel(s.get("beta_slow") or 1.0)
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretch = ((torch.arange(half, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)

    def sharper(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    size = s.get("attention_factor")
    if size is None:
        m, every = s.get("mscale"), s.get("mscale_all_dim")
        size = sharper(m) / sharper(every) if m and every else sharper(1.0)
    return frequency / factor * stretch + frequency * (1 - stretch), size


KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
