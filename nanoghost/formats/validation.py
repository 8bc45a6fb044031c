"""Validation of untrusted configs: types and ranges, checked before anything is allocated.

A config.json, a GGUF header or a tokenizer_config.json of unknown origin is validated against tables of checks
({key: Check}). Code behind `check_fields` can rely on the types and ranges.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from nanoghost.errors import UserError
from nanoghost.model.llama_config import MULTIPLIERS, rope_parameters, with_class_defaults
from nanoghost.model.rope import rope_scaling_type


@dataclass(frozen=True)
class Check:
    expected: str
    """What a valid value is, for the error message."""
    accepts: Callable[[object], bool]


def integer(low: int, high: int) -> Check:
    return Check(f"an integer from {low} to {high}", lambda x: type(x) is int and low <= x <= high)


def number(low: float, high: float) -> Check:
    """NaN is not in any range, so it is refused."""
    return Check(f"a number from {low:g} to {high:g}", lambda x: type(x) in (int, float) and low <= x <= high)


def one_of(*choices: str) -> Check:
    return Check(f"one of {', '.join(choices)}", lambda x: isinstance(x, str) and x in choices)


def optional(check: Check) -> Check:
    """The value may also be missing or null."""
    return Check(f"{check.expected}, or nothing", lambda x: x is None or check.accepts(x))


def list_of(check: Check) -> Check:
    """A list with at least one entry."""
    return Check(
        f"a non-empty list, each entry {check.expected}",
        lambda x: isinstance(x, list) and len(x) > 0 and all(check.accepts(entry) for entry in x),
    )


STRING = Check("a string", lambda x: isinstance(x, str))
BOOLEAN = Check("true or false", lambda x: isinstance(x, bool))
OBJECT = Check("an object", lambda x: isinstance(x, dict))
INTEGER_ARRAY = Check("an array of integers", lambda x: isinstance(x, np.ndarray) and x.dtype.kind in "iu")
TOKEN_ID = integer(0, 2**24)
TOKEN_IDS = Check(
    "a token id or a non-empty list of token ids", lambda x: TOKEN_ID.accepts(x) or list_of(TOKEN_ID).accepts(x)
)


def check_fields(values: Mapping, checks: Mapping[str, Check], source) -> None:
    """Raise UserError for the first value that fails its check. A missing value counts as None."""
    for key, check in checks.items():
        value = values.get(key)
        if not check.accepts(value):
            problem = "is missing" if value is None else f"is {reprlib.repr(value)}"
            raise UserError(f"{source}: {key} {problem}; expected {check.expected}")


# -- config.json of the Llama family ----------------------------------------------------------------------------------

# The ranges are wide. They exclude values that no published model has and that could exhaust the memory.
ROPE_THETA = optional(number(2, 1e12))
PARTIAL_ROTARY_FACTOR = optional(number(0, 1))
ROPE_CHECKS = {
    "rope_type": optional(STRING),
    "type": optional(STRING),
    "rope_theta": ROPE_THETA,
    "partial_rotary_factor": PARTIAL_ROTARY_FACTOR,
}
ROPE_FACTOR = {"factor": number(1, 2**20)}
ROPE_CONTEXT = {"original_max_position_embeddings": integer(1, 2**24)}
ROPE_SCALING_CHECKS = {  # rope_type -> fields that it needs
    "linear": ROPE_FACTOR,
    "llama3": {
        **ROPE_FACTOR,
        **ROPE_CONTEXT,
        "low_freq_factor": number(1e-3, 1e6),
        "high_freq_factor": number(1e-3, 1e6),
    },
    "yarn": {
        **ROPE_FACTOR,
        **ROPE_CONTEXT,
        "beta_fast": optional(number(1e-3, 1e6)),
        "beta_slow": optional(number(1e-3, 1e6)),
        "attention_factor": optional(number(0, 1e6)),
        "mscale": optional(number(0, 1e6)),
        "mscale_all_dim": optional(number(0, 1e6)),
        "truncate": optional(BOOLEAN),
    },
}

CONFIG_CHECKS = {
    "vocab_size": integer(1, 2**24),
    "max_position_embeddings": integer(1, 2**20),
    "num_hidden_layers": integer(1, 1024),
    "hidden_size": integer(1, 2**17),
    "num_attention_heads": integer(1, 1024),
    "num_key_value_heads": optional(integer(1, 1024)),
    "head_dim": optional(integer(2, 1024)),
    "intermediate_size": integer(1, 2**20),
    "rms_norm_eps": number(0, 1),
    "rope_theta": ROPE_THETA,
    "rope_scaling": optional(OBJECT),
    "rope_parameters": optional(OBJECT),
    "partial_rotary_factor": PARTIAL_ROTARY_FACTOR,
    "hidden_act": STRING,
    "tie_word_embeddings": optional(BOOLEAN),
    "attention_bias": optional(BOOLEAN),
    "mlp_bias": optional(BOOLEAN),
    "use_sliding_window": optional(BOOLEAN),
    "sliding_window": optional(integer(1, 2**24)),
    "max_window_layers": integer(0, 1024),
    "layer_types": optional(list_of(one_of("full_attention", "sliding_attention"))),
    "no_rope_layers": optional(list_of(integer(0, 1))),
    "no_rope_layer_interval": integer(1, 1024),
    "quantization_config": optional(OBJECT),
} | dict.fromkeys(MULTIPLIERS, number(1e-6, 1e6))


def check_llama_config(values: Mapping, source) -> None:
    """Raise UserError if a config.json of the Llama family has invalid or contradictory values."""
    config = with_class_defaults(values)
    check_fields(config, {key: CONFIG_CHECKS[key] for key in config if key != "model_type"}, source)
    rope = rope_parameters(config)
    check_fields(rope, ROPE_CHECKS, f"{source}: RoPE")
    check_fields(rope, ROPE_SCALING_CHECKS.get(rope_scaling_type(rope), {}), f"{source}: RoPE")
    contradiction = next(_contradictions(config, rope), None)
    if contradiction:
        raise UserError(f"{source}: {contradiction}")


def _contradictions(config: Mapping, rope: Mapping) -> Iterator[str]:
    depth, width, heads = config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]
    if heads % (config["num_key_value_heads"] or heads):
        yield "num_attention_heads is not a multiple of num_key_value_heads"
    if not config["head_dim"] and width % heads:
        yield "hidden_size is not a multiple of num_attention_heads"
    if (config["head_dim"] or width // heads) % 2:
        yield "the width of a head is odd, and rotary embeddings need pairs of channels"
    if rope_scaling_type(rope) == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        yield "low_freq_factor is not smaller than high_freq_factor"
    for key in ("layer_types", "no_rope_layers"):
        if config.get(key) and len(config[key]) != depth:
            yield f"{key} has {len(config[key])} entries for {depth} layers"
