"""llama: the architecture that everybody's engines run. Slower to learn at our scale than ghost.py, but it exports.

Pre-norm transformer with learned RMSNorm, rotary embeddings, grouped-query attention and SwiGLU; tensor names and
layouts are those of Hugging Face's LlamaForCausalLM, so a model folder of ours loads there as it is.

B batch, T time, D width, H heads, G key-value heads, K head width, F width of the MLP, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model.layers import Cache, Layout, attend, rope_table, rotate, text_layout, token_logprobs


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
    """How config.json names the architecture."""

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_settings(cls, settings: dict) -> "LlamaConfig":
        """From a config.json in Hugging Face's words."""
        return cls(
            vocab_size=settings["vocab_size"],
            context=settings["max_position_embeddings"],
            depth=settings["num_hidden_layers"],
            width=settings["hidden_size"],
            heads=settings["num_attention_heads"],
            key_value_heads=settings["num_key_value_heads"],
            mlp_width=settings["intermediate_size"],
            rope_base=settings["rope_theta"],
            norm_eps=settings["rms_norm_eps"],
            tied=settings["tie_word_embeddings"],
        )


class Block(nn.Module):
    def __init__(self, c: LlamaConfig):
        super().__init__()
        self.config = c
        kv_width = c.key_value_heads * c.head_width

        def matrix(rows, columns, scale):  # a stack of one, as the optimizer wants it
            return nn.Parameter(torch.empty(1, rows, columns).uniform_(-1, 1) * scale * (3 / columns) ** 0.5)

        self.q, self.k, self.v = (matrix(n, c.width, 1.0) for n in (c.width, kv_width, kv_width))
        self.gate, self.up = (matrix(c.mlp_width, c.width, 1.0) for _ in range(2))
        self.out, self.down = matrix(c.width, c.width, 0.0), matrix(c.width, c.mlp_width, 0.0)
        self.attention_norm = nn.Parameter(torch.ones(c.width))
        self.mlp_norm = nn.Parameter(torch.ones(c.width))

    def forward(self, x_BTD, cos_TK, sin_TK, mask_BTS, layer=0, cache: Cache | None = None):
        B, T, D = x_BTD.shape
        c = self.config
        h_BTD = F.rms_norm(x_BTD, (D,), self.attention_norm.to(x_BTD.dtype), c.norm_eps)
        q = rotate(F.linear(h_BTD, self.q[0]).view(B, T, c.heads, c.head_width), cos_TK, sin_TK)
        k = rotate(F.linear(h_BTD, self.k[0]).view(B, T, c.key_value_heads, c.head_width), cos_TK, sin_TK)
        v = F.linear(h_BTD, self.v[0]).view(B, T, c.key_value_heads, c.head_width)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        shared = c.heads // c.key_value_heads
        k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        x_BTD = x_BTD + F.linear(attend(q, k, v, mask_BTS, scale=c.head_width**-0.5), self.out[0])
        h_BTD = F.rms_norm(x_BTD, (D,), self.mlp_norm.to(x_BTD.dtype), c.norm_eps)
        return x_BTD + F.linear(F.silu(F.linear(h_BTD, self.gate[0])) * F.linear(h_BTD, self.up[0]), self.down[0])


class Llama(nn.Module):
    """The same interface as ghost.Ghost."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Parameter(torch.randn(c.vocab_size, c.width) * (0.02 if c.tied else 0.8))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.final_norm = nn.Parameter(torch.ones(c.width))
        self.separate_head = None if c.tied else nn.Parameter(torch.randn(c.vocab_size, c.width) * 0.001)
        cos, sin = rope_table(c.context, c.head_width, c.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def head(self):
        return self.embedding if self.config.tied else self.separate_head

    def learn_letters(self, tokenizer) -> None:
        """A Llama's tokens have no letters."""

    def cast(self, dtype: torch.dtype) -> "Llama":
        """Matrices (and the head) to the compute dtype; an untied embedding and the norms stay fp32."""
        for p in [*self.parameter_groups()["matrices"], self.head]:
            p.data = p.data.to(dtype)
        return self

    def hidden(self, tokens_BT, layout: Layout, cache: Cache | None = None):
        """Last hidden states, (B, T, D)."""
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        dtype = self.head.dtype
        x_BTD = F.embedding(tokens_BT, self.embedding).to(dtype)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, cos, sin, layout.mask_BTS, layer, cache)
        return F.rms_norm(x_BTD, (self.config.width,), self.final_norm.to(dtype), self.config.norm_eps)

    def forward(self, tokens_BT, cache: Cache | None = None, segments_BT=None, valid_BT=None, last_only=False):
        """Logits (B, T, V) in fp32; arguments as in ghost.Ghost.forward."""
        if cache is None:
            layout = text_layout(tokens_BT, self.head.dtype, segments_BT)
        else:
            layout = cache.layout(tokens_BT, valid_BT, self.head.dtype)
        h_BTD = self.hidden(tokens_BT, layout, cache)
        return F.linear(h_BTD[:, -1:] if last_only else h_BTD, self.head).float()

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
        norms = [p for b in self.blocks for p in (b.attention_norm, b.mlp_norm)]
        return {
            "matrices": [p for b in self.blocks for p in (b.q, b.k, b.v, b.out, b.gate, b.up, b.down)],
            "head": [self.head],
            "embeddings": [] if self.config.tied else [self.embedding],
            "scalars": [*norms, self.final_norm],
        }

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in ps) for name, ps in self.parameter_groups().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """Useful training operations per token: 6 x matrix weights, and causal attention (half of T x T, twice)."""
        n = self.parameter_counts()
        T = context or self.config.context
        return 6 * (n["matrices"] + n["head"]) + 6 * self.config.depth * self.config.width * T

    def settings(self) -> dict:
        """config.json in Hugging Face's words."""
        c = self.config
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context,
            "num_hidden_layers": c.depth,
            "hidden_size": c.width,
            "num_attention_heads": c.heads,
            "num_key_value_heads": c.key_value_heads,
            "head_dim": c.head_width,
            "intermediate_size": c.mlp_width,
            "rope_theta": c.rope_base,
            "rms_norm_eps": c.norm_eps,
            "tie_word_embeddings": c.tied,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        """model.safetensors with Hugging Face's names."""
        tensors = {ours.replace("blocks.", "model.layers."): t for ours, t in self.state_dict().items()}
        return {_their_name(name): t[0] if t.dim() == 3 else t for name, t in tensors.items()}

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        own = self.state_dict()
        for name, tensor in own.items():
            tensor.copy_(tensors[_their_name(name.replace("blocks.", "model.layers."))].view_as(tensor))


def _their_name(name: str) -> str:
    table = {
        "embedding": "model.embed_tokens.weight",
        "final_norm": "model.norm.weight",
        "separate_head": "lm_head.weight",
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        "out": "self_attn.o_proj.weight",
        **{p: f"self_attn.{p}_proj.weight" for p in "qkv"},
        **{p: f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    }
    *prefix, last = name.split(".")
    return ".".join([*prefix, table[last]])
