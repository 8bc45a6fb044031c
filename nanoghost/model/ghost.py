"""ghost: our own small language model. Every trick that pays at 0.3M to 30M parameters may live here.

What is unusual, beside the usual pre-norm transformer:
  - a token's embedding is the sum of its own row, the rows of its word's letters (character_features.py), and a hashed row for the
    pair it forms with the token before it (n-gram tables cost no arithmetic, which is what a CPU is short of);
  - the embedding is mixed back into the stream before each layer, and token-specific values into attention on every
    second layer (value embeddings, Zhou et al. 2024);
  - two pointers. With a learned probability the next token is copied from the context, from a place where what came
    before looks like what comes before now (pointer networks, Merity et al. 2016; the cache of Grave et al. 2017): a
    name that no training text had is learned at its first mention. With another it is a letter of a word of the
    context: the word is pointed at, and one of its places, counted from the front or from the back. So it can spell
    what it never saw spelled, although tokens hide the letters;
  - RMSNorm without parameters, also on queries and keys; ReLU squared; matrices that write into the stream start at 0.

B batch, T time, D width, H heads, K head width, V vocabulary, S tokens read so far, W pointer width, P places in a word.
"""

from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model import character_features
from nanoghost.model.layers import (
    Cache,
    Layout,
    attend,
    norm,
    relu_squared,
    rotate,
    text_layout,
    token_logprobs,
)
from nanoghost.model.rope import rope_table

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

    adapters = ()  # LoRA is for llama.py

    def __init__(self, config: GhostConfig):
        super().__init__()
        self.config = config
        D, V = config.width, config.vocab_size
        has_values = [(config.depth - 1 - i) % 2 == 0 for i in range(config.depth)]
        self.embedding = nn.Parameter(torch.randn(V, D) * 0.8)
        self.spelling = nn.Parameter(torch.randn(character_features.NOTHING + 1, D) * 0.3)
        self.ngrams = nn.Parameter(torch.zeros(config.ngrams, D))
        self.values = nn.ParameterList(torch.empty(V, D).uniform_(-1, 1) for has in has_values if has)
        self.blocks = nn.ModuleList(Block(config, has) for has in has_values)
        self.head = nn.Parameter(torch.randn(V, D) * 0.001)
        alike = torch.empty(2, POINTER_WIDTH, D).uniform_(-1, 1) * (3 / D) ** 0.5
        self.pointer = nn.Parameter(torch.cat([alike, alike]))  # two queries, two keys: at first, similar means similar
        gates = torch.zeros(
            2 + character_features.PLACES, 1 + D
        )  # bias and weights: of a copy, of a letter, of each place
        gates[:2, 0] = torch.tensor([-3.0, -5.0])
        self.gates = nn.Parameter(gates)
        cos, sin = rope_table(config.context, config.head_width, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.kept = None
        self.register_buffer("letters", torch.zeros(V, 3 + character_features.KEPT, dtype=torch.int32))
        self.register_buffer("letter_tokens", torch.full((character_features.SYMBOLS,), -1))

    def learn_letters(self, tokenizer) -> None:
        """Note which bytes each token stands for."""
        self.letters.copy_(character_features.letter_table(tokenizer))
        self.letter_tokens.copy_(character_features.letter_tokens(self.letters))

    def cast(self, dtype: torch.dtype) -> "Ghost":
        """Matrices (and the head) to the compute dtype; tables stay fp32: rare rows collect tiny updates."""
        for block in self.blocks:
            for p in (block.qkv, block.out, block.up, block.down):
                p.data = p.data.to(dtype)
        self.head.data, self.pointer.data = self.head.data.to(dtype), self.pointer.data.to(dtype)
        return self

    def thin(self, epochs: float, seed: int) -> None:
        """From now on, while learning, look up only one row of `epochs` in the tables of pairs and of values, scaled up.

        These learn a text by heart that is read more than once; now they meet each of its lines about once.
        """
        draw = torch.Generator().manual_seed(seed)
        rows, device = (self.config.ngrams, self.config.vocab_size), self.head.device
        self.kept = (
            {n: (torch.rand(n, generator=draw) * epochs < 1).to(device) * epochs for n in rows} if epochs > 1 else None
        )

    def looked_up(self, table_ND, rows_BT):
        x_BTD = F.embedding(rows_BT, table_ND)
        return x_BTD * self.kept[len(table_ND)][rows_BT][..., None] if self.kept and torch.is_grad_enabled() else x_BTD

    def embed(self, tokens_BT, layout: Layout, rows_BTP, tokens_BS):
        """(B, T, D) in the compute dtype, of the new tokens `tokens_BT` among all that were read, `tokens_BS`."""
        x_BTD = F.embedding(tokens_BT, self.embedding)
        pair_BT = (layout.previous(tokens_BS) * 9973 + tokens_BT * 31337) % self.config.ngrams
        x_BTD = x_BTD + self.looked_up(self.ngrams, pair_BT)
        rows_NP = rows_BTP.flatten(0, 1)
        x_BTD = x_BTD + F.embedding_bag(
            rows_NP, self.spelling, mode="sum", padding_idx=character_features.NOTHING
        ).view_as(x_BTD)
        return norm(x_BTD.to(self.head.dtype))

    def hidden(self, tokens_BT, layout: Layout, cache: Cache | None = None):
        """Last hidden states (B, T, D), and the letters of each token's word so far, as tokens (B, T, P; -1 for none)."""
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        seen_BS = tokens_BT if cache is None else cache.seen
        rows_BTP = character_features.word_rows(self.letters, seen_BS, layout.before_BS, layout.columns_BT)
        embedding_BTD = self.embed(tokens_BT, layout, rows_BTP, seen_BS)
        values = iter(self.values)
        x_BTD = embedding_BTD
        for layer, block in enumerate(self.blocks):
            v = None if block.value_mix is None else self.looked_up(next(values), tokens_BT).to(x_BTD.dtype)
            x_BTD = block(x_BTD, embedding_BTD, v, cos, sin, layout.mask_BTS, layer, cache)
        symbols_BTP = torch.where(
            rows_BTP == character_features.NOTHING, character_features.END, rows_BTP % character_features.SYMBOLS
        )
        return norm(x_BTD), self.letter_tokens[symbols_BTP]

    def point(self, hidden_BTD, spelled_BTP, layout: Layout, cache: Cache | None = None):
        """Where the pointers look and what for.

        Returns copies (B, T, S): how a copy is shared out among the tokens read; letters (B, T, S) and places (B, T, P):
        how a letter is, among the words and their places; spelled (B, S, P); gates (B, T, 3) in fp32: the probability that
        the next token comes from the vocabulary, from a copy, from a letter. Where a word has no letter at a place, the
        vocabulary gets the share.

        The key for copying a token is made from the token before it, from where the model stood when that token was to be
        predicted; the key of a word is made from the word.
        """
        B, T, _ = hidden_BTD.shape
        qk = norm(F.linear(hidden_BTD, self.pointer.flatten(0, 1)).view(B, T, 4, POINTER_WIDTH))
        q, k, spelled_BSP = qk[:, :, :2], qk[:, :, 2:], spelled_BTP
        if cache is None:
            before_BSW = layout.before_BS.clamp(0)[..., None].expand(B, T, POINTER_WIDTH)
            late = k[:, :, 0].gather(1, before_BSW) * (layout.before_BS >= 0)[..., None]
            k = torch.stack([late, k[:, :, 1]], 2)
        else:
            k, spelled_BSP = cache.point(k, spelled_BTP)
        mask_BTS = layout.mask_BTS.expand(B, -1, -1)
        copies_BTS, letters_BTS = (
            torch.softmax(torch.baddbmm(mask_BTS, q[:, :, i] * scale, k[:, :, i].mT), -1)
            for i, scale in enumerate((POINTER_WIDTH**-0.5, 2 * POINTER_WIDTH**-0.5))
        )
        gates = self.gates.float()  # sharded, they come in the compute dtype
        logits = F.linear(hidden_BTD.float(), gates[:, 1:], gates[:, 0])
        places_BTP = torch.softmax(logits[..., 2:], -1)
        there = torch.bmm(letters_BTS, (spelled_BSP >= 0).to(letters_BTS.dtype)).mul(places_BTP).sum(-1).clamp(max=1)
        vocabulary, copy, letter = torch.softmax(F.pad(logits[..., :2], (1, 0)), -1).unbind(-1)
        gates = torch.stack([vocabulary + letter * (1 - there), copy, letter], -1)
        return copies_BTS, letters_BTS, places_BTP, spelled_BSP, gates

    def forward(self, tokens_BT, cache: Cache | None = None, segments_BT=None, last_B=None):
        """Log-probabilities of the next token (B, T, V) in fp32; only after one token in each row, (B, 1, V), with `last_B`.

        `segments_BT` numbers the conversations packed into a row: nothing passes between different numbers.
        `cache` holds what was read before.
        """
        if cache is None:
            layout = text_layout(tokens_BT, self.head.dtype, segments_BT)
        else:
            layout = cache.layout(tokens_BT, self.head.dtype)
        h_BTD, spelled_BTP = self.hidden(tokens_BT, layout, cache)
        copies_BTS, letters_BTS, places_BTP, spelled_BSP, gates = self.point(h_BTD, spelled_BTP, layout, cache)
        if last_B is not None:
            rows_B = torch.arange(len(last_B), device=last_B.device)
            h_BTD, copies_BTS, letters_BTS, places_BTP, gates = (
                x[rows_B, last_B, None] for x in (h_BTD, copies_BTS, letters_BTS, places_BTP, gates)
            )
        seen_BS = tokens_BT if cache is None else cache.seen
        vocabulary, copy, letter = gates.split(1, -1)
        probs_BTV = torch.softmax(F.linear(h_BTD, self.head).float(), -1) * vocabulary
        probs_BTV = probs_BTV.scatter_add(2, seen_BS[:, None].expand_as(copies_BTS), copies_BTS * copy)
        letters_BTSP = (letters_BTS * letter)[..., None] * places_BTP[:, :, None] * (spelled_BSP >= 0)[:, None]
        to_BTX = spelled_BSP.clamp(0).flatten(1)[:, None].expand(-1, letters_BTSP.size(1), -1)
        return probs_BTV.scatter_add(2, to_BTX, letters_BTSP.flatten(2)).clamp_min(1e-30).log()

    def logprobs(self, tokens_BT, targets, segments_BT=None, layout: Layout | None = None, places=None):
        """log P(target | tokens so far) in fp32, (B, T).

        With `places`, a pair of (N,) indices (row, position), only of the tokens that are predicted from there, (N,).
        `layout` stands for `segments_BT` where rows are not simply texts from left to right.
        """
        layout = layout or text_layout(tokens_BT, self.head.dtype, segments_BT)
        h_BTD, spelled_BTP = self.hidden(tokens_BT, layout)
        copies_BTS, letters_BTS, places_BTP, spelled_BSP, gates = self.point(h_BTD, spelled_BTP, layout)
        if places is None:
            places = torch.ones_like(tokens_BT).nonzero(as_tuple=True)
        targets_N = targets.flatten()
        vocabulary, copy, letter = gates[places].unbind(-1)
        own = token_logprobs(h_BTD[places], self.head, targets_N) + vocabulary.log()
        copied = (copies_BTS[places] * (tokens_BT[places[0]] == targets_N[:, None])).sum(-1, dtype=torch.float32) * copy
        n = character_features.is_letter(self.letters)[targets_N].nonzero()[
            :, 0
        ]  # other tokens can't be letters of a word
        b, t = places[0][n], places[1][n]
        same_NSP = (spelled_BSP[b] == targets_N[n, None, None]).to(letters_BTS.dtype)
        spelled = torch.bmm(letters_BTS[b, t][:, None], same_NSP)[:, 0].mul(places_BTP[b, t]).sum(-1) * letter[n]
        pointed = copied.index_add(0, n, spelled)
        return torch.logaddexp(own, pointed.clamp_min(1e-30).log()).view_as(targets)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        c = self.config
        capacity = min(capacity, c.context)
        dtype, device = self.head.dtype, self.head.device
        return Cache(
            c.depth, rows, capacity, c.heads, c.head_width, dtype, device, POINTER_WIDTH, character_features.PLACES
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the way they are optimised; `matrices` are stacks (n, rows, columns) of whole matrices."""
        scalars = [p for b in self.blocks for p in (b.residual_mix, b.value_mix) if p is not None]
        return {
            "matrices": [p for b in self.blocks for p in (b.qkv, b.out, b.up, b.down)] + [self.pointer],
            "head": [self.head],
            "embeddings": [self.embedding, self.spelling, *self.values],
            "ngrams": [self.ngrams],
            "scalars": [*scalars, self.gates],
        }

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in ps) for name, ps in self.parameter_groups().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """Useful training operations per token: 6 x matrix weights, causal attention (half of T x T, twice), two pointers."""
        c, n = self.config, self.parameter_counts()
        products = n["matrices"] + n["head"] + self.gates[:, 1:].numel()
        return 6 * products + (6 * c.depth * c.width + 6 * POINTER_WIDTH + 2 * character_features.PLACES) * (
            context or c.context
        )

    def settings(self) -> dict:
        """config.json."""
        return {"architectures": ["NanoghostForCausalLM"], **asdict(self.config)}

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        """model.safetensors, by name."""
        return self.state_dict()

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(tensors)
