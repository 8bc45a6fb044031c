"""llama: the family that everybody's engines run: Llama, SmolLM, Mistral, Qwen2, Qwen3.

Slower to learn at our scale than ghost.py, but what others trained runs here, and what is trained here runs everywhere.
Pre-norm transformer with learned RMSNorm, rotary embeddings, grouped-query attention and SwiGLU; the relatives differ in
biases, norms on queries and keys, sliding windows, and in how positions are stretched. Tensor names and layouts are
those of Hugging Face transformers, so a model folder of ours loads there as it is.

B batch, T time, S tokens read so far, D width, H heads, G key-value heads, K head width, F width of the MLP, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.errors import UserError
from nanoghost.model.layers import Cache, Layout, attend, rotate, text_layout, token_logprobs
from nanoghost.model.lora import Adapter, correct, rows_of
from nanoghost.model.rope import KINDS, kind_of, rope_table

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 4096
    """Tokens."""
    context: int = 512
    """Longest sequence in tokens."""
    depth: int = 4
    """Layers."""
    width: int = 256
    """Of the residual stream."""
    heads: int = 4
    """Query heads."""
    key_value_heads: int = 4
    """Heads of keys and values; each serves heads / key_value_heads query heads."""
    mlp_width: int = 704
    """Of the gated MLP."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """Whether the head is the embedding."""
    model_type: str = "llama"
    """Which of the family; how config.json names it."""
    head_dim: int | None = None
    """Width of a head, where it is not width / heads."""
    biases: str = ""
    """Which of q, k, v and o (what writes into the stream) have one."""
    norm_qk: bool = False
    """RMSNorm on each query and key (Qwen3)."""
    windows: tuple[int, ...] = ()
    """For each layer how many tokens it sees, itself included; 0 for all. Empty: all see all."""
    unrotated: tuple[int, ...] = ()
    """Layers without rotary embedding (SmolLM3)."""
    rope_scaling: dict | None = None
    """How positions are stretched, in Hugging Face's words."""

    @property
    def head_width(self) -> int:
        return self.head_dim or self.width // self.heads

    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each matrix of a layer."""
        q, kv = self.heads * self.head_width, self.key_value_heads * self.head_width
        D, F = self.width, self.mlp_width
        return {"q": (q, D), "k": (kv, D), "v": (kv, D), "out": (D, q), "gate": (F, D), "up": (F, D), "down": (D, F)}

    @classmethod
    def from_settings(cls, s: dict) -> "LlamaConfig":
        """From a config.json in Hugging Face's words. What this code cannot do raises UserError."""
        kind, depth, heads = s["model_type"], s["num_hidden_layers"], s["num_attention_heads"]
        rope = s.get("rope_parameters") or s.get("rope_scaling") or {}
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        refuse = {
            f"the activation {s.get('hidden_act')}": s.get("hidden_act", "silu") != "silu",
            "biases in the MLP": s.get("mlp_bias"),
            f"positions stretched by '{kind_of(scaling)}'": kind_of(scaling) not in KINDS,
            "rotary embeddings on a part of each head": (s.get("partial_rotary_factor") or 1.0) != 1.0,
            "quantised weights": s.get("quantization_config"),
        }
        if reasons := [reason for reason, applies in refuse.items() if applies]:
            raise UserError(f"this {kind} model has {' and '.join(reasons)}, which nanoghost cannot represent")
        return cls(
            vocab_size=s["vocab_size"],
            context=s["max_position_embeddings"],
            depth=depth,
            width=s["hidden_size"],
            heads=heads,
            key_value_heads=s.get("num_key_value_heads") or heads,
            mlp_width=s["intermediate_size"],
            rope_base=float(s.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=s["rms_norm_eps"],
            tied=s.get("tie_word_embeddings", False),
            model_type=kind,
            head_dim=s.get("head_dim") if s.get("head_dim") != s["hidden_size"] // heads else None,
            biases="qkv" if kind == "qwen2" else "qkvo" if s.get("attention_bias") else "",
            norm_qk=kind == "qwen3",
            windows=_windows(s, depth),
            unrotated=tuple(i for i, rotated in enumerate(s.get("no_rope_layers") or ()) if not rotated),
            rope_scaling=scaling if kind_of(scaling) != "default" else None,
        )


def _windows(s: dict, depth: int) -> tuple[int, ...]:
    """Sliding windows of the layers: Mistral's are in all of them, Qwen's in those from some layer on, if at all."""
    window = s.get("sliding_window")
    if not window or (s["model_type"] != "mistral" and not s.get("use_sliding_window")) or s["model_type"] == "llama":
        return ()
    kinds = s.get("layer_types")
    if s["model_type"] == "mistral" and not kinds:
        return (window,) * depth
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return tuple(window if i >= s["max_window_layers"] else 0 for i in range(depth))


class Block(nn.Module):
    def __init__(self, c: LlamaConfig, layer: int):
        super().__init__()
        self.config = c
        self.rotated = layer not in c.unrotated
        q_width, kv_width = c.heads * c.head_width, c.key_value_heads * c.head_width

        def matrix(rows, columns, scale):  # a stack of one, as the optimizer wants it
            return nn.Parameter(torch.empty(1, rows, columns).uniform_(-1, 1) * scale * (3 / columns) ** 0.5)

        def bias(which, rows):
            return nn.Parameter(torch.zeros(rows)) if which in c.biases else None

        self.q, self.k, self.v = (matrix(n, c.width, 1.0) for n in (q_width, kv_width, kv_width))
        self.gate, self.up = (matrix(c.mlp_width, c.width, 1.0) for _ in range(2))
        self.out, self.down = matrix(c.width, q_width, 0.0), matrix(c.width, c.mlp_width, 0.0)
        self.q_bias, self.k_bias, self.v_bias = (bias(x, n) for x, n in zip("qkv", (q_width, kv_width, kv_width)))
        self.out_bias = bias("o", c.width)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(c.head_width)) if c.norm_qk else None for _ in "qk")
        self.attention_norm = nn.Parameter(torch.ones(c.width))
        self.mlp_norm = nn.Parameter(torch.ones(c.width))

    def norm(self, x, weight):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.config.norm_eps)

    def forward(self, x_BTD, cos_TK, sin_TK, mask_BTS, layer=0, cache: Cache | None = None, adapted=()):
        B, T, D = x_BTD.shape
        c = self.config

        def linear(x, name):
            bias = getattr(self, f"{name}_bias", None)
            y = F.linear(x, getattr(self, name)[0], None if bias is None else bias.to(x.dtype))
            return correct(y, x, (layer, name), adapted)

        h_BTD = self.norm(x_BTD, self.attention_norm)
        q = linear(h_BTD, "q").view(B, T, c.heads, c.head_width)
        k, v = (linear(h_BTD, name).view(B, T, c.key_value_heads, c.head_width) for name in "kv")
        if c.norm_qk:
            q, k = self.norm(q, self.q_norm), self.norm(k, self.k_norm)
        if self.rotated:
            q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        x_BTD = x_BTD + linear(attend(q, k, v, mask_BTS, scale=c.head_width**-0.5), "out")
        h_BTD = self.norm(x_BTD, self.mlp_norm)
        return x_BTD + linear(F.silu(linear(h_BTD, "gate")) * linear(h_BTD, "up"), "down")


class Llama(nn.Module):
    """The same interface as ghost.Ghost."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = c = config
        self.adapters: list[Adapter] = []
        self.embedding = nn.Parameter(torch.randn(c.vocab_size, c.width) * (0.02 if c.tied else 0.8))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.depth))
        self.final_norm = nn.Parameter(torch.ones(c.width))
        self.separate_head = None if c.tied else nn.Parameter(torch.randn(c.vocab_size, c.width) * 0.001)
        cos, sin = rope_table(c.context, c.head_width, c.rope_base, c.rope_scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def head(self):
        return self.embedding if self.config.tied else self.separate_head

    def learn_letters(self, tokenizer) -> None:
        """A Llama's tokens have no letters."""

    def thin(self, epochs: float, seed: int) -> None:
        """A Llama has no tables."""

    def cast(self, dtype: torch.dtype) -> "Llama":
        """Matrices (and the head) to the compute dtype; an untied embedding and the norms stay fp32."""
        for p in [*self.own_parameters()["matrices"], self.head]:
            p.data = p.data.to(dtype)
        return self

    def hidden(self, tokens_BT, layout: Layout, cache: Cache | None = None, adapters_B=None):
        """Last hidden states, (B, T, D)."""
        adapted = rows_of(self.adapters, adapters_B)
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        dtype = self.head.dtype
        x_BTD = F.embedding(tokens_BT, self.embedding).to(dtype)
        masks_BTS = {0: layout.mask_BTS} | {w: layout.within(w) for w in set(self.config.windows) - {0}}
        for layer, block in enumerate(self.blocks):
            mask_BTS = masks_BTS[self.config.windows[layer] if self.config.windows else 0]
            x_BTD = block(x_BTD, cos, sin, mask_BTS, layer, cache, adapted)
        return F.rms_norm(x_BTD, (self.config.width,), self.final_norm.to(dtype), self.config.norm_eps)

    def forward(self, tokens_BT, cache: Cache | None = None, segments_BT=None, last_B=None, adapters_B=None):
        """Logits (B, T, V) in fp32; arguments as in ghost.Ghost.forward, and which adapter each row uses (lora.rows_of)."""
        if cache is None:
            layout = text_layout(tokens_BT, self.head.dtype, segments_BT)
        else:
            layout = cache.layout(tokens_BT, self.head.dtype)
        h_BTD = self.hidden(tokens_BT, layout, cache, adapters_B)
        if last_B is not None:
            h_BTD = h_BTD[torch.arange(len(last_B), device=last_B.device), last_B, None]
        return F.linear(h_BTD, self.head).float()

    def logprobs(self, tokens_BT, targets, segments_BT=None, layout: Layout | None = None, places=None):
        """log P(target | tokens so far) in fp32; arguments as in ghost.Ghost.logprobs."""
        h_BTD = self.hidden(tokens_BT, layout or text_layout(tokens_BT, self.head.dtype, segments_BT))
        h_ND = h_BTD.flatten(0, 1) if places is None else h_BTD[places]
        return token_logprobs(h_ND, self.head, targets.flatten()).view_as(targets)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        c = self.config
        return Cache(
            c.depth, rows, min(capacity, c.context), c.key_value_heads, c.head_width, self.head.dtype, self.head.device
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What is trained: the adapter where there is one, else everything."""
        if self.adapters:
            return {"lora": [t for adapter in self.adapters for t in adapter.tensors()]}
        return self.own_parameters()

    def own_parameters(self) -> dict[str, list[nn.Parameter]]:
        vectors = [p for b in self.blocks for p in b.parameters() if p.dim() == 1]
        return {
            "matrices": [p for b in self.blocks for p in (b.q, b.k, b.v, b.out, b.gate, b.up, b.down)],
            "head": [self.head],
            "embeddings": [] if self.config.tied else [self.embedding],
            "scalars": [*vectors, self.final_norm],
        }

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in ps) for name, ps in self.own_parameters().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """Useful training operations per token: 6 x matrix weights (4 where they are not trained, only passed through),
        and causal attention (half of T x T, twice)."""
        n = self.parameter_counts()
        T = context or self.config.context
        trained = sum(t.numel() for adapter in self.adapters for t in adapter.tensors())
        return (
            (4 if trained else 6) * (n["matrices"] + n["head"])
            + 6 * trained
            + 6 * self.config.depth * self.config.heads * self.config.head_width * T
        )

    def settings(self) -> dict:
        """config.json in Hugging Face's words."""
        c = self.config
        settings = {
            "architectures": [CLASSES[c.model_type]],
            "model_type": c.model_type,
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context,
            "num_hidden_layers": c.depth,
            "hidden_size": c.width,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.key_value_heads,
            "head_dim": c.head_width,
            "intermediate_size": c.mlp_width,
            "rope_theta": c.rope_base,
            "rope_scaling": c.rope_scaling,
            "rms_norm_eps": c.norm_eps,
            "tie_word_embeddings": c.tied,
            "hidden_act": "silu",
            "attention_bias": c.biases == "qkvo",
            "mlp_bias": False,
        }
        if c.windows:
            kinds = ["sliding_attention" if window else "full_attention" for window in c.windows]
            settings |= {"sliding_window": max(c.windows), "use_sliding_window": True, "layer_types": kinds}
        elif c.model_type != "llama":
            settings |= {"sliding_window": None, "use_sliding_window": False}
        if c.model_type == "smollm3":
            settings |= {"no_rope_layers": [int(i not in c.unrotated) for i in range(c.depth)]}
        return settings

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        """model.safetensors with Hugging Face's names."""
        tensors = {ours.replace("blocks.", "model.layers."): t for ours, t in self.state_dict().items()}
        return {their_name(name): t[0] if t.dim() == 3 else t for name, t in tensors.items()}

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        own = self.state_dict()
        for name, tensor in own.items():
            tensor.copy_(tensors[their_name(name.replace("blocks.", "model.layers."))].view_as(tensor))


def their_name(name: str) -> str:
    table = {
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "separate_head": "lm_head.weight",
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "out": "self_attn.o_proj.weight",
        **{p: f"self_attn.{p}_proj.weight" for p in "qkv"},
        **{p: f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
        **{f"{p}_bias": f"self_attn.{p}_proj.bias" for p in "qkv"},
        "out_bias": "self_attn.o_proj.bias",
        **{f"{p}_norm": f"self_attn.{p}_norm.weight" for p in "qk"},
    }
    *prefix, last = name.split(".")
    return ".".join([*prefix, table[last]])
