"""From logits to tokens: temperature, top-k, top-p, and a draw that does not depend on other sequences.

B rows of logits, V vocabulary, N buckets of K tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanoghost.errors import UserError

BUCKET_SIZE = 256  # a draw first chooses a bucket of this many neighboring tokens, then a token in it
TOP_P_CANDIDATES = 512  # top-p sorts only this many of the likeliest tokens, or all if these do not reach it


@dataclass(frozen=True)
class SamplingParams:
    max_tokens: int = 128
    """Maximum number of tokens to sample; tool results do not count."""
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
    constrain_calls: bool = True
    """Models trained here write only well-formed tool calls. Not in RL, which needs the probabilities as they are."""


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


def distribution(logits_BV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probabilities (B, V) that tokens are drawn from: temperature, then top-k, then top-p."""
    if params.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    if params.temperature != 1:
        logits_BV = logits_BV / params.temperature
    if params.top_k:
        smallest_B1 = logits_BV.topk(min(params.top_k, logits_BV.size(1))).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, float("-inf"))
    probs_BV = torch.softmax(logits_BV, 1)
    if params.top_p < 1:
        ordered, index = probs_BV.topk(min(TOP_P_CANDIDATES, probs_BV.size(1)))
        if (ordered.sum(1) < params.top_p).any():
            ordered, index = probs_BV.sort(1, descending=True)
        in_nucleus = ordered.cumsum(1) - ordered < params.top_p  # including the token that crosses top_p
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index, ordered * in_nucleus)
        probs_BV = probs_BV / probs_BV.sum(1, keepdim=True)
    return probs_BV


def draw(probs_BV: torch.Tensor, uniforms: list[float]) -> tuple[list[int], list[float]]:
    """Draw one token per row: the inverse of the cumulative distribution at the row's number in [0, 1).

    Returns the token ids and their log-probabilities. It draws a bucket of tokens first, and then a token in it, so
    that the cumulative sums over the whole vocabulary, in double precision, are never stored.
    """
    B, V = probs_BV.shape
    num_buckets = math.ceil(V / BUCKET_SIZE)
    padding = num_buckets * BUCKET_SIZE - V
    padded = F.pad(probs_BV, (0, padding)) if padding else probs_BV
    buckets_BNK = padded.view(B, num_buckets, BUCKET_SIZE)
    u_B1 = torch.tensor(uniforms, dtype=torch.double, device=probs_BV.device)[:, None]
    sums_BN = buckets_BNK.sum(2)
    bucket_B1, rest_B1 = invert_cumulative(sums_BN, u_B1 * sums_BN.double().sum(1, keepdim=True))
    inside_BK = buckets_BNK[torch.arange(B, device=probs_BV.device), bucket_B1[:, 0]]
    offset_B1, _ = invert_cumulative(inside_BK, rest_B1)
    ids_B1 = bucket_B1 * BUCKET_SIZE + offset_B1
    return ids_B1[:, 0].tolist(), probs_BV.gather(1, ids_B1)[:, 0].log().tolist()


def invert_cumulative(weights_BX: torch.Tensor, target_B1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index where the cumulative sum passes the target, target minus the sum before it); the weight there is not 0."""
    cumulative_BX = weights_BX.double().cumsum(1)
    last_B1 = (cumulative_BX < cumulative_BX[:, -1:]).sum(1, keepdim=True)  # index of the last weight that is not 0
    index_B1 = torch.searchsorted(cumulative_BX, target_B1, right=True).minimum(last_B1)
    sum_before_B1 = F.pad(cumulative_BX, (1, 0)).gather(1, index_B1)
    return index_B1, (target_B1 - sum_before_B1).clamp_min(0)


def uniform(seed: int, stream: int, index: int) -> float:
    """Number `index` of a stream of random numbers in [0, 1).

    A counter-based generator (splitmix64, Steele et al. 2014): a number does not depend on what was drawn before.
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
    """Token ids and log-probabilities, one for each row, which has its own settings and random number."""
    groups: dict[tuple, list[int]] = {}  # rows with the same settings are drawn together
    for i, row_params in enumerate(params):
        key = (row_params.temperature, row_params.top_k, row_params.top_p)
        groups.setdefault(key, []).append(i)
    ids, logprobs = [0] * len(params), [0.0] * len(params)
    for rows in groups.values():
        group_logits_BV = logits_BV if len(rows) == len(params) else logits_BV[rows]
        group_params = params[rows[0]]
        if group_params.temperature == 0:
            group_ids, group_logprobs = group_logits_BV.argmax(1).tolist(), [0.0] * len(rows)
        else:
            probs_BV = distribution(group_logits_BV, group_params)
            group_ids, group_logprobs = draw(probs_BV, [uniforms[i] for i in rows])
        for i, token_id, logprob in zip(rows, group_ids, group_logprobs):
            ids[i], logprobs[i] = token_id, logprob
    return ids, logprobs
