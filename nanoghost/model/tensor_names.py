"""The names of the same weights here, in Hugging Face transformers, in PEFT and in GGUF files (Llama family).

Layers are numbered from 0: ours are `blocks.0.`, Hugging Face's `model.layers.0.`, GGUF's `blk.0.`.
"""

import re

TENSORS = (  # of the whole model
    # ours                  Hugging Face                 GGUF
    ("embedding.weight", "model.embed_tokens.weight", "token_embd.weight"),
    ("final_norm.weight", "model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "lm_head.weight", "output.weight"),
)
LAYER_MODULES = (  # of one layer; each has a weight, some have a bias
    # ours                  Hugging Face                 GGUF
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("attention.q", "self_attn.q_proj", "attn_q"),
    ("attention.k", "self_attn.k_proj", "attn_k"),
    ("attention.v", "self_attn.v_proj", "attn_v"),
    ("attention.out", "self_attn.o_proj", "attn_output"),
    ("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    ("mlp.gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp.up", "mlp.up_proj", "ffn_up"),
    ("mlp.down", "mlp.down_proj", "ffn_down"),
)
MATRIX_MODULES = {  # short name of each matrix of a layer -> its module in llama.Block
    "q": "attention.q",
    "k": "attention.k",
    "v": "attention.v",
    "out": "attention.out",
    "gate": "mlp.gate",
    "up": "mlp.up",
    "down": "mlp.down",
}

_OURS_TO_HUGGINGFACE = {ours: hf for ours, hf, _ in TENSORS + LAYER_MODULES}
_HUGGINGFACE_TO_GGUF = {hf: gguf for _, hf, gguf in TENSORS + LAYER_MODULES}
_GGUF_TO_HUGGINGFACE = {gguf: hf for hf, gguf in _HUGGINGFACE_TO_GGUF.items()}


def huggingface_name(name: str) -> str:
    """Hugging Face's name of one of our tensors, such as "blocks.0.attention.q.weight"."""
    if name in _OURS_TO_HUGGINGFACE:
        return _OURS_TO_HUGGINGFACE[name]
    _, layer, *module, kind = name.split(".")
    return f"model.layers.{layer}.{_OURS_TO_HUGGINGFACE['.'.join(module)]}.{kind}"


def gguf_name(huggingface_name: str) -> str:
    """GGUF's name of a tensor that has this name in Hugging Face's form."""
    if huggingface_name in _HUGGINGFACE_TO_GGUF:
        return _HUGGINGFACE_TO_GGUF[huggingface_name]
    _, _, layer, *module, kind = huggingface_name.split(".")
    return f"blk.{layer}.{_HUGGINGFACE_TO_GGUF['.'.join(module)]}.{kind}"


def huggingface_name_of_gguf(name: str) -> str | None:
    """Hugging Face's name of a tensor in a GGUF file; None if the Llama family has no such tensor."""
    if name in _GGUF_TO_HUGGINGFACE and name.endswith(".weight"):
        return _GGUF_TO_HUGGINGFACE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if not match or match[2] not in _GGUF_TO_HUGGINGFACE:
        return None
    layer, module, kind = match.groups()
    return f"model.layers.{layer}.{_GGUF_TO_HUGGINGFACE[module]}.{kind}"


def peft_target(matrix: str) -> str:
    """PEFT's name of a matrix in `target_modules`: "q" -> "q_proj"."""
    return _OURS_TO_HUGGINGFACE[MATRIX_MODULES[matrix]].rpartition(".")[2]


def peft_name(layer: int, matrix: str, factor: str) -> str:
    """PEFT's name of the tensor A or B (`factor`) of the update of one matrix."""
    module = _OURS_TO_HUGGINGFACE[MATRIX_MODULES[matrix]]
    return f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"
