"""Models of the Llama family in GGUF files: config and tensors, translated to the form of Hugging Face transformers.

llama.cpp stores the query and key projections of some architectures with permuted rows: in each head, the two channels
that rotate together are neighbors, where Hugging Face has the first channels of all pairs, then the second ones.
`permute` and `unpermute` convert. What a Hugging Face config cannot express raises UserError.
"""

import math
from collections.abc import Iterator

import numpy as np

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.validation import check_fields, check_llama_config, integer, one_of, optional
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.tensor_names import huggingface_name_of_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", "granite")
PERMUTED_ARCHITECTURES = ("llama", "smollm3", "granite")
LLAMA3_CONTEXT = 8192
"""Context that Llama 3 was trained with before its RoPE frequencies were scaled; a GGUF file does not store it."""
LLAMA3_LOW_FREQUENCY_FACTOR, LLAMA3_HIGH_FREQUENCY_FACTOR = 1.0, 4.0
"""Llama 3 divides frequencies with fewer rotations over that context than the first by a factor, and leaves those with
more than the second as they are."""
ROPE_DIVISORS = "rope_freqs.weight"
"""Tensor with one divisor for each RoPE frequency: how GGUF stores Llama 3's RoPE scaling."""

CONFIG_KEYS = {  # key of config.json -> key of the GGUF header, after the prefix "ARCHITECTURE."
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
MULTIPLIER_KEYS = {  # the same, for Granite
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
HEADER_CHECKS = {  # header fields that are used here and are not copied to config.json, where they would be checked
    "block_count": integer(1, 1024),
    "attention.value_length": optional(integer(1, 1024)),
    "attention.sliding_window": optional(integer(0, 2**24)),
    "rope.dimension_count": optional(integer(1, 1024)),
    "rope.scaling.type": optional(one_of("none", "linear", "yarn")),
}
ROPE_SCALING_KEYS = ("type", "factor", "original_context_length", "finetuned")


# -- config -----------------------------------------------------------------------------------------------------------


def read_config(gguf: GGUFFile) -> dict:
    """config.json of the model in a GGUF file."""
    check_fields(gguf.fields, {"general.architecture": one_of(*ARCHITECTURES)}, gguf.path)
    architecture = gguf.fields["general.architecture"]
    header_checks = {f"{architecture}.{key}": check for key, check in HEADER_CHECKS.items()}
    check_fields(gguf.fields, header_checks, gguf.path)
    _check_all_supported(gguf, architecture)

    def field(key: str, default=None):
        return gguf.fields.get(f"{architecture}.{key}", default)

    embedding = gguf.tensors.get("token_embd.weight")
    config = {
        "model_type": architecture,
        "vocab_size": embedding.shape[0] if embedding else None,
        **{key: field(header_key) for key, header_key in CONFIG_KEYS.items()},
        "rope_theta": field("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in gguf.tensors,
        "mlp_bias": False,
    }
    if architecture == "granite":
        config |= {key: field(header_key) for key, header_key in MULTIPLIER_KEYS.items()}
    rope_type = field("rope.scaling.type", "none")
    if rope_type != "none":
        config["rope_scaling"] = {"rope_type": rope_type, "factor": field("rope.scaling.factor")}
    if rope_type == "yarn":
        original_context = field("rope.scaling.original_context_length")
        config["rope_scaling"]["original_max_position_embeddings"] = original_context
    check_llama_config(config, gguf.path)

    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    head_width = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = head_width
    for key in ("rms_norm_eps", *(MULTIPLIER_KEYS.keys() & config.keys())):
        config[key] = shortest_float32(config[key])
    if field("rope.dimension_count", head_width) != head_width:
        raise UserError(
            f"{gguf.path} applies rotary embeddings to a part of each head, which nanoghost does not support"
        )
    if field("attention.value_length", head_width) != head_width:
        raise UserError(f"{gguf.path} has values of another width than keys, which nanoghost does not support")
    if field("attention.sliding_window"):
        raise UserError(
            f"{gguf.path} has sliding windows, but does not store for which layers:"
            " adopt the model's Hugging Face folder instead"
        )
    if ROPE_DIVISORS in gguf.tensors:
        config["rope_scaling"] = _llama3_rope_scaling(gguf, config["rope_theta"], head_width)
    return config


def _check_all_supported(gguf: GGUFFile, architecture: str) -> None:
    """Raise UserError for tensors and RoPE scaling fields that would be lost."""
    unknown = [name for name in gguf.tensors if huggingface_name_of_gguf(name) is None and name != ROPE_DIVISORS]
    prefix = f"{architecture}.rope.scaling."
    rope_fields = [key for key in gguf.fields if key.startswith(prefix)]
    unknown += [key for key in rope_fields if key.removeprefix(prefix) not in ROPE_SCALING_KEYS]
    if unknown:
        raise UserError(f"{gguf.path}: '{unknown[0]}' is not supported in a {architecture} model")


def shortest_float32(x: float) -> float:
    """The shortest decimal number that is the same in fp32: 1e-05 instead of 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _llama3_rope_scaling(gguf: GGUFFile, base: float, head_width: int) -> dict:
    """Llama 3's RoPE scaling, recovered from the divisors of the frequencies."""
    frequency_count = head_width // 2
    if gguf.tensors[ROPE_DIVISORS].shape != (frequency_count,):
        raise UserError(f"{gguf.path}: {ROPE_DIVISORS} does not have {frequency_count} values, one for each frequency")
    divisors = gguf.read_tensor(ROPE_DIVISORS).astype(np.float64)
    frequency = base ** -(np.arange(frequency_count) / frequency_count)
    factor = float(divisors.max())
    rotations = LLAMA3_CONTEXT * frequency / (2 * math.pi)  # of each frequency over the original context
    width = LLAMA3_HIGH_FREQUENCY_FACTOR - LLAMA3_LOW_FREQUENCY_FACTOR
    unscaled = np.clip((rotations - LLAMA3_LOW_FREQUENCY_FACTOR) / width, 0, 1)
    if not (divisors >= 1).all() or not np.allclose(1 / divisors, unscaled + (1 - unscaled) / factor, rtol=1e-3):
        raise UserError(f"{gguf.path} has a RoPE scaling that nanoghost does not support ({ROPE_DIVISORS})")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQUENCY_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQUENCY_FACTOR,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }


# -- tensors ----------------------------------------------------------------------------------------------------------


def tensor_shapes(gguf: GGUFFile) -> dict[str, tuple[int, ...]]:
    """Shape of each weight, by Hugging Face's names."""
    return {huggingface_name_of_gguf(name): info.shape for name, info in gguf.tensors.items() if name != ROPE_DIVISORS}


def read_weights(gguf: GGUFFile, config: LlamaConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, values in fp32) of each weight, one at a time."""
    for name in gguf.tensors:
        if name == ROPE_DIVISORS:
            continue
        weight, target_name = gguf.read_tensor(name), huggingface_name_of_gguf(name)
        heads = permuted_heads(target_name, config.model_type, config.heads, config.key_value_heads)
        if heads:
            weight = unpermute(weight, heads)
        yield target_name, weight


def permuted_heads(name: str, architecture: str, query_heads: int, key_value_heads: int) -> int | None:
    """Number of heads in a tensor (by Hugging Face's name) whose rows llama.cpp permutes; None for other tensors."""
    if architecture not in PERMUTED_ARCHITECTURES:
        return None
    if ".q_proj." in name:
        return query_heads
    if ".k_proj." in name:
        return key_value_heads
    return None


def permute(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from Hugging Face's rotary layout to that of llama.cpp: halves to pairs."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def unpermute(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from llama.cpp's rotary layout to that of Hugging Face: pairs to halves."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
