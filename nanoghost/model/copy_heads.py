"""The two copy heads of a ghost: besides the vocabulary's softmax, two more ways to predict the next token.

The copy head (pointer networks, Vinyals et al. 2015; pointer sentinel mixture, Merity et al. 2016; neural cache, Grave
et al. 2017) points at a token of the context and predicts the same token. The key of a token is made from the state
before it, so it matches when what comes before now is like what came before then. A name that no training text contains
is learned at its first mention.

The character copy head points at a word of the context and reads its next character, from the front or from the back:
after "o-w", it is the third character of the word. So the model can spell words that it never saw spelled, forward and
backward, although BPE hides their characters.

A learned gate mixes the three distributions. Without both heads, training takes 1.6 times as long to the same bits per
byte (half a minute on two cores, docs/results/ledger.md).

B batch, T new tokens, S tokens read so far, D width, V vocabulary, K width of a pointer, W characters of a word,
N predicted tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanoghost.model.character_features import MAX_WORD_CHARACTERS
from nanoghost.model.kv_cache import KVCache
from nanoghost.model.layers import Linear, init_uniform, norm
from nanoghost.model.layout import Layout

POINTER_WIDTH = 64
COPY, CHARACTER = 0, 1  # the two heads
FRONT, BACK = 0, 1  # where the character copy head begins to read
MIN_PROBABILITY = 1e-30  # keeps logarithms finite
EXCLUDED = -1e4  # added to the scores of tokens that cannot be pointed at; finite, because there may be no other


@dataclass
class EndedWords:
    """For each token that begins another word, the word before it, which is complete; for other tokens, no word."""

    char_tokens_BSW: torch.Tensor
    """For each character the token that consists of it alone."""
    length_BS: torch.Tensor
    """Number of characters; 0 for no word."""
    is_text_BS: torch.Tensor
    """Whether the token itself is text, not a special token: only text is copied."""

    def next_characters(self, row_N, written_N):
        """Tokens (N, S, 2) of the next character of each word from the front and from the back, -1 if there is none.

        row_N: which row's words; written_N: how many characters have been written.
        """
        _, S, W = self.char_tokens_BSW.shape
        length_NS, written_N1 = self.length_BS[row_N], written_N[:, None]
        next_NS2 = torch.stack([written_N1.expand(-1, S), length_NS - 1 - written_N1], 2).clamp(0, W - 1)
        word_NS1 = (row_N[:, None] * S + torch.arange(S, device=row_N.device))[..., None]
        tokens_NS2 = self.char_tokens_BSW.flatten()[word_NS1 * W + next_NS2]
        return tokens_NS2.masked_fill((written_N1 >= length_NS)[..., None], -1)


@dataclass
class CopyDistributions:
    """Where the copy heads of each position point, and how much of the prediction is theirs."""

    gates_BT3: torch.Tensor
    """Probabilities (fp32) that the next token comes from the vocabulary, the copy head, the character copy head.

    What the character copy head gives to words that are too short has been moved to the vocabulary.
    """
    copy_BTS: torch.Tensor
    """Copy head: probabilities of the tokens read so far."""
    word_BTS: torch.Tensor
    """Character copy head: probabilities of the words."""
    direction_BT2: torch.Tensor
    """Character copy head: probabilities (fp32) of reading them from the front and from the back."""
    words: EndedWords
    written_BT: torch.Tensor
    """How many letters have been written since the last blank or mark."""
    ended_BT: torch.Tensor
    """Probability (fp32) of the words that have no more characters than have been written."""

    def at(self, rows_B, positions_B) -> "CopyDistributions":
        """One position of each row: T becomes 1."""
        return CopyDistributions(
            self.gates_BT3[rows_B, positions_B, None],
            self.copy_BTS[rows_B, positions_B, None],
            self.word_BTS[rows_B, positions_B, None],
            self.direction_BT2[rows_B, positions_B, None],
            self.words,
            self.written_BT[rows_B, positions_B, None],
            self.ended_BT[rows_B, positions_B, None],
        )

    def mix(self, vocabulary_BTV, tokens_BS):
        """Log-probabilities (B, T, V) of the mixture. `vocabulary_BTV`: probabilities by the output layer, in fp32."""
        B, T, _ = vocabulary_BTV.shape
        vocabulary_gate, copy_gate, character_gate = self.gates_BT3.split(1, -1)
        probs_BTV = vocabulary_BTV * vocabulary_gate
        probs_BTV = probs_BTV.scatter_add(2, tokens_BS[:, None].expand_as(self.copy_BTS), self.copy_BTS * copy_gate)
        # P(next = character) = sum over words s and directions d of P(s) P(d) [the next character of (s, d) is it]
        row_N = torch.arange(B, device=tokens_BS.device).repeat_interleave(T)
        next_BTX = self.words.next_characters(row_N, self.written_BT.flatten()).view(B, T, -1)  # X = S * 2
        char_BTS2 = (self.word_BTS * character_gate)[..., None] * self.direction_BT2[:, :, None]
        char_BTX = char_BTS2.flatten(2) * (next_BTX >= 0)
        probs_BTV = probs_BTV.scatter_add(2, next_BTX.clamp(0), char_BTX)
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
        next_NS2 = self.words.next_characters(row, self.written_BT[row, position])
        is_target_NS2 = (next_NS2 == targets_N[single, None, None]).to(self.word_BTS.dtype)
        target_N2 = torch.bmm(self.word_BTS[row, position][:, None], is_target_NS2)[:, 0]
        spelled_N = target_N2.mul(self.direction_BT2[row, position]).sum(-1) * character_gate[single]
        pointed_N = copied_N.index_add(0, single, spelled_N)
        return torch.logaddexp(vocabulary_N + vocabulary_gate.log(), pointed_N.clamp_min(MIN_PROBABILITY).log())


class CopyHeads(nn.Module):
    """Queries, keys and gates of both copy heads."""

    num_matrices = 4
    """`qk` holds two queries and two keys, stacked."""

    def __init__(self, width: int):
        super().__init__()
        self.qk = Linear(width, self.num_matrices * POINTER_WIDTH)
        self.gates = Linear(width, 2 + 2, bias=True)  # logits: copy, character copy, from the front, from the back
        self.end_of_word = nn.Parameter(torch.zeros(width))

    def init_weights(self) -> None:
        """Queries equal keys, so at first what is similar matches; almost everything comes from the vocabulary."""
        queries, keys = self.qk.weight.data.chunk(2)
        init_uniform(queries, 1 / queries.size(1))
        keys.copy_(queries)
        nn.init.zeros_(self.end_of_word)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        self.gates.bias.data[:2] = torch.tensor([-3.0, -5.0])

    def forward(self, hidden_BTD, words: EndedWords, written_BT, layout: Layout, cache: "GhostCache | None" = None):
        """CopyDistributions. `words` of all tokens read so far; `written_BT`: as there."""
        B, T, _ = hidden_BTD.shape
        qk = norm(self.qk(hidden_BTD).view(B, T, self.num_matrices, POINTER_WIDTH))
        q_BT2K, k_BT2K = qk[:, :, :2], qk[:, :, 2:]
        k_BS2K = keys_of_predecessors(k_BT2K, layout) if cache is None else cache.append_copy_keys(k_BT2K)
        mask_BTS = layout.mask_BTS.expand(B, -1, -1)
        # A model that learns to end its answers by copying the end of the question sometimes copies the word before it
        copy_mask_BTS = mask_BTS + (EXCLUDED * ~words.is_text_BS).to(mask_BTS.dtype)[:, None]
        copy_BTS = pointer_attention(q_BT2K[:, :, COPY], k_BS2K[:, :, COPY], copy_mask_BTS, POINTER_WIDTH**-0.5)
        word_mask_BTS = mask_BTS + (EXCLUDED * (words.length_BS == 0)).to(mask_BTS.dtype)[:, None]
        word_BTS = pointer_attention(
            q_BT2K[:, :, CHARACTER], k_BS2K[:, :, CHARACTER], word_mask_BTS, 2 * POINTER_WIDTH**-0.5
        )
        # Explicit fp32: FSDP gathers the parameters in the compute dtype
        logits = F.linear(hidden_BTD.float(), self.gates.weight.float(), self.gates.bias.float())
        direction_BT2 = torch.softmax(logits[..., 2:], -1)
        is_long_enough_BTS = written_BT[..., None] < words.length_BS[:, None]
        usable_BT = (word_BTS * is_long_enough_BTS).sum(-1, dtype=torch.float32).clamp(max=1)
        vocabulary_BT, copy_BT, char_BT = torch.softmax(F.pad(logits[..., :2], (1, 0)), -1).unbind(-1)
        gates_BT3 = torch.stack([vocabulary_BT + char_BT * (1 - usable_BT), copy_BT, char_BT], -1)
        return CopyDistributions(gates_BT3, copy_BTS, word_BTS, direction_BT2, words, written_BT, 1 - usable_BT)

    def tell_ends(self, hidden, ended):
        """Hidden states (..., D) for the output layer, which cannot see otherwise that a word is written to its end.

        ended: (...), of CopyDistributions.
        """
        return hidden + (ended[..., None] * self.end_of_word.float()).to(hidden.dtype)


def keys_of_predecessors(k_BT2K, layout: Layout):
    """For each token the keys made from the state before it, the one that predicted it; 0 if there is none."""
    return values_of_predecessors(k_BT2K.flatten(2), layout).unflatten(2, k_BT2K.shape[2:])


def values_of_predecessors(x_BTX, layout: Layout):
    """For each token the X values of its predecessor; 0 if it has none."""
    prev_index_BTX = layout.prev_index_BS.clamp(0)[..., None].expand_as(x_BTX)
    return x_BTX.gather(1, prev_index_BTX) * (layout.prev_index_BS >= 0)[..., None]


def pointer_attention(q_BTK, k_BSK, mask_BTS, scale: float):
    """Attention probabilities (B, T, S)."""
    return torch.softmax(torch.baddbmm(mask_BTS, q_BTK * scale, k_BSK.mT), -1)


class GhostCache(KVCache):
    """A KVCache that also holds what the copy heads need: keys, and the character tokens of each word.

    Both are of a token and serve at the next one, so they are stored at the index after it.
    """

    def __init__(self, layers: int, rows: int, capacity: int, heads: int, head_width: int, dtype, device="cpu"):
        super().__init__(layers, rows, capacity, heads, head_width, dtype, device)
        self.copy_keys = torch.zeros(rows, capacity + 2, 2, POINTER_WIDTH, dtype=dtype, device=device)
        self.words = torch.zeros(rows, capacity + 2, MAX_WORD_CHARACTERS + 1, dtype=torch.long, device=device)

    def append_copy_keys(self, k_BT2K):
        """Store the keys of the new tokens; returns those of the predecessors of all S tokens, (B, S, 2, K)."""
        rows_B1, index_BT = self.write_index
        self.copy_keys[rows_B1, index_BT + 1] = k_BT2K
        return self.copy_keys[self.rows, : self.num_cached]

    def append_words(self, words_BTX):
        """Store the words of the new tokens; returns those of the predecessors of all S tokens, (B, S, X)."""
        rows_B1, index_BT = self.write_index
        self.words[rows_B1, index_BT + 1] = words_BTX
        return self.words[self.rows, : self.num_cached]

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        super().copy_rows(sources, targets, length)
        if sources:
            for stored in (self.copy_keys, self.words):
                stored[targets, : length + 1] = stored[sources, : length + 1]
