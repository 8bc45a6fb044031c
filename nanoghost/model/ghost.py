"""ghost: a small language model for 0.3M to 30M parameters that learns fast on a CPU.

A pre-norm decoder-only transformer, in equations in docs/model.md. Its differences from a Llama add almost no
arithmetic, which is what limits a CPU. The factors say how much longer training takes without a part, in runs of half a
minute on two cores (docs/results/ledger.md):
  - The embedding is the sum of a token embedding, character features of the word (character_features.py, 1.28) and a
    hashed bigram embedding of the token and its predecessor (1.18).
  - The embedding is mixed back into the residual stream before each layer (embedding shortcut). Every second layer adds
    a token-specific vector to the values of attention (value embeddings, Zhou et al. 2024). Both pay off in runs
    of minutes (docs/log.md).
  - Two copy heads point at tokens of the context and at characters of its words (copy_heads.py, 1.57).
  - RMSNorm without parameters, also on queries and keys (QK-norm, Henry et al. 2020); squared ReLU (So et al. 2021).
    Matrices that write into the residual stream start at 0, so that at first a block is the identity.

B batch, T new tokens, S tokens read so far, D width, H heads, K head width, V vocabulary, P character positions,
N rows of an embedding table.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model import character_features
from nanoghost.model.character_features import MAX_WORD_CHARACTERS, WordsSoFar
from nanoghost.model.copy_heads import POINTER_WIDTH, CopyHeads, EndedWords, GhostCache, values_of_predecessors
from nanoghost.model.layers import Embedding, Linear, attend, init_uniform, norm, relu_squared, rotate, token_logprobs
from nanoghost.model.layout import Layout, causal_layout
from nanoghost.model.rope import rope_table


@dataclass(frozen=True)
class GhostConfig:
    vocab_size: int = 4096
    """Number of tokens."""
    context: int = 512
    """Length of the longest sequence, in tokens."""
    depth: int = 4
    """Number of layers."""
    width: int = 256
    """Width of the residual stream; a multiple of `head_width`."""
    head_width: int = 64
    """Width of an attention head."""
    bigram_rows: int = 32768
    """Rows of the hashed bigram embedding."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    model_type: str = "nanoghost"
    """Name of the architecture in config.json."""

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @classmethod
    def for_depth(cls, depth: int, vocab_size: int, context: int) -> "GhostConfig":
        """Width is 64 x depth, in heads of 64."""
        return cls(vocab_size=vocab_size, context=context, depth=depth, width=64 * depth)

    @classmethod
    def from_json(cls, values: dict) -> "GhostConfig":
        """From the content of config.json, which holds more than the architecture."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def to_json(self) -> dict:
        return asdict(self)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, QK-norm and, in some layers, value embeddings."""

    num_matrices = 3
    """`qkv` holds three D x D matrices, stacked: one matmul is faster than three."""
    scale = 1.44
    """On top of 1 / sqrt(K): after QK-norm |q| = |k| is fixed, so the softmax needs help to be sharp."""

    def __init__(self, config: GhostConfig, layer: int, has_value_embedding: bool):
        super().__init__()
        self.layer = layer
        self.heads, self.head_width = config.heads, config.head_width
        self.qkv = Linear(config.width, self.num_matrices * config.width)
        self.out = Linear(config.width, config.width)
        self.value_mix = nn.Parameter(torch.tensor([0.5])) if has_value_embedding else None

    def forward(self, x_BTD, value_embedding_BTD, cos_TK, sin_TK, mask_BTS, cache: GhostCache | None = None):
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, self.num_matrices, self.heads, self.head_width)
        qk = rotate(norm(qkv[:, :, :2]), cos_TK, sin_TK)
        q, k, v = qk[:, :, 0], qk[:, :, 1], qkv[:, :, 2]
        if self.value_mix is not None:
            v = v + self.value_mix.to(v.dtype) * value_embedding_BTD.view_as(v)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        return self.out(attend(q, k, v, mask_BTS, scale=self.scale / self.head_width**0.5))


class MLP(nn.Module):
    def __init__(self, config: GhostConfig):
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)

    def forward(self, x_BTD):
        return self.down(relu_squared(self.up(x_BTD)))


class Block(nn.Module):
    def __init__(self, config: GhostConfig, layer: int, has_value_embedding: bool):
        super().__init__()
        self.attention = Attention(config, layer, has_value_embedding)
        self.mlp = MLP(config)
        self.residual_mix = nn.Parameter(torch.tensor([1.0, 0.1]))

    def init_weights(self) -> None:
        for linear, variance in ((self.attention.qkv, 1.0), (self.mlp.up, 0.25)):
            init_uniform(linear.weight.data, variance / linear.in_features)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.down.weight)

    def matrices(self) -> list[nn.Parameter]:
        return [self.attention.qkv.weight, self.attention.out.weight, self.mlp.up.weight, self.mlp.down.weight]

    def forward(
        self, x_BTD, embedding_BTD, value_embedding_BTD, cos_TK, sin_TK, mask_BTS, cache: GhostCache | None = None
    ):
        stream, shortcut = self.residual_mix.to(x_BTD.dtype)
        x_BTD = x_BTD * stream + embedding_BTD * shortcut
        x_BTD = x_BTD + self.attention(norm(x_BTD), value_embedding_BTD, cos_TK, sin_TK, mask_BTS, cache)
        return x_BTD + self.mlp(norm(x_BTD))


class Ghost(nn.Module):
    """A LanguageModel (interface.py) whose scores are log-probabilities."""

    adapters = ()  # a ghost is small enough to be trained whole: LoRA is for Llamas

    def __init__(self, config: GhostConfig):
        super().__init__()
        self.config = config
        D, V = config.width, config.vocab_size
        self.embedding = Embedding(V, D)
        self.character_embedding = Embedding(character_features.NO_FEATURE + 1, D)
        self.bigram_embedding = Embedding(config.bigram_rows, D)
        # Every second layer, counted back from the last one
        has_value_embedding = [(config.depth - 1 - layer) % 2 == 0 for layer in range(config.depth)]
        self.value_embeddings = nn.ModuleList(Embedding(V, D) for has in has_value_embedding if has)
        self.blocks = nn.ModuleList(Block(config, layer, has) for layer, has in enumerate(has_value_embedding))
        self.head = Linear(D, V)
        self.copy_heads = CopyHeads(D)
        cos, sin = rope_table(config.context, config.head_width, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # What the tokenizer says about the characters of tokens; set_character_features fills it
        table_shape = V, character_features.FIRST_BYTE + character_features.MAX_TOKEN_BYTES
        self.register_buffer("character_table", torch.zeros(table_shape, dtype=torch.int32))
        self.register_buffer("character_tokens", torch.full((character_features.NUM_CHARACTERS,), -1))
        self.dropout_scales: dict[str, torch.Tensor] = {}
        """Embedding-row dropout of the "bigram" and "value" embeddings: in training, row n is multiplied by element n,
        which is 0 or the number of epochs."""
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random initial weights. The order of the draws is fixed, so a seed always gives the same model."""
        self.embedding.weight.normal_().mul_(0.8)
        self.character_embedding.weight.normal_().mul_(0.3)
        self.bigram_embedding.weight.zero_()
        for table in self.value_embeddings:
            table.weight.uniform_(-1, 1)
        for block in self.blocks:
            block.init_weights()
        self.head.weight.normal_().mul_(0.001)
        self.copy_heads.init_weights()

    @property
    def head_weight(self) -> torch.Tensor:
        return self.head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def set_character_features(self, tokenizer) -> None:
        """Store which characters each token consists of. They are saved with the model."""
        self.character_table.copy_(character_features.character_table(tokenizer))
        self.character_tokens.copy_(character_features.single_character_tokens(self.character_table))

    def set_embedding_row_dropout(self, epochs: float, seed: int) -> None:
        """In training, keep each row of the bigram and value embeddings with probability 1 / epochs, scaled by epochs.

        These tables memorize a text that is read several times; with dropout each row learns from a line about once. It
        lasts until the next call; 1 epoch turns it off. All value embeddings drop the same tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        self.dropout_scales = {}
        if epochs > 1:
            for key, rows in (("bigram", self.config.bigram_rows), ("value", self.config.vocab_size)):
                is_kept_N = torch.rand(rows, generator=generator) * epochs < 1
                self.dropout_scales[key] = is_kept_N.to(self.device) * epochs

    def look_up(self, embedding: Embedding, dropout_key: str, rows_BT):
        """Embeddings (B, T, D), with the row dropout of `dropout_scales[dropout_key]`."""
        x_BTD = embedding(rows_BT)
        if self.dropout_scales and torch.is_grad_enabled():
            return x_BTD * self.dropout_scales[dropout_key][rows_BT][..., None]
        return x_BTD

    def cast(self, dtype: torch.dtype) -> "Ghost":
        """Cast the weights of matmuls. Embeddings stay in fp32, because rare rows collect tiny updates."""
        for p in [*self.matrices(), self.head.weight]:
            p.data = p.data.to(dtype)
        return self

    def bigram_hash(self, tokens_BT, previous_BT):
        """Row of the bigram embedding for each pair of tokens. Colliding pairs share a row. Both factors are prime."""
        return (previous_BT * 9973 + tokens_BT * 31337) % self.config.bigram_rows

    def embed_characters(self, features_BTP):
        """Sum over the positions of a word of the embedding of the character there, (B, T, D)."""
        features_NP = features_BTP.flatten(0, 1)
        table = self.character_embedding.weight
        sum_ND = F.embedding_bag(features_NP, table, mode="sum", padding_idx=character_features.NO_FEATURE)
        return sum_ND.unflatten(0, features_BTP.shape[:2])

    def embed(self, tokens_BT, layout: Layout, features_BTP, tokens_BS):
        """Sum of the three embeddings of the new tokens, normalized, in the compute dtype."""
        x_BTD = self.embedding(tokens_BT)
        bigram_BT = self.bigram_hash(tokens_BT, layout.previous_tokens(tokens_BS))
        x_BTD = x_BTD + self.look_up(self.bigram_embedding, "bigram", bigram_BT)
        x_BTD = x_BTD + self.embed_characters(features_BTP)
        return norm(x_BTD.to(self.dtype))

    def hidden_and_words(self, tokens_BT, layout: Layout, cache: GhostCache | None = None):
        """(last hidden states (B, T, D), the word of each new token)."""
        cos, sin = self.cos[layout.positions_BT], self.sin[layout.positions_BT]
        tokens_BS = tokens_BT if cache is None else cache.tokens_BS
        words = character_features.words_so_far(self.character_table, tokens_BS, layout.prev_index_BS, layout.index_BT)
        embedding_BTD = self.embed(tokens_BT, layout, character_features.word_features(words), tokens_BS)
        value_embeddings = iter(self.value_embeddings)
        x_BTD = embedding_BTD
        for block in self.blocks:
            value_embedding_BTD = None
            if block.attention.value_mix is not None:
                value_embedding_BTD = self.look_up(next(value_embeddings), "value", tokens_BT).to(x_BTD.dtype)
            x_BTD = block(x_BTD, embedding_BTD, value_embedding_BTD, cos, sin, layout.mask_BTS, cache)
        return norm(x_BTD), words

    def copy_distributions(self, hidden_BTD, words: WordsSoFar, tokens_BS, layout: Layout, cache=None):
        """Where the copy heads point. `words`: the word of each new token."""
        written_BS = character_features.letters_written(self.character_table, tokens_BS, layout.prev_index_BS)
        written_BT = written_BS.gather(1, layout.index_BT)
        return self.copy_heads(hidden_BTD, self.ended_words(words, tokens_BS, layout, cache), written_BT, layout, cache)

    def ended_words(self, words: WordsSoFar, tokens_BS, layout: Layout, cache: GhostCache | None) -> EndedWords:
        """The words that the character copy head can point at: those whose characters all have a token."""
        tokens_BTW = self.character_tokens[words.characters_BTW[..., :MAX_WORD_CHARACTERS]]
        has_tokens_BT = (tokens_BTW >= 0).sum(-1) == words.length_BT
        words_BTX = torch.cat([tokens_BTW, (words.length_BT * has_tokens_BT)[..., None]], 2)  # X = W + 1
        words_BSX = values_of_predecessors(words_BTX, layout) if cache is None else cache.append_words(words_BTX)
        has_ended_BS = character_features.starts_word(self.character_table, tokens_BS, layout.prev_index_BS)
        is_text_BS = character_features.is_text(self.character_table, tokens_BS)
        return EndedWords(words_BSX[..., :-1], words_BSX[..., -1] * has_ended_BS, is_text_BS)

    def forward(self, tokens_BT, cache: GhostCache | None = None, segments_BT=None, last_B=None):
        """Log-probabilities of the next token, (B, T, V) in fp32. Arguments as in LanguageModel.__call__."""
        if cache is None:
            layout, tokens_BS = causal_layout(tokens_BT, self.dtype, segments_BT), tokens_BT
        else:
            layout, tokens_BS = cache.append_tokens(tokens_BT, self.dtype), cache.tokens_BS
        h_BTD, words = self.hidden_and_words(tokens_BT, layout, cache)
        copy_distributions = self.copy_distributions(h_BTD, words, tokens_BS, layout, cache)
        if last_B is not None:
            rows_B = torch.arange(len(last_B), device=last_B.device)
            h_BTD, copy_distributions = h_BTD[rows_B, last_B, None], copy_distributions.at(rows_B, last_B)
        h_BTD = self.copy_heads.tell_ends(h_BTD, copy_distributions.ended_BT)
        vocabulary_BTV = torch.softmax(self.head(h_BTD).float(), -1)
        return copy_distributions.mix(vocabulary_BTV, tokens_BS)

    def logprobs(self, tokens_BT, targets, segments_BT=None, layout: Layout | None = None, logit_positions=None):
        """log P(target | tokens so far), in fp32. Arguments as in LanguageModel.logprobs."""
        layout = layout or causal_layout(tokens_BT, self.dtype, segments_BT)
        h_BTD, words = self.hidden_and_words(tokens_BT, layout)
        copy_distributions = self.copy_distributions(h_BTD, words, tokens_BT, layout)
        if logit_positions is None:
            logit_positions = torch.ones_like(tokens_BT).nonzero(as_tuple=True)
        targets_N = targets.flatten()
        h_ND = self.copy_heads.tell_ends(h_BTD[logit_positions], copy_distributions.ended_BT[logit_positions])
        vocabulary_N = token_logprobs(h_ND, self.head.weight, targets_N)
        is_character_V = character_features.is_single_character(self.character_table)
        logprobs_N = copy_distributions.mix_targets(vocabulary_N, tokens_BT, targets_N, logit_positions, is_character_V)
        return logprobs_N.view_as(targets)

    def new_cache(self, rows: int, capacity: int) -> GhostCache:
        c = self.config
        return GhostCache(c.depth, rows, min(capacity, c.context), c.heads, c.head_width, self.dtype, self.device)

    def matrices(self) -> list[nn.Parameter]:
        """Weights of the matmuls, except for the head."""
        return [*(weight for block in self.blocks for weight in block.matrices()), self.copy_heads.qk.weight]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        mixes = (mix for block in self.blocks for mix in (block.residual_mix, block.attention.value_mix))
        heads = self.copy_heads
        copying = [heads.gates.weight, heads.gates.bias, heads.end_of_word]
        return {
            "matrices": self.matrices(),
            "head": [self.head.weight],
            "embeddings": [table.weight for table in self.embedding_tables()],
            "bigram_embedding": [self.bigram_embedding.weight],
            "scalars": [*(mix for mix in mixes if mix is not None), *copying],
        }

    def embedding_tables(self) -> Iterator[Embedding]:
        yield self.embedding
        yield self.character_embedding
        yield from self.value_embeddings

    def stacked_matrices(self) -> dict[nn.Parameter, int]:
        stacks = {block.attention.qkv.weight: Attention.num_matrices for block in self.blocks}
        return stacks | {self.copy_heads.qk.weight: CopyHeads.num_matrices}

    def parameter_counts(self) -> dict[str, int]:
        return {name: sum(p.numel() for p in parameters) for name, parameters in self.parameter_groups().items()}

    def flops_per_token(self, context: int | None = None) -> int:
        """6 for each weight in a matmul, plus causal attention (half of T x T) and copy heads. Lookups cost none."""
        c, counts = self.config, self.parameter_counts()
        matmul_weights = counts["matrices"] + counts["head"] + self.copy_heads.gates.weight.numel()
        per_context_token = 6 * c.depth * c.width + 6 * POINTER_WIDTH
        return 6 * matmul_weights + per_context_token * (context or c.context)

    def exported_tensors(self) -> dict[str, torch.Tensor]:
        return self.state_dict()

    def import_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(tensors)
