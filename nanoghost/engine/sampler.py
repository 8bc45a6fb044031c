"""From logits to tokens: temperature, top-k, top-p, and a draw that no other sequence can influence.

B rows of logits, V vocabulary, N buckets of K tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanoghost.errors import UserError

BUCKET = 256  # neighboring tokens that are drawn as one before one of them is drawn
TOP_P_CANDIDATES = 512  # tokens that top-p sorts first; only if they do not reach its probability, it sorts all


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 128
    """Most tokens to sample; tool results do not count."""
    temperature: float = 0.8
    """0 takes the most probable token."""
    top_k: int = 0
    """Sample from the k most probable tokens (0 = all)."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together reach this probability."""
    seed: int = 0
    """Random seed. The same seed and sample number give the same tokens, whatever else the engine computes."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of it."""
    ignore_eos: bool = False
    """Continue after stop tokens (for measurements)."""


def check_sampling(sampling: SamplingParams) -> None:
    """Raises UserError for settings that are out of range."""
    if not sampling.temperature >= 0:
        raise UserError("temperature must be at least 0")
    if sampling.top_k < 0:
        raise UserError("top_k must be at least 0")
    if not 0 < sampling.top_p <= 1:
        raise UserError("top_p must be above 0 and at most 1")
    if sampling.max_tokens < 1:
        raise UserError("max_tokens must be at least 1")
    if isinstance(sampling.stop, str):
        raise UserError("stop must be a list of texts")


def distribution(logits_BV: torch.Tensor, s: SamplingParams) -> torch.Tensor:
    """The probabilities that tokens are drawn from: temperature, then top-k, then top-p."""
    if s.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    logits_BV = logits_BV / s.temperature if s.temperature != 1 else logits_BV
    if s.top_k:
        smallest_B1 = logits_BV.topk(min(s.top_k, logits_BV.size(1))).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    probs_BV = torch.softmax(logits_BV, 1)
    if s.top_p < 1:
        ordered, index = probs_BV.topk(min(TOP_P_CANDIDATES, probs_BV.size(1)))
        if (ordered.sum(1) < s.top_p).any():
            ordered, index = probs_BV.sort(1, descending=True)
        in_nucleus = ordered.cumsum(1) - ordered < s.top_p  # including the token that crosses top_p
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index, ordered * in_nucleus)
        probs_BV = probs_BV / probs_BV.sum(1, keepdim=True)
    return probs_BV


def draw(probs_BV: torch.Tensor, uniforms: list[float]) -> tuple[list[int], list[float]]:
    """Draw one token per row: the inverse of the cumulative distribution at the row's number in [0, 1).

    Returns the token ids and their log-probabilities. In two steps, first a bucket of tokens and then one in it: so the
    cumulative sums of a whole vocabulary, in double precision, are never stored.
    """
    B, V = probs_BV.shape
    padded = F.pad(probs_BV, (0, -V % BUCKET)) if V % BUCKET else probs_BV
    buckets_BNK = padded.view(B, -1, BUCKET)
    u_B1 = torch.tensor(uniforms, dtype=torch.double, device=probs_BV.device)[:, None]
    sums_BN = buckets_BNK.sum(2)
    bucket_B1, rest_B1 = invert_cumulative(sums_BN, u_B1 * sums_BN.double().sum(1, keepdim=True))
    inside_BK = buckets_BNK[torch.arange(B, device=probs_BV.device), bucket_B1[:, 0]]
    offset_B1, _ = invert_cumulative(inside_BK, rest_B1)
    ids_B1 = bucket_B1 * BUCKET + offset_B1
    return ids_B1[:, 0].tolist(), probs_BV.gather(1, ids_B1)[:, 0].log().tolist()


def invert_cumulative(weights_BX: torch.Tensor, target_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index where the cumulative sum passes the target, the rest of the target there); never an index of weight 0."""
    cumulative = weights_BX.double().cumsum(1)
    last = (cumulative < cumulative[:, -1:]).sum(1, keepdim=True)
    index = torch.searchsorted(cumulative, target_B1, right=True).minimum(last)
    return index, (target_B1 - F.pad(cumulative, (1, 0)).gather(1, index)).clamp_min(0)


def uniform(seed: int, stream: int, index: int) -> float:
    """Number `index` of a stream of random numbers in [0, 1).

    A counter-based generator (splitmix64, Steele et al. 2014): a number depends on nothing that was drawn before.
    """
    mask = 0xFFFFFFFFFFFFFFFF
    z = (seed * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03 + (index + 1) * 0x8CB92BA72F3D8DD7) & mask
    for _ in range(2):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        z ^= z >> 31
    return (z >> 11) / 2**53


def sample(
    logits_BV: torch.Tensor, params: list[SamplingParams], uniforms: list[float]
) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities, one a row, each with its own settings and random number."""
    rows_of: dict[tuple, list[int]] = {}  # rows with the same distribution are drawn together
    for i, s in enumerate(params):
        rows_of.setdefault((s.temperature, s.top_k, s.top_p), []).append(i)
    ids, logprobs = [0] * len(params), [0.0] * len(params)
    for rows in rows_of.values():
        some_BV = logits_BV if len(rows) == len(params) else logits_BV[rows]
        settings = params[rows[0]]
        if settings.temperature == 0:
            new_ids, new_logprobs = some_BV.argmax(1).tolist(), [0.0] * len(rows)
        else:
            new_ids, new_logprobs = draw(distribution(some_BV, settings), [uniforms[i] for i in rows])
        for i, token_id, logprob in zip(rows, new_ids, new_logprobs):
            ids[i], logprobs[i] = token_id, logprob
    return ids, logprobs
