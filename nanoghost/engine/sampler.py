"""From logits to tokens: temperature, top-k, top-p, and a draw that no other conversation can influence.

B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

BLOCK = 256  # tokens that are first drawn as one
LIKELY = 512  # tokens that top-p sorts first; only if they do not suffice, all


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = 128
    """Most tokens a row may write; what a tool answers does not count."""
    temperature: float = 0.8
    """0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    seed: int = 0
    """Same seed, same place among the samples: same tokens, whatever else is being written."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are cut off."""
    endless: bool = False
    """Go on where the model would end: for measuring."""


def distribution(logits_BV: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Probabilities that tokens are drawn from: temperature, then top-k, then top-p."""
    if s.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    logits_BV = logits_BV / s.temperature if s.temperature != 1 else logits_BV
    if s.top_k:
        least = logits_BV.topk(min(s.top_k, logits_BV.size(1))).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    probs_BV = torch.softmax(logits_BV, 1)
    if s.top_p < 1:
        ordered, index = probs_BV.topk(min(LIKELY, probs_BV.size(1)))
        if (ordered.sum(1) < s.top_p).any():
            ordered, index = probs_BV.sort(1, descending=True)
        kept = ordered.cumsum(1) - ordered < s.top_p  # the token that crosses the border stays
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index, ordered * kept)
        probs_BV = probs_BV / probs_BV.sum(1, keepdim=True)
    return probs_BV


def draw(probs_BV: torch.Tensor, uniforms: list[float]) -> tuple[list[int], list[float]]:
    """One token a row by inverting the cumulative distribution at the row's number, and the log of its probability.

    In two steps, first a block of tokens and then one in it: the sums of a whole vocabulary are never written down.
    """
    B, V = probs_BV.shape
    blocks_BNK = (F.pad(probs_BV, (0, -V % BLOCK)) if V % BLOCK else probs_BV).view(B, -1, BLOCK)
    u_B1 = torch.tensor(uniforms, dtype=torch.double, device=probs_BV.device)[:, None]

    def invert(weights_BX, at_B1):
        """(index where the cumulative sum passes `at`, what is left of `at` there); never an index of weight 0."""
        cumulative = weights_BX.double().cumsum(1)
        last = (cumulative < cumulative[:, -1:]).sum(1, keepdim=True)
        index = torch.searchsorted(cumulative, at_B1, right=True).minimum(last)
        return index, (at_B1 - F.pad(cumulative, (1, 0)).gather(1, index)).clamp_min(0)

    sums_BN = blocks_BNK.sum(2)
    block, rest = invert(sums_BN, u_B1 * sums_BN.double().sum(1, keepdim=True))
    inside_BK = blocks_BNK[torch.arange(B, device=probs_BV.device), block[:, 0]]
    ids = block * BLOCK + invert(inside_BK, rest)[0]
    return ids[:, 0].tolist(), probs_BV.gather(1, ids)[:, 0].log().tolist()


def uniform(seed: int, stream: int, index: int) -> float:
    """The index-th number of a stream, in [0, 1): splitmix64 (Steele et al. 2014), so that it depends on nothing else."""
    z = (
        seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + (index + 1) * 0x8CB92BA72F3D8DD7
    ) & 0xFFFFFFFFFFFFFFFF
    for _ in range(2):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        z ^= z >> 31
    return (z >> 11) / 2**53


def choose(logits_BV: torch.Tensor, samplings: list[Sampling], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """A token and its log-probability for each row, each with its own settings."""
    alike: dict[tuple, list[int]] = {}
    for i, s in enumerate(samplings):
        alike.setdefault((s.temperature, s.top_k, s.top_p), []).append(i)
    ids, logprobs = [0] * len(samplings), [0.0] * len(samplings)
    for rows in alike.values():
        own_BV = logits_BV if len(rows) == len(samplings) else logits_BV[rows]
        if samplings[rows[0]].temperature == 0:
            drawn = own_BV.argmax(1).tolist(), [0.0] * len(rows)
        else:
            drawn = draw(distribution(own_BV, samplings[rows[0]]), [uniforms[i] for i in rows])
        for i, token, logprob in zip(rows, *drawn):
            ids[i], logprobs[i] = token, logprob
    return ids, logprobs
