"""Policy-gradient losses for rollouts with a verified reward: one function, five named variants.

    variant    ratio      clip          sum over tokens                advantage divided by
    cispo      token      above only    mean per prompt, then mean     std of the batch      MiniMax-M1, ScaleRL 2025
    dr_grpo    token      1 +- 0.2      sum / (rollouts x max tokens)  nothing               Liu et al. 2025
    dapo       token      0.8 .. 1.28   sum / all tokens               std of the group      Yu et al. 2025
    gspo       sequence   3e-4, 4e-4    mean per rollout, then mean    std of the group      Zheng et al. 2025
    reinforce  none       none          sum / all tokens               nothing               Williams 1992

Ratios are relative to the probabilities that the sampler stored when it drew the tokens. With one update per batch of
rollouts they are 1 up to rounding, and all variants push in the same direction; they differ in the weight of each
token.

N rollouts, P prompts, G rollouts of each prompt (a group), T tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch

NO_CLIP = float("inf")  # as clip_low or clip_high


@dataclass(frozen=True)
class Variant:
    objective: Literal["weighted", "clipped", "plain"]
    """weighted: the clipped ratio is a constant weight of log P (CISPO). clipped: the minimum of the clipped and the
    unclipped ratio times the advantage (PPO). plain: log P times the advantage, without a ratio (REINFORCE)."""
    normalize_by: Literal["prompts", "rollouts", "tokens", "max_tokens"]
    """What the sum over tokens is divided by; see `denominators`."""
    advantage_std: Literal["batch", "group", "none"]
    """Standard deviation that advantages are divided by."""
    clip_low: float = NO_CLIP
    """Ratios below 1 - clip_low get no gradient if the advantage is negative."""
    clip_high: float = NO_CLIP
    """Ratios above 1 + clip_high are clipped."""
    sequence_ratio: bool = False
    """One ratio for a whole rollout: the geometric mean over its tokens (GSPO)."""


VARIANTS = {
    "cispo": Variant("weighted", "prompts", "batch", clip_high=4.0),
    "dr_grpo": Variant("clipped", "max_tokens", "none", clip_low=0.2, clip_high=0.2),
    "dapo": Variant("clipped", "tokens", "group", clip_low=0.2, clip_high=0.28),
    "gspo": Variant("clipped", "rollouts", "group", clip_low=3e-4, clip_high=4e-4, sequence_ratio=True),
    "reinforce": Variant("plain", "tokens", "none"),
}


def advantages(rewards_PG: torch.Tensor, variant: str) -> torch.Tensor:
    """Reward minus the mean of the group, (P, G); exactly 0 in groups whose rewards are all equal."""
    # Not a comparison with the mean: the mean of equal rewards may differ from them by a rounding.
    has_signal_P = rewards_PG.amax(1) > rewards_PG.amin(1)
    centered_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) * has_signal_P[:, None]
    advantage_std = VARIANTS[variant].advantage_std
    if advantage_std == "batch":  # over groups with a signal: the others must not shrink the deviation
        with_signal = centered_PG[has_signal_P]
        if not len(with_signal):
            return centered_PG
        return centered_PG / (with_signal.square().mean().sqrt() + 1e-6)
    if advantage_std == "group":
        return centered_PG / (centered_PG.square().mean(1, keepdim=True).sqrt() + 1e-6)
    return centered_PG


def denominators(mask_NT: torch.Tensor, prompts_N: torch.Tensor, variant: str, max_tokens: int) -> torch.Tensor:
    """What the loss of each rollout's tokens is divided by, (N,). Computed from the whole batch, so that the size of
    the micro-batches does not change the loss.

    `prompts_N`: index of the prompt of each rollout.
    """
    N = len(mask_NT)
    lengths_N = mask_NT.sum(1)
    normalize_by = VARIANTS[variant].normalize_by
    if normalize_by == "tokens":
        denominators_N = lengths_N.sum().expand(N)
    elif normalize_by == "max_tokens":
        denominators_N = torch.full((N,), max_tokens * N)
    elif normalize_by == "rollouts":
        denominators_N = lengths_N * N
    else:
        tokens_P = torch.zeros(int(prompts_N.max()) + 1).index_add_(0, prompts_N, lengths_N.float())
        denominators_N = tokens_P[prompts_N] * len(prompts_N.unique())
    return denominators_N.float()


def policy_loss(logp_NT, old_logp_NT, advantages_N, mask_NT, denominators_N, variant: str) -> torch.Tensor:
    """The loss, a scalar: minimizing it raises the expected reward. Tokens outside the mask (prompt, tool results)
    get no gradient.

    `logp_NT` carries the gradient; `old_logp_NT` is from the sampler. The sum over micro-batches is the loss of the
    batch.
    """
    v = VARIANTS[variant]
    log_ratio_NT = (logp_NT - old_logp_NT) * mask_NT
    advantages_N1 = advantages_N[:, None]
    if v.objective == "weighted":
        weight_NT = log_ratio_NT.exp().clamp(max=1 + v.clip_high).detach()  # constant: every token keeps a gradient
        gain_NT = weight_NT * advantages_N1 * logp_NT
    elif v.objective == "plain":
        gain_NT = advantages_N1 * logp_NT
    else:
        if v.sequence_ratio:
            log_ratio_NT = log_ratio_NT.sum(1, keepdim=True) / mask_NT.sum(1, keepdim=True).clamp(min=1)
        ratio_NT = log_ratio_NT.exp()
        clipped_NT = ratio_NT.clamp(1 - v.clip_low, 1 + v.clip_high)
        gain_NT = torch.minimum(ratio_NT * advantages_N1, clipped_NT * advantages_N1)
    return -(gain_NT * mask_NT / denominators_N.clamp(min=1)[:, None]).sum()
