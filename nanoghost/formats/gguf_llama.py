"""A Llama-family model in a GGUF file, said in Hugging Face's words: settings, tensors, tokenizer, chat template.

llama.cpp turns the rows of queries and keys (of some kinds) so that pairs of channels stand side by side; here they are
turned back. What has no place in a model folder is refused by name.
"""

import json
import math
import re

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUF
from nanoghost.formats.validation import FLAG, INTEGERS, TEXT, check, check_settings, every, maybe, one_of, whole

FAMILY = ("llama", "qwen2", "qwen3", "smollm3")
TURNED = ("llama", "smollm3")
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

FIELDS = {  # config.json's word: the header's, behind the kind of model
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
HEADER = {  # what config.json has other words for, or none
    "block_count": whole(1, 1024),
    "attention.value_length": maybe(whole(1, 1024)),
    "attention.sliding_window": maybe(whole(0, 2**24)),
    "rope.dimension_count": maybe(whole(1, 1024)),
    "rope.scaling.type": maybe(one_of("none", "linear", "yarn")),
}
MARKS = ("bos", "eos", "eot")
SCALING = ("type", "factor", "original_context_length", "finetuned")
TOKENIZER = {
    "tokenizer.ggml.tokens": every(TEXT),
    "tokenizer.ggml.token_type": INTEGERS,
    "tokenizer.ggml.merges": every(TEXT),
    "tokenizer.ggml.add_bos_token": maybe(FLAG),
    "tokenizer.chat_template": TEXT,
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
    check(g.fields, {"general.architecture": one_of(*FAMILY)}, g.path)
    kind = g.fields["general.architecture"]
    check(g.fields, {f"{kind}.{name}": rule for name, rule in HEADER.items()}, g.path)

    def field(name: str, default=None):
        return g.fields.get(f"{kind}.{name}", default)

    strange = [name for name in g.tensors if their_name(name) is None and name != "rope_freqs.weight"]
    prefix = f"{kind}.rope.scaling."
    strange += [name for name in g.fields if name.startswith(prefix) and name.removeprefix(prefix) not in SCALING]
    if strange:
        raise UserError(f"{g.path} has what nanoghost does not know in a {kind} model: {strange[0]}")
    settings = {
        "model_type": kind,
        "vocab_size": g.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in g.tensors else None,
        **{theirs: field(name) for theirs, name in FIELDS.items()},
        "rope_theta": field("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in g.tensors,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_output.bias" in g.tensors,
        "mlp_bias": False,
    }
    if (how := field("rope.scaling.type", "none")) != "none":
        original = {"original_max_position_embeddings": field("rope.scaling.original_context_length")}
        settings["rope_scaling"] = {"rope_type": how, "factor": field("rope.scaling.factor")} | (
            original if how == "yarn" else {}
        )
    if kind == "smollm3":  # llama.cpp has it so, whatever the file says
        settings["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(field("block_count"))]
    check_settings(settings, g.path)
    heads = settings["num_attention_heads"]
    head_width = settings["head_dim"] or settings["hidden_size"] // heads
    if {field("rope.dimension_count", head_width), field("attention.value_length", head_width)} != {head_width}:
        raise UserError(f"{g.path} turns only a part of each head, which nanoghost cannot represent")
    if field("attention.sliding_window"):
        raise UserError(f"{g.path} has sliding windows and does not say in which layers; adopt its safetensors instead")
    if "rope_freqs.weight" in g.tensors:
        settings["rope_scaling"] = stretched_by(g, settings["rope_theta"], head_width)
    return settings | {
        "num_key_value_heads": settings["num_key_value_heads"] or heads,
        "head_dim": head_width,
        "rms_norm_eps": rounded(settings["rms_norm_eps"]),
    }


def rounded(x: float) -> float:
    """The shortest number that is this one in fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))


def stretched_by(g: GGUF, base: float, head_width: int) -> dict:
    """Llama 3's way is stored as one divisor for each frequency: find which it was."""
    if g.tensors["rope_freqs.weight"].shape != (head_width // 2,):
        raise UserError(f"{g.path}: rope_freqs.weight has not one number for each pair of channels")
    divisors = g.tensor("rope_freqs.weight").astype(np.float64)
    frequency = base ** -(np.arange(head_width // 2) / (head_width // 2))
    factor = float(divisors.max())
    turns = 8192 * frequency / (2 * math.pi)
    keep = np.clip((turns - 1.0) / 3.0, 0, 1)
    if not (divisors >= 1).all() or not np.allclose(1 / divisors, keep + (1 - keep) / factor, rtol=1e-3):
        raise UserError(f"{g.path} stretches positions in a way that nanoghost does not know")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def tensors_of(g: GGUF, settings: dict):
    """(Hugging Face's name, numbers in fp32) of each tensor, one at a time."""
    for name in g.tensors:
        if name == "rope_freqs.weight":
            continue
        x = g.tensor(name)
        if settings["model_type"] in TURNED and (match := re.search(r"attn_([qk])\.", name)):
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
    check(g.fields, dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre"), maybe(TEXT)), g.path)
    kind, pre = g.fields.get("tokenizer.ggml.model"), g.fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"{g.path} has a tokenizer of kind {kind}/{pre}; nanoghost rebuilds gpt2 with {', '.join(PRE_TOKENIZERS)}:"
            f" adopt the model's Hugging Face folder instead"
        )
    check(g.fields, TOKENIZER, g.path)
    tokens, kinds = g.fields["tokenizer.ggml.tokens"], g.fields["tokenizer.ggml.token_type"]
    check(g.fields, {f"tokenizer.ggml.{mark}_token_id": maybe(whole(0, len(tokens) - 1)) for mark in MARKS}, g.path)
    merges = [tuple(merge.split(" ", 1)) for merge in g.fields["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise UserError(f"{g.path} has a vocabulary that names a token twice, or kinds for other tokens")
    if strange := [m for m in merges if len(m) != 2 or not {*m, "".join(m)} <= vocabulary.keys()]:
        raise UserError(f"{g.path} merges what its vocabulary does not have (first: {strange[0]})")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if g.fields["general.architecture"].startswith("qwen"):  # Qwen's own; llama.cpp leaves it out
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t, k in zip(tokens, kinds) if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == USER_DEFINED])
    bos = g.fields.get("tokenizer.ggml.bos_token_id")
    if bos is not None and g.fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        if {":", "$"} & set(tokens[bos]):
            raise UserError(f"{g.path} puts {tokens[bos]!r} before each text, which tokenizer.json has no way to say")
        backend.post_processor = begins_with(tokens[bos], bos)
    return backend


def begins_with(token: str, id: int):
    """What puts a token before each text, for programs that ask for it (ours never do)."""
    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, id)]
    )


def tokenizer_fields(tokenizer, vocab_size: int) -> tuple[list[str], list[int], list[str], str, bool]:
    """A byte-level BPE tokenizer for a GGUF file, with a token for each row of the embedding.

    (tokens, their kinds, merges, how words are split, whether a mark is put before each text)
    """
    said = json.loads(tokenizer.to_json())
    split = [pre for pre, make in PRE_TOKENIZERS.items() if _same(said["pre_tokenizer"], make())]
    if not split or said["model"]["ignore_merges"] != (split[0] == "llama-bpe"):
        raise UserError("this tokenizer splits words in a way that llama.cpp has no name for here")
    if said["normalizer"] not in (None, {"type": "NFC"}):
        raise UserError(f"this tokenizer changes the text first ({said['normalizer']['type']}), which GGUF cannot say")
    tokens = [""] * vocab_size
    for token, i in said["model"]["vocab"].items():
        tokens[i] = token
    kinds = [NORMAL if token else UNUSED for token in tokens]
    for added in said["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in said["model"]["merges"]]
    begun = bool(tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("").ids)
    return [token or f"[UNUSED{i}]" for i, token in enumerate(tokens)], kinds, merges, split[0], begun


def _same(said: dict, candidate) -> bool:
    """Whether two ways of splitting are one; `trim_offsets` only matters to who asks for offsets."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = candidate

    def essence(value):
        if isinstance(value, dict):
            return {k: essence(v) for k, v in value.items() if k != "trim_offsets"}
        return [essence(v) for v in value] if isinstance(value, list) else value

    return essence(said) == essence(json.loads(backend.to_str())["pre_tokenizer"])
