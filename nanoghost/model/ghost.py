"""ghost: our own small language model. Every trick that pays at 0.3M to 30M parameters may live here.

What is unusual, beside the usual pre-norm transformer:
  - a token's embedding is the sum of its own row, the rows of its letters (so that it can spell words it never saw
    spelled), and a hashed row for the pair it forms with the token before it (n-gram tables cost no arithmetic, which
    is what a CPU is short of);
  - the embedding is mixed back into the stream before each layer, and token-specific values into attention on every
    second layer (value embeddings, Zhou et al. 2024);
  - RMSNorm without parameters, also on queries and keys; ReLU squared; matrices that write into the stream start at 0.

B batch, T time, D width, H heads, K head width, V vocabulary, L letters kept of a token.
"""

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model.layers import (
    Cache,
    Layout,
    additive,
    attend,
    causal_mask,
    norm,
    relu_squared,
    rope_table,
    rotate,
    token_logprobs,
)

LETTERS = 8  # bytes of a token that its embedding sees, counted from the front and again from the back


@dataclass(frozen=True)
class GhostConfig:
    vocab_size: int = 4096
    """Tokens."""
    context: int = 512
    """Longest sequence in tokens."""
    depth: int = 4
    """Layers."""
    width: int = 256
    """Of the residual stream; a multiple of `head_width`."""
    head_width: int = 64
    """Of one attention head."""
    ngrams: int = 32768
    """Rows of the table of hashed token pairs."""
    rope_base: float = 10000.0
    """Longest wavelength of the rotary embedding, in tokens over 2 pi."""
    model_type: str = "nanoghost"
    """How config.json names the architecture."""

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @classmethod
    def from_settings(cls, settings: dict) -> "GhostConfig":
        """From config.json, which holds more than the architecture."""
        return cls(**{f.name: settings[f.name] for f in fields(cls)})


class Block(nn.Module):
    def __init__(self, config: GhostConfig, has_values: bool):
        super().__init__()
        D = config.width
        self.config = config
        self.qkv = nn.Parameter(torch.empty(3, D, D).uniform_(-1, 1) * (3 / D) ** 0.5)
        self.out = nn.Parameter(torch.zeros(1, D, D))
        self.up = nn.Parameter(torch.empty(1, 4 * D, D).uniform_(-1, 1) * (0.75 / D) ** 0.5)
        self.down = nn.Parameter(torch.zeros(1, D, 4 * D))
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.1]))
        self.value_mix = nn.Parameter(torch.tensor([0.5])) if has_values else None

    def forward(self, x_BTD, embedding_BTD, values_BTD, cos_TK, sin_TK, mask_BTS, layer=0, cache: Cache | None = None):
        B, T, D = x_BTD.shape
        keep, again = self.residual_mix.to(x_BTD.dtype)
        x_BTD = x_BTD * keep + embedding_BTD * again
        qkv = F.linear(norm(x_BTD), self.qkv.view(3 * D, D)).view(B, T, 3, self.config.heads, self.config.head_width)
        qk = rotate(norm(qkv[:, :, :2]), cos_TK, sin_TK)
        q, k, v = qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]
        if values_BTD is not None:
            v = v + self.value_mix.to(v.dtype) * values_BTD.view_as(v)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y_BTD = attend(q, k, v, mask_BTS, scale=1.44 / self.config.head_width**0.5)  # sharper, since |q| = |k| is fixed
        x_BTD = x_BTD + F.linear(y_BTD, self.out[0])
        return x_BTD + F.linear(relu_squared(F.linear(norm(x_BTD), self.up[0])), self.down[0])


class Ghost(nn.Module):
    """forward(tokens) -> logits; forward(tokens, cache) -> logits of the new tokens; see `hidden` for the shapes."""

    def __init__(self, config: GhostConfig):
        super().__init__()
        self.config = config
        D, V = config.width, config.vocab_size
        has_values = [(config.depth - 1 - i) % 2 == 0 for i in range(config.depth)]
        self.embedding = nn.Parameter(torch.randn(V, D) * 0.8)
        self.spelling = nn.Parameter(torch.randn(512 * LETTERS + 1, D) * 0.3)  # row of (position, byte); last: none
        self.ngrams = nn.Parameter(torch.zeros(config.ngrams, D))
        self.values = nn.ParameterList(torch.empty(V, D).uniform_(-1, 1) for has in has_values if has)
        self.blocks = nn.ModuleList(Block(config, has) for has in has_values)
        self.head = nn.Parameter(torch.randn(V, D) * 0.001)
        cos, sin = rope_table(config.context, config.head_width, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("letters", torch.full((V, 2 * LETTERS), 512 * LETTERS, dtype=torch.int32))

    def learn_letters(self, tokenizer) -> None:
        """Fill the table of each token's bytes: (V, 2 L) rows of `spelling`.

        A space in front does not count, so that " day" has the letters of "day".
        """
        for token in range(tokenizer.vocab_size):
            word = tokenizer.token_bytes(token)
            word = word.lstrip(b" ") or word
            for i, byte in enumerate(word[:LETTERS]):
                self.letters[token, i] = 256 * i + byte
            for i, byte in enumerate(word[::-1][:LETTERS]):
                self.letters[token, LETTERS + i] = 256 * (LETTERS + i) + byte

    def cast(self, dtype: torch.dtype) -> "Ghost":
        """Matrices (and the head) to the compute dtype; tables stay fp32: rare rows collect tiny updates."""
        for block in self.blocks:
            for p in (block.qkv, block.out, block.up, block.down):
                p.data = p.data.to(dtype)
        self.head.data = self.head.data.to(dtype)
        return self

    def embed(self, tokens_BT, previous_BT):
        """(B, T, D) in the compute dtype. `previous` is the token before each, 0 where there is none."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        pair_BT = (previous_BT * 9973 + tokens_BT * 31337) % self.config.ngrams
        x_BTD = x_BTD + F.embedding(pair_BT, self.ngrams)
        letters_NL = self.letters[tokens_BT.flatten()].long()
        x_BTD = x_BTD + F.embedding_bag(letters_NL, self.spelling, mode="sum", padding_idx=512 * LETTERS).view_as(x_BTD)
        return norm(x_BTD.to(self.head.dtype))

    def hidden(
        self, tokens_BT, segments_BT=None, cache: Cache | None = None, valid_BT=None, layout: Layout | None = None
    ):
        """Last hidden states (B, T, D).

        `segments_BT` numbers the conversations packed into a row: nothing passes between different numbers.
        `cache` holds what was read before; `valid_BT` is False where new columns are only padding (on the left).
        `layout` stands for all of these where rows are not simply texts from left to right.
        """
        start = cache.length if cache is not None else 0
        T, dtype = tokens_BT.size(1), self.head.dtype
        first = cache.last if cache is not None else torch.zeros_like(tokens_BT[:, :1])
        previous_BT = torch.cat([first, tokens_BT[:, :-1]], 1)
        if segments_BT is not None:
            previous_BT[:, 1:] *= segments_BT[:, 1:] == segments_BT[:, :-1]
        if valid_BT is not None:
            previous_BT[:, 1:] *= valid_BT[:, :-1]
        cos, sin = self.cos[start : start + T], self.sin[start : start + T]
        if layout is not None:
            previous_BT, mask = layout.previous_BT, additive(layout.visible_BTS, dtype)
            cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        elif cache is None:
            mask = causal_mask(T, dtype, tokens_BT.device, segments_BT)
        else:
            mask = cache.mask(tokens_BT, valid_BT, dtype)
        embedding_BTD = self.embed(tokens_BT, previous_BT)
        values = iter(self.values)
        x_BTD = embedding_BTD
        for layer, block in enumerate(self.blocks):
            v = None if block.value_mix is None else F.embedding(tokens_BT, next(values)).to(dtype)
            x_BTD = block(x_BTD, embedding_BTD, v, cos, sin, mask, layer, cache)
        if cache is not None:
            cache.length += T
            cache.last = tokens_BT[:, -1:]
        return norm(x_BTD)

    def forward(self, tokens_BT, cache: Cache | None = None, segments_BT=None, valid_BT=None, last_only=False):
        """Logits (B, T, V) in fp32; only those after the last token, (B, 1, V), with `last_only`."""
        h_BTD = self.hidden(tokens_BT, segments_BT, cache, valid_BT)
        return F.linear(h_BTD[:, -1:] if last_only else h_BTD, self.head).float()

    def logprobs(self, tokens_BT, targets_BT, segments_BT=None):
        """log P(target | tokens so far), (B, T) fp32."""
        h_BTD = self.hidden(tokens_BT, segments_BT)
        return token_logprobs(h_BTD.flatten(0, 1), self.head, targets_BT.flatten()).view_as(targets_BT)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        c = self.config
        capacity = min(capacity, c.context)
        return Cache(c.depth, rows, capacity, c.heads, c.head_width, self.head.dtype, self.head.device)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the way they are optimised; `matrices` are stacks (n, rows, columns) of whole matrices."""
        scalars = [p for b in self.blocks for p in (b.residual_mix, b.value_mix) if p is not None]
        return {
            "matrices": [p for b in self.blocks for p in (b.qkv, b.out, b.up, b.down)],
            "head": [self.head],
            "embeddings": [self.embedding, self.spelling, *self.values],
            "ngrams": [self.ngrams],
            "scalars": scalars,
        }

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in ps) for name, ps in self.parameter_groups().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """Useful training operations per token: 6 x matrix weights, and causal attention (half of T x T, twice)."""
        n = self.parameter_counts()
        T = context or self.config.context
        return 6 * (n["matrices"] + n["head"]) + 6 * self.config.depth * self.config.width * T

    def settings(self) -> dict:
        """config.json."""
        return {"architectures": ["NanoghostForCausalLM"], **asdict(self.config)}

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        """model.safetensors, by name."""
        return self.state_dict()

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(tensors)
