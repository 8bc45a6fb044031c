"""Configuration of the Llama family, to and from Hugging Face's config.json."""

import math
from dataclasses import dataclass

from nanoghost.errors import UserError
from nanoghost.model.rope import ROPE_TYPES, rope_scaling_type


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

    def __post_init__(self):
        if not self.head_width:
            object.__setattr__(self, "head_width", self.width // self.heads)

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
        model_type, depth, heads = values["model_type"], values["num_hidden_layers"], values["num_attention_heads"]
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        _refuse_unsupported(values, rope_scaling_type(scaling))
        # Despite its name, Hugging Face's no_rope_layers has a 1 for each layer with rotary embedding, 0 without
        rope_flags = values.get("no_rope_layers") or ()
        return cls(
            vocab_size=values["vocab_size"],
            context=values["max_position_embeddings"],
            depth=depth,
            width=values["hidden_size"],
            heads=heads,
            key_value_heads=values.get("num_key_value_heads") or heads,
            mlp_width=values["intermediate_size"],
            rope_base=float(values.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=values["rms_norm_eps"],
            tied_embeddings=values.get("tie_word_embeddings", False),
            model_type=model_type,
            head_width=values.get("head_dim") or values["hidden_size"] // heads,
            qkv_bias=model_type == "qwen2" or bool(values.get("attention_bias")),
            out_bias=model_type != "qwen2" and bool(values.get("attention_bias")),
            qk_norm=model_type == "qwen3",
            sliding_windows=_sliding_windows(values, depth),
            no_rope_layers=tuple(layer for layer, has_rope in enumerate(rope_flags) if not has_rope),
            rope_scaling=scaling if rope_scaling_type(scaling) != "default" else None,
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
        if self.model_type == "smollm3":
            values["no_rope_layers"] = [int(layer not in self.no_rope_layers) for layer in range(self.depth)]
        return values


def _refuse_unsupported(values: dict, rope_type: str) -> None:
    unsupported = {
        f"the activation {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
        "biases in the MLP": values.get("mlp_bias"),
        f"RoPE scaling of type '{rope_type}'": rope_type not in ROPE_TYPES,
        "rotary embeddings on a part of each head": (values.get("partial_rotary_factor") or 1.0) != 1.0,
        "quantized weights": values.get("quantization_config"),
    }
    reasons = [feature for feature, is_present in unsupported.items() if is_present]
    if reasons:
        raise UserError(
            f"this {values['model_type']} model has {' and '.join(reasons)}, which nanoghost does not support"
        )


def _sliding_windows(values: dict, depth: int) -> tuple[int, ...]:
    """Mistral has sliding windows in all layers, Qwen from layer max_window_layers on and only if asked for."""
    window, model_type = values.get("sliding_window"), values["model_type"]
    if not window or model_type == "llama":
        return ()
    if model_type != "mistral" and not values.get("use_sliding_window"):
        return ()
    layer_types = values.get("layer_types")
    if layer_types:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    if model_type == "mistral":
        return (window,) * depth
    return tuple(window if layer >= values["max_window_layers"] else 0 for layer in range(depth))
