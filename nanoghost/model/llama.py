"""llama: Llama and its relatives SmolLM, Mistral, Qwen2, Qwen3 and Granite, which other inference engines run too.

It learns more slowly than ghost.py at our scale, but published models run here, and models trained here run everywhere.
A pre-norm transformer with learned RMSNorm, rotary embeddings, grouped-query attention and SwiGLU. The relatives differ
in biases, QK-norm, sliding windows, RoPE scaling and four multipliers (llama_config.py). Exported tensors have the
names and shapes of Hugging Face transformers.

B batch, T new tokens, S tokens read so far, D width, H heads, G key-value heads, K head width, F width of the MLP,
V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model.kv_cache import KVCache
from nanoghost.model.layers import Embedding, Linear, RMSNorm, attend, init_uniform, rotate, token_logprobs
from nanoghost.model.layout import Layout, causal_layout
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.model.lora import Adapter, LoRALinear, rows_by_adapter
from nanoghost.model.rope import rope_table
from nanoghost.model.tensor_names import MATRIX_MODULES, huggingface_name


class Attention(nn.Module):
    """Causal grouped-query self-attention; some relatives have biases, QK-norm, or layers without rotary embedding."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        c = config
        self.layer = layer
        self.heads, self.key_value_heads, self.head_width = c.heads, c.key_value_heads, c.head_width
        self.has_rope = layer not in c.no_rope_layers
        self.scale = c.attention_multiplier
        q_width, kv_width = c.heads * c.head_width, c.key_value_heads * c.head_width
        self.q = LoRALinear(c.width, q_width, c.qkv_bias, key=(layer, "q"))
        self.k = LoRALinear(c.width, kv_width, c.qkv_bias, key=(layer, "k"))
        self.v = LoRALinear(c.width, kv_width, c.qkv_bias, key=(layer, "v"))
        self.out = LoRALinear(q_width, c.width, c.out_bias, key=(layer, "out"))
        self.q_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_width, c.norm_eps) if c.qk_norm else None

    def forward(self, x_BTD, cos_TK, sin_TK, mask_BTS, cache: KVCache | None = None, adapter_rows=()):
        B, T, _ = x_BTD.shape
        q = self.q(x_BTD, adapter_rows).view(B, T, self.heads, self.head_width)
        k = self.k(x_BTD, adapter_rows).view(B, T, self.key_value_heads, self.head_width)
        v = self.v(x_BTD, adapter_rows).view(B, T, self.key_value_heads, self.head_width)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.has_rope:
            q, k = rotate(q, cos_TK, sin_TK), rotate(k, cos_TK, sin_TK)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.out(attend(q, k, v, mask_BTS, scale=self.scale), adapter_rows)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.gate = LoRALinear(config.width, config.mlp_width, key=(layer, "gate"))
        self.up = LoRALinear(config.width, config.mlp_width, key=(layer, "up"))
        self.down = LoRALinear(config.mlp_width, config.width, key=(layer, "down"))

    def forward(self, x_BTD, adapter_rows=()):
        h_BTF = F.silu(self.gate(x_BTD, adapter_rows)) * self.up(x_BTD, adapter_rows)
        return self.down(h_BTF, adapter_rows)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config, layer)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config, layer)
        self.residual_multiplier = config.residual_multiplier

    def matrix(self, name: str) -> nn.Parameter:
        """Weight (outputs, inputs) of one of the matrices q, k, v, out, gate, up, down."""
        return self.get_submodule(MATRIX_MODULES[name]).weight

    def matrices(self) -> list[nn.Parameter]:
        return [self.matrix(name) for name in MATRIX_MODULES]

    def init_weights(self) -> None:
        """Uniform, as in ghost.py. Matrices that write into the residual stream are drawn too, and then set to 0."""
        for name in ("q", "k", "v", "gate", "up", "out", "down"):
            weight = self.matrix(name).data
            init_uniform(weight, 1 / weight.size(1))
        for name in ("out", "down"):
            nn.init.zeros_(self.matrix(name))

    def forward(self, x_BTD, cos_TK, sin_TK, mask_BTS, cache: KVCache | None = None, adapter_rows=()):
        h_BTD = self.attention_norm(x_BTD)
        y_BTD = self.attention(h_BTD, cos_TK, sin_TK, mask_BTS, cache, adapter_rows)
        x_BTD = x_BTD + scaled(y_BTD, self.residual_multiplier)
        return x_BTD + scaled(self.mlp(self.mlp_norm(x_BTD), adapter_rows), self.residual_multiplier)


def scaled(x, factor: float):
    """x * factor, without work for the factor 1 that most models have."""
    return x if factor == 1.0 else x * factor


class Llama(nn.Module):
    """A LanguageModel (interface.py) whose scores are logits. LoRA adapters may be attached to it (lora.py)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        c = config
        self.config = config
        self.adapters: list[Adapter] = []
        self.embedding = Embedding(c.vocab_size, c.width)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.depth))
        self.final_norm = RMSNorm(c.width, c.norm_eps)
        self.lm_head = None if c.tied_embeddings else Linear(c.width, c.vocab_size)
        cos, sin = rope_table(c.context, c.head_width, c.rope_base, c.rope_scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random initial weights. The order of the draws is fixed, so a seed always gives the same model."""
        self.embedding.weight.normal_().mul_(0.02 if self.config.tied_embeddings else 0.8)
        for block in self.blocks:
            block.init_weights()
        if self.lm_head is not None:
            self.lm_head.weight.normal_().mul_(0.001)

    @property
    def head_weight(self) -> torch.Tensor:
        return self.embedding.weight if self.lm_head is None else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def set_character_features(self, tokenizer) -> None:
        """Does nothing: a Llama has no character features."""

    def set_embedding_row_dropout(self, epochs: float, seed: int) -> None:
        """Does nothing: a Llama has neither a bigram embedding nor value embeddings."""

    def cast(self, dtype: torch.dtype) -> "Llama":
        """Cast the weights of matmuls to the compute dtype. An untied embedding, norms and biases stay in fp32."""
        for p in [*self.matrices(), self.head_weight]:
            p.data = p.data.to(dtype)
        return self

    def hidden(self, tokens_BT, layout: Layout, cache: KVCache | None = None, adapters_B=None):
        """Last hidden states, (B, T, D), which the output layer multiplies."""
        adapter_rows = rows_by_adapter(self.adapters, adapters_B)
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        windows = self.config.sliding_windows or (0,) * self.config.depth
        masks = {window: layout.sliding_window_mask(window) for window in set(windows) - {0}}
        masks[0] = layout.mask_BTS
        x_BTD = scaled(self.embedding(tokens_BT), self.config.embedding_multiplier).to(self.dtype)
        for block, window in zip(self.blocks, windows):
            x_BTD = block(x_BTD, cos, sin, masks[window], cache, adapter_rows)
        return scaled(self.final_norm(x_BTD), 1 / self.config.logits_scaling)

    def forward(self, tokens_BT, cache: KVCache | None = None, segments_BT=None, last_B=None, adapters_B=None):
        """Logits (B, T, V) in fp32. Arguments as in LanguageModel.__call__, and `adapters_B` as in rows_by_adapter."""
        if cache is None:
            layout = causal_layout(tokens_BT, self.dtype, segments_BT)
        else:
            layout = cache.append_tokens(tokens_BT, self.dtype)
        h_BTD = self.hidden(tokens_BT, layout, cache, adapters_B)
        if last_B is not None:
            h_BTD = h_BTD[torch.arange(len(last_B), device=last_B.device), last_B, None]
        return F.linear(h_BTD, self.head_weight).float()

    def logprobs(self, tokens_BT, targets, segments_BT=None, layout: Layout | None = None, logit_positions=None):
        """log P(target | tokens so far), in fp32. Arguments as in LanguageModel.logprobs."""
        h_BTD = self.hidden(tokens_BT, layout or causal_layout(tokens_BT, self.dtype, segments_BT))
        h_ND = h_BTD.flatten(0, 1) if logit_positions is None else h_BTD[logit_positions]
        return token_logprobs(h_ND, self.head_weight, targets.flatten()).view_as(targets)

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        c = self.config
        capacity = min(capacity, c.context)
        return KVCache(c.depth, rows, capacity, c.key_value_heads, c.head_width, self.dtype, self.device)

    def matrices(self) -> list[nn.Parameter]:
        return [weight for block in self.blocks for weight in block.matrices()]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The adapters if there are any, otherwise all weights."""
        if self.adapters:
            return {"lora": [t for adapter in self.adapters for t in adapter.tensors()]}
        return self.base_parameter_groups()

    def base_parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        block_vectors = [p for block in self.blocks for p in block.parameters() if p.dim() == 1]
        return {
            "matrices": self.matrices(),
            "head": [self.head_weight],
            "embeddings": [] if self.config.tied_embeddings else [self.embedding.weight],
            "scalars": [*block_vectors, self.final_norm.weight],
        }

    def stacked_matrices(self) -> dict[nn.Parameter, int]:
        """None: each matrix is a weight of its own."""
        return {}

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in parameters) for name, parameters in self.base_parameter_groups().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """6 for each weight in a matmul (4 if it is frozen), plus causal attention (half of T x T)."""
        c, counts = self.config, self.parameter_counts()
        matmul_weights = counts["matrices"] + counts["head"]
        lora_weights = sum(t.numel() for adapter in self.adapters for t in adapter.tensors())
        attention = 6 * c.depth * c.heads * c.head_width * (context or c.context)
        return (4 if lora_weights else 6) * matmul_weights + 6 * lora_weights + attention

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        return {huggingface_name(name): tensor for name, tensor in self.state_dict().items()}

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[huggingface_name(name)])
