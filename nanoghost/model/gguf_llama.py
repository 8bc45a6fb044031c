"""A Llama-family model in a GGUF file, said in Hugging Face's words: settings, tensors, tokenizer, chat template.

llama.cpp turns the rows of queries and keys (of the llama kind alone) so that pairs of channels stand side by side;
here they are turned back. What has no place in a model folder is refused by name.
"""

import json
import math
import re

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from nanoghost.errors import UserError
from nanoghost.model.gguf import GGUF

FAMILY = ("llama", "qwen2", "qwen3", "smollm3")
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def their_name(name: str) -> str | None:
    """Hugging Face's name of a tensor, None if there is none."""
    if name in NAMES:
        return NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"


def gguf_name(name: str) -> str:
    """llama.cpp's name of Hugging Face's tensor."""
    names = {theirs: ours for ours, theirs in NAMES.items()}
    if name in names:
        return names[name]
    _, _, layer, *inside, end = name.split(".")
    layer_names = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
    return f"blk.{layer}.{layer_names['.'.join(inside)]}.{end}"


def settings_of(g: GGUF) -> dict:
    """config.json."""
    kind = g.fields.get("general.architecture")
    if kind not in FAMILY:
        raise UserError(f"{g.path} holds a model of kind '{kind}'; nanoghost reads {', '.join(FAMILY)}")

    def field(name: str, default=None):
        value = g.fields.get(f"{kind}.{name}", default)
        if value is None:
            raise UserError(f"{g.path} does not say its {kind}.{name}")
        if isinstance(value, np.ndarray | list):
            raise UserError(f"{g.path} has another {kind}.{name} in each layer, which nanoghost cannot represent")
        return value

    strange = [name for name in g.tensors if their_name(name) is None and name != "rope_freqs.weight"]
    if strange:
        raise UserError(f"{g.path} has tensors that no {kind} model has (first: {strange[0]})")
    heads, width = field("attention.head_count"), field("embedding_length")
    head_width = field("attention.key_length", width // heads if heads else 0)
    if (
        field("rope.dimension_count", head_width) != head_width
        or field("attention.value_length", head_width) != head_width
    ):
        raise UserError(f"{g.path} turns only a part of each head, which nanoghost cannot represent")
    window = g.fields.get(f"{kind}.attention.sliding_window")
    if window:
        raise UserError(f"{g.path} has sliding windows and does not say in which layers; adopt its safetensors instead")
    biased = "blk.0.attn_output.bias" in g.tensors
    return {
        "model_type": kind,
        "vocab_size": g.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in g.tensors else 0,
        "max_position_embeddings": field("context_length"),
        "num_hidden_layers": field("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": field("feed_forward_length"),
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "rope_scaling": _scaling(g, kind, head_width),
        "rms_norm_eps": rounded(field("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in g.tensors,
        "hidden_act": "silu",
        "attention_bias": biased,
        "mlp_bias": False,
    }


def rounded(x: float) -> float:
    """The shortest number that is this one in fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def _scaling(g: GGUF, kind: str, head_width: int) -> dict | None:
    """How positions are stretched. Llama 3's way is stored as one divisor for each frequency: find which it was."""
    how = g.fields.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in g.tensors:
        divisors = g.tensor("rope_freqs.weight")
        frequency = g.fields.get(f"{kind}.rope.freq_base", 10000.0) ** -(np.arange(head_width // 2) / (head_width // 2))
        factor = float(divisors.max())
        turns = 8192 * frequency / (2 * math.pi)
        keep = np.clip((turns - 1.0) / 3.0, 0, 1)
        if not np.allclose(1 / divisors, keep + (1 - keep) / factor, rtol=1e-3):
            raise UserError(f"{g.path} stretches positions in a way that nanoghost does not know")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if how == "none":
        return None
    if how not in ("linear", "yarn"):
        raise UserError(f"{g.path} stretches positions by '{how}', which nanoghost cannot represent")
    scaling = {"rope_type": how, "factor": float(g.fields[f"{kind}.rope.scaling.factor"])}
    if how == "yarn":
        scaling["original_max_position_embeddings"] = g.fields[f"{kind}.rope.scaling.original_context_length"]
    return scaling


def tensors_of(g: GGUF, settings: dict):
    """(Hugging Face's name, numbers in fp32) of each tensor, one at a time."""
    for name in g.tensors:
        if name == "rope_freqs.weight":
            continue
        x = g.tensor(name)
        if settings["model_type"] == "llama" and (match := re.search(r"attn_([qk])\.", name)):
            heads = settings["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
            x = turned_back(x, heads)
        yield their_name(name), x


def turned_back(x: np.ndarray, heads: int) -> np.ndarray:
    """From llama.cpp's order of a head's rows (pairs side by side) to Hugging Face's (halves)."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def turned(x: np.ndarray, heads: int) -> np.ndarray:
    """From Hugging Face's order to llama.cpp's."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


# ── the tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────────────

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits():
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _digits,
    "llama-bpe": lambda: _split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST),
    "qwen2": lambda: _split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST),
}


def tokenizer_of(g: GGUF) -> tokenizers.Tokenizer:
    """tokenizer.json."""
    kind, pre = g.fields.get("tokenizer.ggml.model"), g.fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{g.path} has a tokenizer of kind {kind}/{pre}; nanoghost rebuilds gpt2 with {', '.join(PRE_TOKENIZERS)}:"
            f" adopt the model's Hugging Face folder instead"
        )
    tokens, kinds = g.fields["tokenizer.ggml.tokens"], g.fields["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ", 1)) for merge in g.fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise UserError(f"{g.path} has a vocabulary that names a token twice, or kinds for other tokens")
    if strange := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()]:
        raise UserError(f"{g.path} merges what its vocabulary does not have (first: {strange[0]})")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, kinds) if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == USER_DEFINED])
    return backend


def tokenizer_fields(tokenizer) -> tuple[list[str], list[int], list[str], str]:
    """(tokens, their kinds, merges, how words are split) of a byte-level BPE tokenizer, for a GGUF file."""
    said = json.loads(tokenizer.to_json())
    split = [pre for pre, make in PRE_TOKENIZERS.items() if _same(said["pre_tokenizer"], make())]
    if not split:
        raise UserError("this tokenizer splits words in a way that llama.cpp has no name for here")
    tokens = [""] * tokenizer.vocab_size
    for token, i in said["model"]["vocab"].items():
        tokens[i] = token
    kinds = [NORMAL if token else UNUSED for token in tokens]
    for added in said["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]]
    return [token or f"[UNUSED{i}]" for i, token in enumerate(tokens)], kinds, merges, split[0]


def _same(said: dict, candidate) -> bool:
    """Whether two ways of splitting are one; `trim_offsets` only matters to who asks for offsets."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = candidate

    def essence(value):
        if isinstance(value, dict):
            return {k: essence(v) for k, v in value.items() if k != "trim_offsets"}
        return [essence(v) for v in value] if isinstance(value, list) else value

    return essence(said) == essence(json.loads(backend.to_str())["pre_tokenizer"])
