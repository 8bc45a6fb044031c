"""Rotary position embedding (RoPE, Su et al. 2021): the angle of each pair of channels of a head at each position.

RoPE scaling extends the context beyond the trained one: position interpolation (Chen et al. 2023), Llama 3's blend of
wavelengths, or YaRN (Peng et al. 2023).
"""

import math

import torch


def rope_table(length: int, head_width: int, base: float, scaling: dict | None = None):
    """cos and sin of every position and frequency: two (length, K/2) tensors."""
    frequencies, magnitude = rope_frequencies(head_width, base, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def rope_frequencies(head_width: int, base: float, scaling: dict | None):
    """(radians per token of each pair of channels, (K/2,) fp64; factor on cos and sin).

    `scaling`: `rope_scaling` of a Hugging Face config, of one of the ROPE_TYPES.
    """
    half = head_width // 2
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    if not scaling:
        return frequencies, 1.0
    return ROPE_TYPES[rope_scaling_type(scaling)](frequencies, base, scaling)


def rope_scaling_type(scaling: dict) -> str:
    return scaling.get("rope_type") or scaling.get("type") or "default"


def _default(frequencies, base, scaling):
    return frequencies, 1.0


def _linear(frequencies, base, scaling):
    """Position interpolation: positions are divided by a factor."""
    return frequencies / scaling["factor"], 1.0


def _llama3(frequencies, base, scaling):
    """Long wavelengths are interpolated, short ones are kept, those between are blended."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the trained context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * keep + frequencies / scaling["factor"] * (1 - keep), 1.0


def _yarn(frequencies, base, scaling):
    """As in Llama 3, but blended over channels; queries and keys grow a little, which makes attention sharper."""
    factor, half = scaling["factor"], len(frequencies)
    trained_context = scaling["original_max_position_embeddings"]

    def channel_of(turns: float) -> float:
        """The channel, as a fraction, that rotates this many times over the trained context."""
        return half * math.log(trained_context / (turns * 2 * math.pi)) / math.log(base)

    low = channel_of(scaling.get("beta_fast") or 32.0)
    high = channel_of(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    channels = torch.arange(half, dtype=torch.float64)
    interpolate = ((channels - low) / max(high - low, 0.001)).clamp(0, 1)
    blended = frequencies / factor * interpolate + frequencies * (1 - interpolate)
    return blended, _yarn_magnitude(scaling)


def _yarn_magnitude(scaling: dict) -> float:
    """Factor on cos and sin (YaRN, section 3.4); mscale and mscale_all_dim are DeepSeek's."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return magnitude(mscale) / magnitude(mscale_all_dim)
    return magnitude(1.0)


ROPE_TYPES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
