"""Policy-gradient losses for attempts with a verified reward: one function, five named variants.

    variant    ratio      clip            sum over tokens                  advantage divided by
    cispo      token      above only      mean per prompt, then mean       std of the batch       MiniMax-M1 2025, ScaleRL 2025
    dr_grpo    token      1 +- 0.2        sum / (attempts x longest)       nothing                Liu et al. 2025
    dapo       token      0.8 .. 1.28     sum / all tokens                 std of the group       Yu et al. 2025
    gspo       sequence   3e-4, 4e-4      mean per attempt, then mean      std of the group       Zheng et al. 2025
    reinforce  none       none            sum / all tokens                 nothing                Williams 1992

Ratios are against the probabilities that the sampler stored when it drew the tokens. With one update for each batch
of attempts they are 1 up to rounding, and all variants push in the same direction; they differ in how much each
token counts.

N attempts, G attempts at each problem, T tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Variant:
    low: float
    """Ratios below 1 - low get no gradient where the advantage is negative (infinite: never)."""
    high: float
    """Ratios above 1 + high are clipped."""
    over: str
    """Denominator: prompts, longest, tokens or attempts."""
    scale: str
    """What advantages are divided by: batch, group or none."""
    sequence_ratio: bool = False
    """One ratio for a whole attempt: the geometric mean over its tokens."""


INFINITE = float("inf")
VARIANTS = {
    "cispo": Variant(INFINITE, 4.0, "prompts", "batch"),
    "dr_grpo": Variant(0.2, 0.2, "longest", "none"),
    "dapo": Variant(0.2, 0.28, "tokens", "group"),
    "gspo": Variant(3e-4, 4e-4, "attempts", "group", sequence_ratio=True),
    "reinforce": Variant(INFINITE, INFINITE, "tokens", "none"),
}


def advantages(rewards_PG: torch.Tensor, variant: str) -> torch.Tensor:
    """Reward minus the mean of the group, (P, G); groups without signal come out as zeros."""
    signal_P = rewards_PG.amax(1) > rewards_PG.amin(1)  # the mean of equal rewards may be off by a rounding
    centred = (rewards_PG - rewards_PG.mean(1, keepdim=True)) * signal_P[:, None]
    scale = VARIANTS[variant].scale
    if scale == "batch":  # over groups that carry signal: dropped ones must not shrink the deviation
        informative = centred[signal_P]
        return centred / (informative.square().mean().sqrt() + 1e-6) if len(informative) else centred
    if scale == "group":
        return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6)
    return centred


def denominators(mask_NT: torch.Tensor, prompts_N: torch.Tensor, variant: str, longest: int) -> torch.Tensor:
    """What each token's loss is divided by, (N, T), from the whole batch: micro-batches must not change it."""
    lengths_N = mask_NT.sum(1)
    over = VARIANTS[variant].over
    if over == "tokens":
        per_attempt_N = lengths_N.sum().expand(len(mask_NT))
    elif over == "longest":
        per_attempt_N = torch.full((len(mask_NT),), longest * len(mask_NT))
    elif over == "attempts":
        per_attempt_N = lengths_N * len(mask_NT)
    else:
        tokens_of_prompt = torch.zeros(int(prompts_N.max()) + 1).index_add_(0, prompts_N, lengths_N.float())
        per_attempt_N = tokens_of_prompt[prompts_N] * len(prompts_N.unique())
    return per_attempt_N.float()[:, None].expand(mask_NT.shape)


def policy_loss(logp_NT, old_logp_NT, advantages_N, mask_NT, denominators_NT, variant: str) -> torch.Tensor:
    """Scalar whose gradient ascends the expected reward. Tokens outside the mask (prompt, tools) get no gradient.

    `logp_NT` carries the gradient; `old_logp_NT` is the sampler's. Summing over micro-batches gives the whole batch.
    """
    v = VARIANTS[variant]
    difference = (logp_NT - old_logp_NT) * mask_NT
    a_NT = advantages_N[:, None]
    if v.over == "prompts":  # CISPO: the clipped ratio is only a weight, so every token keeps a gradient
        weight = difference.exp().clamp(max=1 + v.high).detach()
        gain = weight * a_NT * logp_NT
    elif v.high == INFINITE:
        gain = a_NT * logp_NT
    else:
        if v.sequence_ratio:
            difference = difference.sum(1, keepdim=True) / mask_NT.sum(1, keepdim=True).clamp(min=1)
        ratio = difference.exp()
        gain = torch.minimum(ratio * a_NT, ratio.clamp(1 - v.low, 1 + v.high) * a_NT)
    return -(gain * mask_NT / denominators_NT.clamp(min=1)).sum()
