"""What the settings of strangers may say: kinds and ranges, held against them before anything is made of them.

config.json, the header of a GGUF file and the settings of a tokenizer are doubted here, by tables; behind `check` they
are taken at their word.
"""

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from nanoghost.errors import UserError
from nanoghost.model.rope import kind_of


@dataclass(frozen=True)
class Rule:
    words: str
    """What a value should be."""
    holds: Callable[[object], object]


def whole(least: int, most: int) -> Rule:
    return Rule(f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most)


def real(least: float, most: float) -> Rule:  # NaN is in no range
    return Rule(f"a number from {least:g} to {most:g}", lambda x: type(x) in (int, float) and least <= x <= most)


def one_of(*texts: str) -> Rule:
    return Rule(f"one of {', '.join(texts)}", lambda x: isinstance(x, str) and x in texts)


def maybe(rule: Rule) -> Rule:
    return Rule(f"{rule.words}, or absent", lambda x: x is None or rule.holds(x))


def every(rule: Rule) -> Rule:
    return Rule(f"a list, each of it {rule.words}", lambda x: isinstance(x, list) and x and all(map(rule.holds, x)))


def either(a: Rule, b: Rule) -> Rule:
    return Rule(f"{a.words} or {b.words}", lambda x: a.holds(x) or b.holds(x))


def table(rules: Mapping[str, Rule]) -> Rule:
    def holds(x):
        return isinstance(x, dict) and all(rule.holds(x.get(key)) for key, rule in rules.items())

    return Rule(f"an object in which {'; '.join(f'{k} is {r.words}' for k, r in rules.items())}", holds)


TEXT = Rule("a text", lambda x: isinstance(x, str))
FLAG = Rule("true or false", lambda x: isinstance(x, bool))
INTEGERS = Rule("an array of integers", lambda x: isinstance(x, np.ndarray) and x.dtype.kind in "iu")
TOKEN = whole(0, 2**24)


def check(said: Mapping, rules: Mapping[str, Rule], where) -> None:
    """Raises UserError for the first value that breaks its rule; a missing one is None."""
    for key, rule in rules.items():
        value = said.get(key)
        if not rule.holds(value):
            found = "is missing" if value is None else f"is {reprlib.repr(value)}"
            raise UserError(f"{where}: {key} {found}; it should be {rule.words}")


# ── config.json ───────────────────────────────────────────────────────────────────────────────────────────────────────

STRETCHED = {"factor": real(1, 2**20), "original_max_position_embeddings": whole(1, 2**24)}
POSITIONS = {
    "linear": {"factor": STRETCHED["factor"]},
    "llama3": STRETCHED | {"low_freq_factor": real(1e-3, 1e6), "high_freq_factor": real(1e-3, 1e6)},
    "yarn": STRETCHED
    | dict.fromkeys(("beta_fast", "beta_slow"), maybe(real(1e-3, 1e6)))
    | dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), maybe(real(0, 1e6)))
    | {"truncate": maybe(FLAG)},
}
BASE = maybe(real(2, 1e12))
HOW = maybe(table({"rope_type": maybe(TEXT), "type": maybe(TEXT), "rope_theta": BASE}))

SETTINGS = {
    "vocab_size": whole(1, 2**24),
    "max_position_embeddings": whole(1, 2**20),
    "num_hidden_layers": whole(1, 1024),
    "hidden_size": whole(1, 2**17),
    "num_attention_heads": whole(1, 1024),
    "num_key_value_heads": maybe(whole(1, 1024)),
    "head_dim": maybe(whole(2, 1024)),
    "intermediate_size": whole(1, 2**20),
    "rms_norm_eps": real(0, 1),
    "rope_theta": BASE,
    "rope_scaling": HOW,
    "rope_parameters": HOW,
    "partial_rotary_factor": maybe(real(0, 1)),
    "hidden_act": maybe(TEXT),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), maybe(FLAG)),
    "sliding_window": maybe(whole(1, 2**24)),
    "max_window_layers": maybe(whole(0, 1024)),
    "layer_types": maybe(every(one_of("full_attention", "sliding_attention"))),
    "no_rope_layers": maybe(every(whole(0, 1))),
    "eos_token_id": maybe(either(TOKEN, every(TOKEN))),
}


def check_settings(s: Mapping, where) -> None:
    """That a config.json of the Llama family makes sense, each value and all together."""
    check(s, SETTINGS, where)
    for key in ("rope_scaling", "rope_parameters"):
        how = s.get(key) or {}
        check(how, POSITIONS.get(kind_of(how), {}), f"{where}: {key}")
    depth, heads, kind = s["num_hidden_layers"], s["num_attention_heads"], s["model_type"]
    how = s.get("rope_parameters") or s.get("rope_scaling") or {}
    windowed = s.get("use_sliding_window") and kind not in ("llama", "mistral")
    wrong = {
        "num_attention_heads is no multiple of num_key_value_heads": heads % (s.get("num_key_value_heads") or heads),
        "hidden_size is no multiple of num_attention_heads": not s.get("head_dim") and s["hidden_size"] % heads,
        "heads have an odd width": (s.get("head_dim") or s["hidden_size"] // heads) % 2,
        "low_freq_factor is not below high_freq_factor": kind_of(how) == "llama3"
        and how["low_freq_factor"] >= how["high_freq_factor"],
        "layer_types has not one entry for each layer": len(s.get("layer_types") or range(depth)) != depth,
        "no_rope_layers has not one entry for each layer": len(s.get("no_rope_layers") or range(depth)) != depth,
        "no_rope_layers is missing": kind == "smollm3" and "no_rope_layers" not in s,
        "sliding_window is missing": kind == "mistral" and "sliding_window" not in s,
        "use_sliding_window is said without which": windowed
        and not (s.get("sliding_window") and (s.get("layer_types") or s.get("max_window_layers") is not None)),
    }
    if reasons := [reason for reason, applies in wrong.items() if applies]:
        raise UserError(f"{where}: {reasons[0]}")


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, kind of number) of each tensor of a safetensors file; takes no memory for the numbers."""
    try:
        with safe_open(path, "pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"cannot read weights {path}: {e}") from None
