"""Configuration of the Llama family, to and from Hugging Face's config.json."""

import math
from dataclasses import dataclass

from nanoghost.errors import UserError
from nanoghost.model.rope import ROPE_TYPES, rope_scaling_type

SHARED_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "mlp_bias": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "quantization_config": None,
}
QWEN_DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
CLASS_DEFAULTS = {
    "llama": SHARED_DEFAULTS
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
    },
    "mistral": SHARED_DEFAULTS
    | {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "layer_types": None,
    },
    "qwen2": SHARED_DEFAULTS | QWEN_DEFAULTS,
    "qwen3": SHARED_DEFAULTS | QWEN_DEFAULTS | {"head_dim": 128, "attention_bias": False},
    "smollm3": SHARED_DEFAULTS
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "rope_theta": 2000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    "granite": SHARED_DEFAULTS
    | {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
}
"""model_type -> the keys of config.json that such a model has, with the values that Hugging Face's configuration class
has for those that the file leaves out. A null in the file stays null: a flag that is not set, or the value follows from
others."""

MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
"""Granite's keys in config.json, and the fields of LlamaConfig with the same names."""


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 4096
    """Number of tokens."""
    context: int = 512
    """Length of the longest sequence, in tokens."""
    depth: int = 4
    """Number of layers."""
    width: int = 256
    """Width of the residual stream."""
    heads: int = 4
    """Query heads."""
    key_value_heads: int = 4
    """Heads of keys and values; each serves heads / key_value_heads query heads."""
    mlp_width: int = 704
    """Width of the gated MLP."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied_embeddings: bool = False
    """Use the embedding as the output layer too."""
    model_type: str = "llama"
    """Member of the family, as in config.json."""
    head_width: int = 0
    """Width of an attention head; 0: width / heads."""
    qkv_bias: bool = False
    """Biases in the projections to queries, keys and values (Qwen2)."""
    out_bias: bool = False
    """Bias in the output projection of attention."""
    qk_norm: bool = False
    """RMSNorm on each query and key (Qwen3)."""
    sliding_windows: tuple[int, ...] = ()
    """Number of tokens that a token sees in each layer, itself included; 0: all. Empty: all in all layers."""
    no_rope_layers: tuple[int, ...] = ()
    """Layers without rotary embedding (SmolLM3)."""
    rope_scaling: dict | None = None
    """RoPE scaling to a longer context, in Hugging Face's form."""
    embedding_multiplier: float = 1.0
    """Factor of the embeddings (Granite, like the next three)."""
    attention_multiplier: float = 0.0
    """Factor of the products of queries and keys; 0: 1 / sqrt(head_width)."""
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logits_scaling: float = 1.0
    """Divisor of the logits."""

    def __post_init__(self):
        if not self.head_width:
            object.__setattr__(self, "head_width", self.width // self.heads)
        if not self.attention_multiplier:
            object.__setattr__(self, "attention_multiplier", self.head_width**-0.5)

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each matrix of a layer."""
        D, F = self.width, self.mlp_width
        Q, KV = self.heads * self.head_width, self.key_value_heads * self.head_width
        return {"q": (Q, D), "k": (KV, D), "v": (KV, D), "out": (D, Q), "gate": (F, D), "up": (F, D), "down": (D, F)}

    @classmethod
    def for_depth(cls, depth: int, vocab_size: int, context: int) -> "LlamaConfig":
        """Width is 64 x depth, in heads of 64. The MLP has 8/3 of the width, as in Llama, in multiples of 64."""
        width = 64 * depth
        return cls(
            vocab_size=vocab_size,
            context=context,
            depth=depth,
            width=width,
            heads=depth,
            key_value_heads=depth,
            mlp_width=64 * math.ceil(8 * width / (3 * 64)),
        )

    @classmethod
    def from_json(cls, values: dict) -> "LlamaConfig":
        """From the content of Hugging Face's config.json. Raises UserError if llama.py lacks a part of the model."""
        values = with_class_defaults(values)
        _refuse_unsupported(values)
        model_type, heads = values["model_type"], values["num_attention_heads"]
        rope = rope_parameters(values)
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        attention_bias = bool(values.get("attention_bias"))
        return cls(
            vocab_size=values["vocab_size"],
            context=values["max_position_embeddings"],
            depth=values["num_hidden_layers"],
            width=values["hidden_size"],
            heads=heads,
            key_value_heads=values["num_key_value_heads"] or heads,
            mlp_width=values["intermediate_size"],
            rope_base=float(rope["rope_theta"]),
            norm_eps=values["rms_norm_eps"],
            tied_embeddings=bool(values["tie_word_embeddings"]),
            model_type=model_type,
            head_width=values["head_dim"] or values["hidden_size"] // heads,
            qkv_bias=model_type == "qwen2" or attention_bias,
            out_bias=attention_bias,
            qk_norm=model_type == "qwen3",
            sliding_windows=_sliding_windows(values),
            no_rope_layers=_no_rope_layers(values),
            rope_scaling=scaling if rope_scaling_type(scaling) != "default" else None,
            **{key: float(values[key]) for key in MULTIPLIERS if key in values},
        )

    def to_json(self) -> dict:
        """The content of config.json in Hugging Face's form, except for `architectures`."""
        values = {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "num_hidden_layers": self.depth,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_width,
            "intermediate_size": self.mlp_width,
            "rope_theta": self.rope_base,
            "rope_scaling": self.rope_scaling,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tied_embeddings,
            "hidden_act": "silu",
            "attention_bias": self.out_bias,
            "mlp_bias": False,
        }
        if self.sliding_windows:
            layer_types = ["sliding_attention" if window else "full_attention" for window in self.sliding_windows]
            values["sliding_window"] = max(self.sliding_windows)
            values["use_sliding_window"] = True
            values["layer_types"] = layer_types
        elif self.model_type != "llama":
            values["sliding_window"] = None
            values["use_sliding_window"] = False
        if self.model_type == "granite":
            values |= {key: getattr(self, key) for key in MULTIPLIERS}
        if self.model_type == "smollm3":
            values["no_rope_layers"] = [int(layer not in self.no_rope_layers) for layer in range(self.depth)]
        return values


def with_class_defaults(values: dict) -> dict:
    """The keys of a config.json that a model of its type has, each with a value."""
    model_type = values["model_type"]
    defaults = CLASS_DEFAULTS[model_type]
    return {"model_type": model_type} | {key: values.get(key, default) for key, default in defaults.items()}


def rope_parameters(values: dict) -> dict:
    """The parameters of the rotary embedding, `rope_theta` among them; `values` are complete.

    They stand in rope_scaling (transformers 4) or rope_parameters (5), there perhaps once for each type of layer. What
    is missing there stands in the config itself.
    """
    parameters = values["rope_scaling"] or values["rope_parameters"] or {}
    layer_types = {"sliding_attention" if window else "full_attention" for window in _sliding_windows(values) or (0,)}
    by_layer_type = [parameters[kind] for kind in layer_types if isinstance(parameters.get(kind), dict)]
    if by_layer_type:
        parameters = by_layer_type[0]
    if any(other != parameters for other in by_layer_type):
        raise UserError(
            f"this {values['model_type']} model has a rotary embedding for each type of layer, which nanoghost does not"
            " support"
        )
    base = values["rope_theta"] or CLASS_DEFAULTS[values["model_type"]]["rope_theta"]
    defaults = {"rope_theta": base, "partial_rotary_factor": values["partial_rotary_factor"] or 1.0}
    if rope_scaling_type(parameters) in ("llama3", "yarn"):
        defaults["original_max_position_embeddings"] = values["max_position_embeddings"]
    return defaults | {key: value for key, value in parameters.items() if value is not None}


def _refuse_unsupported(values: dict) -> None:
    rope = rope_parameters(values)
    rope_type = rope_scaling_type(rope)
    unsupported = {
        f"the activation {values['hidden_act']}": values["hidden_act"] != "silu",
        "biases in the MLP": values["mlp_bias"],
        f"RoPE scaling of type '{rope_type}'": rope_type not in ROPE_TYPES,
        "rotary embeddings on a part of each head": rope["partial_rotary_factor"] != 1.0,
        "quantized weights": values["quantization_config"],
    }
    reasons = [feature for feature, is_present in unsupported.items() if is_present]
    if reasons:
        raise UserError(
            f"this {values['model_type']} model has {' and '.join(reasons)}, which nanoghost does not support"
        )


def _sliding_windows(values: dict) -> tuple[int, ...]:
    """The window of each layer, empty if no layer has one.

    Mistral has windows in all layers, Qwen from layer max_window_layers on, SmolLM3 where there is no rotary embedding;
    the latter two only if use_sliding_window is set.
    """
    window, depth = values.get("sliding_window"), values["num_hidden_layers"]
    is_mistral = values["model_type"] == "mistral"
    if not window or not values.get("use_sliding_window", is_mistral):
        return ()
    if values["layer_types"]:
        layers = [layer for layer, kind in enumerate(values["layer_types"]) if kind == "sliding_attention"]
    elif values["model_type"] == "smollm3":
        layers = _no_rope_layers(values)
    else:
        layers = range(0 if is_mistral else values["max_window_layers"], depth)
    return tuple(window if layer in layers else 0 for layer in range(depth)) if layers else ()


def _no_rope_layers(values: dict) -> tuple[int, ...]:
    """SmolLM3: every fourth layer, or another interval, unless the config lists them."""
    interval = values.get("no_rope_layer_interval")
    if not interval:
        return ()
    # Despite its name, Hugging Face's no_rope_layers has a 1 for each layer with rotary embedding, 0 without.
    flags = values["no_rope_layers"]
    if flags:
        return tuple(layer for layer, has_rope in enumerate(flags) if not has_rope)
    return tuple(range(interval - 1, values["num_hidden_layers"], interval))
