"""ghost: our own small language model. Every trick that pays at 0.3M to 30M parameters may live here.

What is unusual, beside the usual pre-norm transformer:
  - a token's embedding is the sum of its own row, the rows of its word's letters (so that it can spell words it never
    saw spelled; letters.py), and a hashed row for the pair it forms with the token before it (n-gram tables cost no arithmetic, which
    is what a CPU is short of);
  - the embedding is mixed back into the stream before each layer, and token-specific values into attention on every
    second layer (value embeddings, Zhou et al. 2024);
  - a pointer: with a learned probability the next token is copied from the context, from a place where what came
    before looks like what comes before now (pointer networks, Merity et al. 2016; the cache of Grave et al. 2017): a
    name that no training text had is learned at its first mention;
  - RMSNorm without parameters, also on queries and keys; ReLU squared; matrices that write into the stream start at 0.

B batch, T time, D width, H heads, K head width, V vocabulary, S tokens read so far.
"""

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model.layers import (
    Cache,
    Layout,
    attend,
    norm,
    relu_squared,
    rope_table,
    rotate,
    text_layout,
    token_logprobs,
)
from nanoghost.model.letters import KEPT, NOTHING, letter_table, word_rows

POINTER_WIDTH = 64


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
    """forward(tokens) -> log-probabilities of what follows each; forward(tokens, cache) -> those of the new tokens."""

    def __init__(self, config: GhostConfig):
        super().__init__()
        self.config = config
        D, V = config.width, config.vocab_size
        has_values = [(config.depth - 1 - i) % 2 == 0 for i in range(config.depth)]
        self.embedding = nn.Parameter(torch.randn(V, D) * 0.8)
        self.spelling = nn.Parameter(torch.randn(NOTHING + 1, D) * 0.3)
        self.ngrams = nn.Parameter(torch.zeros(config.ngrams, D))
        self.values = nn.ParameterList(torch.empty(V, D).uniform_(-1, 1) for has in has_values if has)
        self.blocks = nn.ModuleList(Block(config, has) for has in has_values)
        self.head = nn.Parameter(torch.randn(V, D) * 0.001)
        alike = torch.empty(1, POINTER_WIDTH, D).uniform_(-1, 1) * (3 / D) ** 0.5
        self.pointer = nn.Parameter(torch.cat([alike, alike]))  # queries and keys: at first, similar means similar
        self.copies = nn.Parameter(torch.cat([torch.tensor([-3.0]), torch.zeros(D)]))  # log-odds: bias, weights
        cos, sin = rope_table(config.context, config.head_width, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("letters", torch.zeros(V, 3 + KEPT, dtype=torch.int32))

    def learn_letters(self, tokenizer) -> None:
        """Note which bytes each token stands for."""
        self.letters.copy_(letter_table(tokenizer))

    def cast(self, dtype: torch.dtype) -> "Ghost":
        """Matrices (and the head) to the compute dtype; tables stay fp32: rare rows collect tiny updates."""
        for block in self.blocks:
            for p in (block.qkv, block.out, block.up, block.down):
                p.data = p.data.to(dtype)
        self.head.data, self.pointer.data = self.head.data.to(dtype), self.pointer.data.to(dtype)
        return self

    def embed(self, tokens_BT, layout: Layout, tokens_BS):
        """(B, T, D) in the compute dtype, of the new tokens `tokens_BT` among all that were read, `tokens_BS`."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        pair_BT = (layout.previous(tokens_BS) * 9973 + tokens_BT * 31337) % self.config.ngrams
        x_BTD = x_BTD + F.embedding(pair_BT, self.ngrams)
        rows_NL = word_rows(self.letters, tokens_BS, layout.before_BS, tokens_BT.size(1)).flatten(0, 1)
        x_BTD = x_BTD + F.embedding_bag(rows_NL, self.spelling, mode="sum", padding_idx=NOTHING).view_as(x_BTD)
        return norm(x_BTD.to(self.head.dtype))

    def hidden(self, tokens_BT, layout: Layout, cache: Cache | None = None):
        """Last hidden states, (B, T, D)."""
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        seen_BS = tokens_BT if cache is None else cache.tokens[:, : cache.length]
        embedding_BTD = self.embed(tokens_BT, layout, seen_BS)
        values = iter(self.values)
        x_BTD = embedding_BTD
        for layer, block in enumerate(self.blocks):
            v = None if block.value_mix is None else F.embedding(tokens_BT, next(values)).to(x_BTD.dtype)
            x_BTD = block(x_BTD, embedding_BTD, v, cos, sin, layout.mask_BTS, layer, cache)
        return norm(x_BTD)

    def point(self, hidden_BTD, layout: Layout, cache: Cache | None = None):
        """How a copy would be shared out among the tokens of the context (B, T, S), and the log-odds of copying (B, T).

        A token's key is made from the token before it: from where the model stood when that token was to be predicted.
        """
        q_BTK, k_BTK = F.linear(hidden_BTD, self.pointer.flatten(0, 1)).view(*hidden_BTD.shape[:2], 2, -1).unbind(2)
        q_BTK, k_BTK = norm(q_BTK), norm(k_BTK)
        if cache is None:
            index = layout.before_BS.clamp(0)[..., None].expand_as(k_BTK)
            k_BSK = k_BTK.gather(1, index) * (layout.before_BS >= 0)[..., None]
        else:
            k_BSK = cache.point(k_BTK)
        mask_BTS = layout.mask_BTS.expand(len(q_BTK), -1, -1)
        shares_BTS = torch.softmax(torch.baddbmm(mask_BTS, q_BTK * POINTER_WIDTH**-0.5, k_BSK.mT), -1)
        return shares_BTS, hidden_BTD.float() @ self.copies[1:] + self.copies[0]

    def forward(self, tokens_BT, cache: Cache | None = None, segments_BT=None, valid_BT=None, last_only=False):
        """Log-probabilities of the next token (B, T, V) in fp32; only after the last token, (B, 1, V), with `last_only`.

        `segments_BT` numbers the conversations packed into a row: nothing passes between different numbers.
        `cache` holds what was read before; `valid_BT` is False where new columns are only padding (on the left).
        """
        if cache is None:
            layout = text_layout(tokens_BT, self.head.dtype, segments_BT)
        else:
            layout = cache.layout(tokens_BT, valid_BT, self.head.dtype)
        h_BTD = self.hidden(tokens_BT, layout, cache)
        shares_BTS, odds_BT = self.point(h_BTD, layout, cache)
        if last_only:
            h_BTD, shares_BTS, odds_BT = h_BTD[:, -1:], shares_BTS[:, -1:], odds_BT[:, -1:]
        seen_BS = tokens_BT if cache is None else cache.tokens[:, : cache.length]
        copied_BT1 = odds_BT.sigmoid()[..., None]
        probs_BTV = torch.softmax(F.linear(h_BTD, self.head).float(), -1) * (1 - copied_BT1)
        probs_BTV = probs_BTV.scatter_add(2, seen_BS[:, None].expand_as(shares_BTS), shares_BTS * copied_BT1)
        return probs_BTV.clamp_min(1e-30).log()

    def logprobs(self, tokens_BT, targets, segments_BT=None, layout: Layout | None = None, places=None):
        """log P(target | tokens so far) in fp32, (B, T).

        With `places`, a pair of (N,) indices (row, position), only of the tokens that are predicted from there, (N,).
        `layout` stands for `segments_BT` where rows are not simply texts from left to right.
        """
        layout = layout or text_layout(tokens_BT, self.head.dtype, segments_BT)
        h_BTD = self.hidden(tokens_BT, layout)
        shares_BTS, odds_BT = self.point(h_BTD, layout)
        if places is None:
            copied = (shares_BTS * (tokens_BT[:, None] == targets[..., None])).sum(-1, dtype=torch.float32)
            own = token_logprobs(h_BTD.flatten(0, 1), self.head, targets.flatten()).view_as(targets)
        else:
            own = token_logprobs(h_BTD[places], self.head, targets)
            odds_BT = odds_BT[places]
            copied = (shares_BTS[places] * (tokens_BT[places[0]] == targets[:, None])).sum(-1, dtype=torch.float32)
        return torch.logaddexp(own + F.logsigmoid(-odds_BT), copied.clamp_min(1e-30).log() + F.logsigmoid(odds_BT))

    def new_cache(self, rows: int, capacity: int) -> Cache:
        c = self.config
        capacity = min(capacity, c.context)
        return Cache(c.depth, rows, capacity, c.heads, c.head_width, self.head.dtype, self.head.device, POINTER_WIDTH)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the way they are optimised; `matrices` are stacks (n, rows, columns) of whole matrices."""
        scalars = [p for b in self.blocks for p in (b.residual_mix, b.value_mix) if p is not None]
        return {
            "matrices": [p for b in self.blocks for p in (b.qkv, b.out, b.up, b.down)] + [self.pointer],
            "head": [self.head],
            "embeddings": [self.embedding, self.spelling, *self.values],
            "ngrams": [self.ngrams],
            "scalars": [*scalars, self.copies],
        }

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in ps) for name, ps in self.parameter_groups().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """Useful training operations per token: 6 x matrix weights, causal attention (half of T x T, twice), the pointer."""
        n = self.parameter_counts()
        T = context or self.config.context
        return 6 * (n["matrices"] + n["head"]) + (6 * self.config.depth * self.config.width + 3 * POINTER_WIDTH) * T

    def settings(self) -> dict:
        """config.json."""
        return {"architectures": ["NanoghostForCausalLM"], **asdict(self.config)}

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        """model.safetensors, by name."""
        return self.state_dict()

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(tensors)
