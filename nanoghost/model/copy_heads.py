"""The two copy heads of a ghost: besides the vocabulary's softmax, two more ways to predict the next token.

The copy head (pointer networks, Vinyals et al. 2015; pointer sentinel mixture, Merity et al. 2016; neural cache, Grave
et al. 2017) points at a token of the context and predicts the same token. The key of a token is made from the state
before it, so it matches when what comes before now is like what came before then. A name that no training text contains
is learned at its first mention.

The character copy head points at a word of the context and at a position in it, and predicts the token of that one
character. So the model can spell words that it never saw spelled, although BPE hides their characters.

A learned gate mixes the three distributions. Without both heads, training takes 1.6 times as long to the same bits per
byte (half a minute on two cores, docs/results/ledger.md).

B batch, T new tokens, S tokens read so far, D width, V vocabulary, W width of a pointer, P character positions,
N predicted tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model.character_features import NUM_POSITIONS
from nanoghost.model.kv_cache import KVCache
from nanoghost.model.layers import Linear, init_uniform, norm
from nanoghost.model.layout import Layout

POINTER_WIDTH = 64
COPY, CHARACTER = 0, 1  # the two heads
MIN_PROBABILITY = 1e-30  # keeps logarithms finite


@dataclass
class CopyDistributions:
    """Where the copy heads of each position point, and how much of the prediction is theirs."""

    gates_BT3: torch.Tensor
    """Probabilities (fp32) that the next token comes from the vocabulary, the copy head, the character copy head.

    What the character copy head gives to positions without a character has been moved to the vocabulary.
    """
    copy_BTS: torch.Tensor
    """Copy head: probabilities of the tokens read so far."""
    word_BTS: torch.Tensor
    """Character copy head: probabilities of the words, each represented by its tokens."""
    position_BTP: torch.Tensor
    """Character copy head: probabilities of the positions in the word."""
    char_tokens_BSP: torch.Tensor
    """The token of the character at each position of each word; -1 if there is none."""

    def at(self, rows_B, positions_B) -> "CopyDistributions":
        """One position of each row: T becomes 1."""
        return CopyDistributions(
            self.gates_BT3[rows_B, positions_B, None],
            self.copy_BTS[rows_B, positions_B, None],
            self.word_BTS[rows_B, positions_B, None],
            self.position_BTP[rows_B, positions_B, None],
            self.char_tokens_BSP,
        )

    def mix(self, vocabulary_BTV, tokens_BS):
        """Log-probabilities (B, T, V) of the mixture. `vocabulary_BTV`: probabilities by the output layer, in fp32."""
        vocabulary_gate, copy_gate, character_gate = self.gates_BT3.split(1, -1)
        probs_BTV = vocabulary_BTV * vocabulary_gate
        probs_BTV = probs_BTV.scatter_add(2, tokens_BS[:, None].expand_as(self.copy_BTS), self.copy_BTS * copy_gate)
        # P(next = character) = sum over words s and positions p of P(s) P(p) [the character at (s, p) is it]
        has_char_B1SP = (self.char_tokens_BSP >= 0)[:, None]
        char_BTSP = (self.word_BTS * character_gate)[..., None] * self.position_BTP[:, :, None] * has_char_B1SP
        T = char_BTSP.size(1)
        char_tokens_BTX = self.char_tokens_BSP.clamp(0).flatten(1)[:, None].expand(-1, T, -1)  # X = S * P
        probs_BTV = probs_BTV.scatter_add(2, char_tokens_BTX, char_BTSP.flatten(2))
        return probs_BTV.clamp_min(MIN_PROBABILITY).log()

    def mix_targets(self, vocabulary_N, tokens_BT, targets_N, logit_positions, is_character_V):
        """log P(target) of the mixture, (N,), computed for the targets alone.

        vocabulary_N: log P(target) by the output layer; logit_positions: pair of (N,) indices (row, position);
        is_character_V: which tokens the character copy head can predict.
        """
        vocabulary_gate, copy_gate, character_gate = self.gates_BT3[logit_positions].unbind(-1)
        is_target_NS = tokens_BT[logit_positions[0]] == targets_N[:, None]
        copied_N = (self.copy_BTS[logit_positions] * is_target_NS).sum(-1, dtype=torch.float32) * copy_gate
        # Indices of the targets that are single characters; the character copy head gives the others nothing
        single = is_character_V[targets_N].nonzero()[:, 0]
        row, position = logit_positions[0][single], logit_positions[1][single]
        is_target_NSP = (self.char_tokens_BSP[row] == targets_N[single, None, None]).to(self.word_BTS.dtype)
        target_NP = torch.bmm(self.word_BTS[row, position][:, None], is_target_NSP)[:, 0]
        spelled_N = target_NP.mul(self.position_BTP[row, position]).sum(-1) * character_gate[single]
        pointed_N = copied_N.index_add(0, single, spelled_N)
        return torch.logaddexp(vocabulary_N + vocabulary_gate.log(), pointed_N.clamp_min(MIN_PROBABILITY).log())


class CopyHeads(nn.Module):
    """Queries, keys and gates of both copy heads."""

    num_matrices = 4
    """`qk` holds two queries and two keys, stacked."""

    def __init__(self, width: int):
        super().__init__()
        self.qk = Linear(width, self.num_matrices * POINTER_WIDTH)
        self.gates = Linear(
            width, 2 + NUM_POSITIONS, bias=True
        )  # logits: copy, character copy, each character position

    def init_weights(self) -> None:
        """Queries equal keys, so at first what is similar matches; almost everything comes from the vocabulary."""
        queries, keys = self.qk.weight.data.chunk(2)
        init_uniform(queries, 1 / queries.size(1))
        keys.copy_(queries)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        self.gates.bias.data[:2] = torch.tensor([-3.0, -5.0])

    def forward(self, hidden_BTD, char_tokens_BTP, layout: Layout, cache: "GhostCache | None" = None):
        """CopyDistributions. `char_tokens_BTP`: the token of each character of the word of each new token; -1: none."""
        B, T, _ = hidden_BTD.shape
        qk = norm(self.qk(hidden_BTD).view(B, T, self.num_matrices, POINTER_WIDTH))
        q_BT2W, k_BT2W = qk[:, :, :2], qk[:, :, 2:]
        if cache is None:
            copy_keys_BTW = keys_of_predecessors(k_BT2W[:, :, COPY], layout)
            k_BS2W = torch.stack([copy_keys_BTW, k_BT2W[:, :, CHARACTER]], 2)
            char_tokens_BSP = char_tokens_BTP
        else:
            k_BS2W, char_tokens_BSP = cache.append_copy_keys(k_BT2W, char_tokens_BTP)
        mask_BTS = layout.mask_BTS.expand(B, -1, -1)
        copy_BTS = pointer_attention(q_BT2W[:, :, COPY], k_BS2W[:, :, COPY], mask_BTS, POINTER_WIDTH**-0.5)
        word_BTS = pointer_attention(
            q_BT2W[:, :, CHARACTER], k_BS2W[:, :, CHARACTER], mask_BTS, 2 * POINTER_WIDTH**-0.5
        )
        # Explicit fp32: FSDP gathers the parameters in the compute dtype
        logits = F.linear(hidden_BTD.float(), self.gates.weight.float(), self.gates.bias.float())
        position_BTP = torch.softmax(logits[..., 2:], -1)
        has_char_BSP = (char_tokens_BSP >= 0).to(word_BTS.dtype)
        usable_BT = torch.bmm(word_BTS, has_char_BSP).mul(position_BTP).sum(-1).clamp(max=1)
        vocabulary_BT, copy_BT, char_BT = torch.softmax(F.pad(logits[..., :2], (1, 0)), -1).unbind(-1)
        gates_BT3 = torch.stack([vocabulary_BT + char_BT * (1 - usable_BT), copy_BT, char_BT], -1)
        return CopyDistributions(gates_BT3, copy_BTS, word_BTS, position_BTP, char_tokens_BSP)


def keys_of_predecessors(k_BTW, layout: Layout):
    """For each token the key made from the state before it, the one that predicted it; 0 if there is none."""
    prev_index_BTW = layout.prev_index_BS.clamp(0)[..., None].expand_as(k_BTW)
    return k_BTW.gather(1, prev_index_BTW) * (layout.prev_index_BS >= 0)[..., None]


def pointer_attention(q_BTW, k_BSW, mask_BTS, scale: float):
    """Attention probabilities (B, T, S)."""
    return torch.softmax(torch.baddbmm(mask_BTS, q_BTW * scale, k_BSW.mT), -1)


class GhostCache(KVCache):
    """A KVCache that also holds what the copy heads compare with: keys, and the character tokens of each word."""

    def __init__(self, layers: int, rows: int, capacity: int, heads: int, head_width: int, dtype, device="cpu"):
        super().__init__(layers, rows, capacity, heads, head_width, dtype, device)
        # A key of the copy head belongs to the next token, so it is stored at the index after it
        self.copy_keys = torch.zeros(rows, capacity + 2, 2, POINTER_WIDTH, dtype=dtype, device=device)
        self.char_tokens = torch.full((rows, capacity + 1, NUM_POSITIONS), -1, device=device)

    def append_copy_keys(self, k_BT2W, char_tokens_BTP):
        """Store what the copy heads need of the new tokens; returns it for all S tokens, (B, S, 2, W) and (B, S, P)."""
        rows_B1, index_BT = self.write_index
        self.copy_keys[rows_B1, index_BT + 1, COPY] = k_BT2W[:, :, COPY]
        self.copy_keys[rows_B1, index_BT, CHARACTER] = k_BT2W[:, :, CHARACTER]
        self.char_tokens[self.write_index] = char_tokens_BTP
        return self.copy_keys[self.rows, : self.num_cached], self.char_tokens[self.rows, : self.num_cached]

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        super().copy_rows(sources, targets, length)
        if sources:
            self.copy_keys[targets, : length + 1] = self.copy_keys[sources, : length + 1]
            self.char_tokens[targets, :length] = self.char_tokens[sources, :length]
