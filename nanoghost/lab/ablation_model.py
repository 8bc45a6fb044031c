"""A ghost with switches: from a GPT-2 of 2019 to today's recipe, and what else might belong into it (for ledger.py).

With all switches as they are by default it is model/ghost.py, to the bit (a test says so); there, nothing can be switched.

B batch, T time, D width, V vocabulary, N = B * T positions.
"""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost import hardware
from nanoghost.model import character_features
from nanoghost.model.ghost import Block, Ghost, GhostConfig
from nanoghost.model.layers import Layout, attend, norm, relu_squared, rotate, text_layout, token_logprobs
from nanoghost.optim import schedule
from nanoghost.optim.optimizer import Bucket, Group, Optimizer, orthogonalize
from nanoghost.train import hyperparameters


def fastest() -> str:
    return str(hardware.compute_dtype()).removeprefix("torch.")


@dataclass(frozen=True)
class Rung:
    """How to build and teach a model. The defaults are today's recipe."""

    dtype: str = field(default_factory=fastest)
    """Of the matrix products; float32 in 2019, and still where the processor multiplies nothing else fast."""
    chunks: bool = True
    """The loss without all logits of a batch at once; False: PyTorch's cross-entropy on fp32 logits."""
    decline: bool = True
    """The learning rate stays, then falls to 0 over the last 60%; False: warmup over 5%, then a cosine down to a tenth."""
    rms: bool = True
    """RMSNorm, also on the embedding, and no other parameters than matrices; False: LayerNorm with weights, and biases."""
    rotary: bool = True
    """False: learned positions."""
    qk_norm: bool = True
    relu_squared: bool = True
    """False: GELU."""
    zeros: bool = True
    """What writes into the stream starts at 0, the rest uniform by width; False: all normal, 0.02 (less for what writes)."""
    kinds: bool = True
    """Head, embeddings, pairs and scalars have a learning rate each, and AdamW a short memory; False: they share one, as in 2019."""
    muon: bool = True
    """False: AdamW for the matrices too, at that one learning rate."""
    rows_alike: bool = True
    """NorMuon's scaling of rows, and decay where it agrees with the update; False: plain Muon."""
    iterations: int = 5
    """Of Newton-Schulz in a step of Muon."""
    untied: bool = True
    """The head is not the embedding, and each has its own start."""
    shortcut: bool = True
    """The embedding is mixed back into the stream before each layer."""
    values: bool = True
    """Value embeddings on every second layer."""
    ngrams: int = 32768
    """Rows of the table of hashed pairs; 0: none."""
    letters: bool = True
    """The letters of a word so far are part of the embedding."""
    pointers: int = 2
    """1: the next token may be copied from the context; 2: it may also be a letter of a word there."""
    vocab_size: int = 4096
    depth: int = 2
    """What the dial chooses for runs as short as the ledger's."""
    width: int = 128
    head_width: int = 64
    context: int = 256
    rows: int = 16
    """Of `context` tokens, in a step."""
    row_ramp: bool = False
    """Half the rows in the first 40% of the steps, one and a half times as many in the last 30%."""
    context_ramp: bool = False
    """Half the context, and twice the rows, in the first 40% of the steps."""
    cooldown: float = 0.6
    """Share of the run in which the rate falls."""
    momentum: float = 0.95
    """Of Muon at first; over the first 30% it goes to 0.95."""
    floor: float = 0.0
    """What it falls to, as a share of the top."""
    softcap: float = 0.0
    """Logits x become c tanh(x / c)."""
    table_decay: float = 0.0
    """Weight decay of the tables (embedding, values, pairs)."""
    second_token: float = 0.0
    """Weight of the loss of a second head, which expects the token after the next."""
    averaged: float = 0.0
    """Decay of an exponential moving average of the weights, which is what is scored; 0: the last weights are."""


OF_2019 = Rung(
    dtype="float32", chunks=False, decline=False, rms=False, rotary=False, qk_norm=False, relu_squared=False, zeros=False,
    kinds=False, muon=False, rows_alike=False, untied=False, shortcut=False, values=False, ngrams=0, letters=False, pointers=0,
)  # fmt: skip

LADDER = {  # each on top of those before; together they make today's recipe. What makes it learn sooner comes first
    "2019": {},
    "+ products in bf16": {"dtype": "bfloat16"},  # where that is fast
    "+ loss in chunks": {"chunks": True},
    "+ Muon": {"muon": True},
    "+ start at 0": {"zeros": True},
    "+ a head of its own": {"untied": True},
    "+ learning rates by kind": {"kinds": True},
    "+ the rate falls to 0": {"decline": True},
    "+ NorMuon, cautious decay": {"rows_alike": True},
    "+ RMSNorm, no biases": {"rms": True},
    "+ rotary positions": {"rotary": True},
    "+ QK-norm": {"qk_norm": True},
    "+ ReLU squared": {"relu_squared": True},
    "+ embedding shortcut": {"shortcut": True},
    "+ value embeddings": {"values": True},
    "+ table of pairs": {"ngrams": 32768},
    "+ letters of the word": {"letters": True},
    "+ pointer to tokens": {"pointers": 1},
    "+ pointer to letters": {"pointers": 2},
}
STEP = Rung.rows * Rung.context  # tokens
SYSTEM = ("2019", "+ products in bf16")  # rungs that change the time of a step and not what it teaches
TRIED = {  # each on top of today's recipe
    "vocabulary of 2,048": {"vocab_size": 2048},
    "vocabulary of 8,192": {"vocab_size": 8192},
    "1 layer of 192": {"depth": 1, "width": 192},
    "2 layers of 256": {"width": 256},
    "3 layers of 192": {"depth": 3, "width": 192},
    "4 layers of 128": {"depth": 4},
    "a head of 128": {"head_width": 128},
    "8 rows a step": {"rows": 8},
    "32 rows a step": {"rows": 32},
    "more and more rows": {"row_ramp": True},
    "short context first": {"context_ramp": True},
    "context of 128, 32 rows": {"context": 128, "rows": 32},
    "the rate falls from the start": {"cooldown": 1.0},
    "the rate falls over 40%": {"cooldown": 0.4},
    "the rate falls to a tenth": {"floor": 0.1},
    "momentum grows from 0.85": {"momentum": 0.85},
    "3 iterations of Newton-Schulz": {"iterations": 3},
    "softcap of 15": {"softcap": 15.0},
    "decay on tables": {"table_decay": 0.1},
    "65,536 pairs": {"ngrams": 65536},
    "second token": {"second_token": 0.3},
    "average of the weights": {"averaged": 0.9},
}


def steps_up() -> dict[str, dict]:
    """The LADDER as this machine can climb it."""
    return {name: change for name, change in LADDER.items() if change.get("dtype", fastest()) == fastest()}


def ladder() -> dict[str, Rung]:
    found, rung = {}, OF_2019
    for name, change in steps_up().items():
        rung = replace(rung, **change)
        found[name] = rung
    return found


def left_out() -> dict[str, Rung]:
    """Today's recipe without one of its parts each."""
    missing = {name: {key: getattr(OF_2019, key) for key in change} for name, change in list(steps_up().items())[1:]}
    missing["+ pointers"] = missing.pop("+ pointer to tokens")
    del missing["+ pointer to letters"]  # without it the recipe is the ladder's last rung but one
    return {"without " + name.removeprefix("+ "): replace(Rung(), **change) for name, change in missing.items()}


def tried() -> dict[str, Rung]:
    return {name: replace(Rung(), **change) for name, change in TRIED.items()}


# ── the model ───────────────────────────────────────────────────────────────────────────────────────────────────────


class RungBlock(Block):
    def __init__(self, config: GhostConfig, has_values: bool, rung: Rung):
        super().__init__(config, has_values)
        self.rung, D = rung, config.width
        if not rung.zeros:
            for p, narrower in (
                (self.qkv, 1.0),
                (self.up, 1.0),
                (self.out, 2 * config.depth),
                (self.down, 2 * config.depth),
            ):
                nn.init.normal_(p, std=0.02 / narrower**0.5)
        if not rung.shortcut:
            self.residual_mix = None
        self.vectors = (
            None if rung.rms else vectors({"norm1": D, "norm2": D}, {"qkv": 3 * D, "out": D, "up": 4 * D, "down": D})
        )

    def forward(self, x_BTD, embedding_BTD, values_BTD, cos_TK, sin_TK, mask_BTS):
        (B, T, D), rung = x_BTD.shape, self.rung
        if rung.shortcut:
            keep, again = self.residual_mix.to(x_BTD.dtype)
            x_BTD = x_BTD * keep + embedding_BTD * again
        h = normalised(x_BTD, self.vectors, "norm1")
        qkv = F.linear(h, self.qkv.view(3 * D, D), self.bias("qkv")).view(
            B, T, 3, self.config.heads, self.config.head_width
        )
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        qk = norm(qk) if rung.qk_norm else qk
        qk = rotate(qk, cos_TK, sin_TK) if rung.rotary else qk
        if values_BTD is not None:
            v = v + self.value_mix.to(v.dtype) * values_BTD.view_as(v)
        scale = (1.44 if rung.qk_norm else 1.0) / self.config.head_width**0.5
        x_BTD = x_BTD + F.linear(
            attend(qk[:, :, 0], qk[:, :, 1], v, mask_BTS, scale=scale), self.out[0], self.bias("out")
        )
        inner = F.linear(normalised(x_BTD, self.vectors, "norm2"), self.up[0], self.bias("up"))
        inner = relu_squared(inner) if rung.relu_squared else F.gelu(inner, approximate="tanh")
        return x_BTD + F.linear(inner, self.down[0], self.bias("down"))

    def bias(self, name: str):
        return self.vectors[name].to(self.qkv.dtype) if self.vectors is not None else None


def vectors(norms: dict[str, int], biases: dict[str, int]) -> nn.ParameterDict:
    sizes = {**{f"{name}_bias": size for name, size in norms.items()}, **biases}
    return nn.ParameterDict(
        {n: torch.ones(s) for n, s in norms.items()} | {n: torch.zeros(s) for n, s in sizes.items()}
    )


def normalised(x_BTD, vectors, name: str):
    if vectors is None:
        return norm(x_BTD)
    return F.layer_norm(x_BTD, x_BTD.shape[-1:], vectors[name].to(x_BTD.dtype), vectors[f"{name}_bias"].to(x_BTD.dtype))


class RungModel(Ghost):
    def __init__(self, rung: Rung):
        super().__init__(
            GhostConfig(
                rung.vocab_size, rung.context, rung.depth, rung.width, rung.head_width, ngrams=max(rung.ngrams, 1)
            )
        )
        self.rung, c, D = rung, self.config, rung.width
        has_values = [rung.values and block.value_mix is not None for block in self.blocks]
        state = self.blocks.state_dict()
        self.blocks = nn.ModuleList(RungBlock(c, has, rung) for has in has_values)
        if rung.zeros:
            self.blocks.load_state_dict({k: v for k, v in state.items() if k in self.blocks.state_dict()}, strict=False)
        self.values = self.values if rung.values else nn.ParameterList()
        self.positions = None if rung.rotary else nn.Parameter(torch.randn(c.context, D) * 0.02)
        self.vectors = None if rung.rms else vectors({"norm": D}, {})
        self.later_head = nn.Parameter(torch.randn(c.vocab_size, D) * 0.001) if rung.second_token else None
        self.dtype = torch.float32
        if not rung.untied:
            self.embedding.data.mul_(0.02 / 0.8)
            self.head = None

    def cast(self, dtype: torch.dtype) -> "RungModel":
        self.dtype = dtype
        for p in (p for b in self.blocks for p in (b.qkv, b.out, b.up, b.down)):
            p.data = p.data.to(dtype)
        for p in (self.head, self.later_head, self.pointer):
            if p is not None:
                p.data = p.data.to(dtype)
        return self

    def hidden(self, tokens_BT, layout: Layout):
        """As Ghost's, without a cache; of the letters of words only what is needed."""
        rung, rows_BTP, spelled_BTP = self.rung, None, None
        x_BTD = F.embedding(tokens_BT, self.embedding)
        if rung.ngrams:
            pair_BT = (layout.previous(tokens_BT) * 9973 + tokens_BT * 31337) % self.config.ngrams
            x_BTD = x_BTD + F.embedding(pair_BT, self.ngrams)
        if rung.letters or rung.pointers == 2:
            rows_BTP = character_features.word_rows(self.letters, tokens_BT, layout.before_BS, layout.columns_BT)
        if rung.letters:
            rows_NP = rows_BTP.flatten(0, 1)
            x_BTD = x_BTD + F.embedding_bag(
                rows_NP, self.spelling, mode="sum", padding_idx=character_features.NOTHING
            ).view_as(x_BTD)
        if not rung.rotary:
            x_BTD = x_BTD + self.positions[layout.positions_BT]
        x_BTD = x_BTD.to(self.dtype)
        x_BTD = embedding_BTD = norm(x_BTD) if rung.rms else x_BTD
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        values = iter(self.values)
        for block in self.blocks:
            v = None if block.value_mix is None else F.embedding(tokens_BT, next(values)).to(x_BTD.dtype)
            x_BTD = block(x_BTD, embedding_BTD, v, cos, sin, layout.mask_BTS)
        if rung.pointers == 2:
            spelled_BTP = self.letter_tokens[
                torch.where(
                    rows_BTP == character_features.NOTHING,
                    character_features.END,
                    rows_BTP % character_features.SYMBOLS,
                )
            ]
        return normalised(x_BTD, self.vectors, "norm"), spelled_BTP

    def of_vocabulary(self, hidden_ND, head_VD, targets_N):
        """log P(target) by the head alone, (N,) fp32."""
        if self.rung.chunks and not self.rung.softcap:
            return token_logprobs(hidden_ND, head_VD, targets_N)
        logits_NV = F.linear(hidden_ND, head_VD).float()
        if self.rung.softcap:
            logits_NV = self.rung.softcap * torch.tanh(logits_NV / self.rung.softcap)
        return -F.cross_entropy(logits_NV, targets_N, reduction="none")

    def logprobs(self, tokens_BT, targets):
        """log P(target | tokens so far) in fp32, (B, T); while learning, also what the second head is to learn."""
        layout = text_layout(tokens_BT, self.dtype)
        h_BTD, spelled_BTP = self.hidden(tokens_BT, layout)
        pointing = self.point(h_BTD, spelled_BTP, layout) if self.rung.pointers == 2 else None
        head = self.embedding.to(self.dtype) if self.head is None else self.head
        found = self.of_vocabulary(h_BTD.flatten(0, 1), head, targets.flatten())
        if self.rung.pointers == 1:
            copies_BTS, gate_BT = self.point_to_tokens(h_BTD, layout)
            copied_BT = (copies_BTS * (tokens_BT[:, None] == targets[..., None])).sum(-1, dtype=torch.float32)
            gate_N = gate_BT.flatten()
            found = torch.logaddexp(
                found + F.logsigmoid(-gate_N), copied_BT.flatten().clamp_min(1e-30).log() + F.logsigmoid(gate_N)
            )
        if self.rung.pointers == 2:
            found = self.pointed(found, pointing, tokens_BT, targets)
        if self.later_head is not None and torch.is_grad_enabled():
            later = self.of_vocabulary(h_BTD[:, :-1].flatten(0, 1), self.later_head, targets[:, 1:].flatten())
            found = found + self.rung.second_token * F.pad(later.view(len(targets), -1), (0, 1)).flatten()
        return found.view_as(targets)

    def point_to_tokens(self, hidden_BTD, layout: Layout):
        """(how a copy is shared out among the tokens read (B, T, S), log-odds of a copy (B, T))."""
        q, k = norm(F.linear(hidden_BTD, self.pointer[::2].flatten(0, 1)).unflatten(-1, (2, -1))).unbind(2)
        before = layout.before_BS.clamp(0)[..., None].expand_as(k)
        late = k.gather(1, before) * (layout.before_BS >= 0)[..., None]
        mask_BTS = layout.mask_BTS.expand(len(q), -1, -1)
        copies_BTS = torch.softmax(torch.baddbmm(mask_BTS, q * q.size(-1) ** -0.5, late.mT), -1)
        return copies_BTS, F.linear(hidden_BTD.float(), self.gates[:1, 1:], self.gates[:1, 0])[..., 0]

    def pointed(self, own_N, pointing, tokens_BT, targets):
        """Ghost's mixture of vocabulary, copies and letters, (N,)."""
        copies_BTS, letters_BTS, places_BTP, spelled_BSP, gates = pointing
        vocabulary, copy, letter = gates.flatten(0, 1).unbind(-1)
        copied = (copies_BTS * (tokens_BT[:, None] == targets[..., None])).sum(-1, dtype=torch.float32).flatten() * copy
        n = character_features.is_letter(self.letters)[targets.flatten()].nonzero()[:, 0]
        b, t = n // tokens_BT.size(1), n % tokens_BT.size(1)
        same_NSP = (spelled_BSP[b] == targets.flatten()[n, None, None]).to(letters_BTS.dtype)
        spelled = torch.bmm(letters_BTS[b, t][:, None], same_NSP)[:, 0].mul(places_BTP[b, t]).sum(-1) * letter[n]
        return torch.logaddexp(own_N + vocabulary.log(), copied.index_add(0, n, spelled).clamp_min(1e-30).log())

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        rung, blocks = self.rung, self.blocks
        vectors = [p for v in (self.vectors, *(b.vectors for b in blocks)) if v is not None for p in v.values()]
        mixes = [p for b in blocks for p in (b.residual_mix, b.value_mix) if p is not None]
        tables = [self.embedding] if rung.untied else []
        tables += [self.spelling] * rung.letters + [*self.values]
        groups = {
            "matrices": [p for b in blocks for p in (b.qkv, b.out, b.up, b.down)]
            + [self.pointer] * (rung.pointers > 0),
            "head": [self.head if rung.untied else self.embedding]
            + [p for p in (self.later_head, self.positions) if p is not None],
            "embeddings": tables,
            "ngrams": [self.ngrams] * (rung.ngrams > 0),
            "scalars": [*mixes, *([self.gates] * (rung.pointers > 0)), *vectors],
        }
        return {name: parameters for name, parameters in groups.items() if parameters}


# ── teaching it ─────────────────────────────────────────────────────────────────────────────────────────────────────


class PlainMuon(Bucket):
    """Muon as it first was: no scaling of rows."""

    def _muon(self, g, time):
        self.moment1.lerp_(g, 1 - self.group.beta1)
        return orthogonalize(g.lerp_(self.moment1, self.group.beta1).to(self.compute_dtype), self.iterations).float()


class RungOptimizer(Optimizer):
    def __init__(self, model: RungModel, scale: float):
        self.bucket = Bucket if model.rung.rows_alike else PlainMuon
        super().__init__(model, groups(model.rung, scale), getattr(torch, model.rung.dtype))
        for bucket in self.buckets.values():
            bucket.iterations = model.rung.iterations

    def momentum(self, value: float) -> None:
        """Of Muon, from now on."""
        for bucket in self.buckets.values():
            if bucket.group.kind == "muon":
                bucket.group = replace(bucket.group, beta1=value)


def groups(rung: Rung, scale: float) -> dict[str, Group]:
    """Today's learning rates, times `scale`."""
    found = hyperparameters.pretrain_groups(rung.width, scale)
    one = Group("adamw", found["head"].learning_rate / 3, beta1=0.9, beta2=0.95)
    if not rung.kinds:
        found = {name: group if group.kind == "muon" else one for name, group in found.items()}
    if not rung.muon:
        found["matrices"] = one
    if not rung.rows_alike:
        found["matrices"] = replace(found["matrices"], weight_decay=0.0)
    for name in ("embeddings", "ngrams"):
        found[name] = replace(found[name], weight_decay=rung.table_decay)
    return found


def rate(rung: Rung, progress: float) -> float:
    if rung.decline:
        return schedule.learning_rate(progress, cooldown=rung.cooldown, floor=rung.floor)
    return min(1.0, (progress + 1e-3) / 0.05) * (0.55 + 0.45 * math.cos(math.pi * progress))


def momentum(rung: Rung, progress: float) -> float:
    return rung.momentum + (0.95 - rung.momentum) * min(1.0, progress / 0.3)


def steps_of(rung: Rung, tokens: int) -> int:
    return round(tokens / (rung.rows * rung.context * (0.95 if rung.row_ramp else 1.0)))


def rows_at(rung: Rung, progress: float) -> tuple[int, int]:
    """(rows, context) of a step."""
    rows, context = rung.rows, rung.context
    if rung.row_ramp:
        rows = rows // 2 if progress < 0.4 else rows if progress < 0.7 else rows * 3 // 2
    if rung.context_ramp and progress < 0.4:
        rows, context = rows * 2, context // 2
    return rows, context
