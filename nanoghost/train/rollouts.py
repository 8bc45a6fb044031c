"""The parts of an RL step: sample rollouts, score them, compute advantages, backpropagate the policy gradient.

`settings` is the `RlSettings` of rl.py. N rollouts over all processes, G rollouts of each problem (a group), T tokens.
"""

import random
from dataclasses import dataclass, field

import torch

from nanoghost import distributed, hardware
from nanoghost.engine.sequence import Sequence
from nanoghost.engine.sampler import SamplingParams
from nanoghost.evals.task_accuracy import generate_replies
from nanoghost.model.layout import shared_prompt_rows
from nanoghost.tasks.base import Problem, Task
from nanoghost.train.policy_loss import advantages, denominators, policy_loss


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of one step. Figures are of all processes, in the order of their ranks."""

    sequences: list[Sequence]
    """The rollouts of this process."""
    tasks: list[str]
    """Name of the task of each rollout."""
    rewards: list[float]
    lengths: list[int]
    """Number of sampled tokens of each rollout."""
    logprobs: list[float]
    """Log-probability of each whole rollout under the sampler."""


def problems_of_step(tasks: dict[str, Task], settings, step: int, rank: int, world_size: int) -> list[Problem]:
    """This process's problems. The problems of a step are the same for any number of processes."""
    rng = random.Random(f"{settings.seed}-{step}")
    names = list(tasks)
    problems = [tasks[names[i % len(names)]].problem(rng, "train") for i in range(settings.problems)]
    return problems[rank::world_size]


def rollout(model, tokenizer, tasks: dict[str, Task], settings, step: int) -> Rollouts:
    """Sample `settings.rollouts` replies to each problem of a step with the engine, and score them."""
    rank, world_size = distributed.rank_and_world_size()
    problems = problems_of_step(tasks, settings, step, rank, world_size)
    sampling = SamplingParams(max_tokens=settings.max_tokens, temperature=1.0, seed=settings.seed * 1_000_003 + step)
    sequences = generate_replies(model, tokenizer, problems, sampling, settings.rollouts, rank, world_size)
    local = []
    for i, sequence in enumerate(sequences):
        problem = problems[i // settings.rollouts]
        reward = score(tasks[problem.task], problem, sequence)
        local.append((problem.task, reward, sum(sequence.sampled_mask), sum(sequence.logprobs)))
    of_all = [figures for of_rank in distributed.all_gather_object(local) for figures in of_rank]
    names, rewards, lengths, logprobs = zip(*of_all)
    return Rollouts(sequences, list(names), list(rewards), list(lengths), list(logprobs))


def score(task: Task, problem: Problem, sequence: Sequence) -> float:
    """Reward of a rollout. One that reached the token limit gets 0, so that the model also learns to stop."""
    return task.score(problem, sequence.messages) if sequence.finish_reason == "stop" else 0.0


def compute_advantages(rollouts: Rollouts, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages_N, denominators_N) of this process's rollouts, computed from the rollouts of all processes."""
    rewards_N = torch.tensor(rollouts.rewards, dtype=torch.float32)
    lengths_N = torch.tensor(rollouts.lengths)
    advantages_N = advantages(rewards_N.view(-1, settings.rollouts), settings.variant).flatten()
    denominators_N = torch.ones_like(advantages_N)
    informative = advantages_N.nonzero()[:, 0]
    if len(informative):
        mask_NT = torch.arange(int(lengths_N.max())) < lengths_N[informative, None]
        prompts_N = informative // settings.rollouts
        denominators_N[informative] = denominators(mask_NT, prompts_N, settings.variant, settings.max_tokens)
    rank, _ = distributed.rank_and_world_size()
    local = slice(rank * len(rollouts.sequences), (rank + 1) * len(rollouts.sequences))
    return advantages_N[local], denominators_N[local]


@dataclass
class PolicyGradient:
    """What `policy_gradient` reports; the gradient itself is in .grad."""

    loss: float = 0.0
    tokens: int = 0
    """Number of tokens that went through the model."""
    figures: dict[str, float] = field(default_factory=dict)


def policy_gradient(
    model, sequences: list[Sequence], advantages_N, denominators_N, settings, micro_batch: int = 16
) -> PolicyGradient:
    """Backpropagate the policy loss of this process's rollouts with a nonzero advantage.

    A prompt goes through the model once for all its rollouts, and identical rollouts count as one with the sum of their
    advantages: several times faster than one row per rollout.
    """
    # The loss is a sum over all processes, and the optimizer averages the gradients over them.
    _, world_size = distributed.rank_and_world_size()
    advantages_N = advantages_N * world_size
    indices_of: dict[tuple, dict[tuple, list[int]]] = {}  # prompt -> token ids -> indices of the identical rollouts
    for n in advantages_N.nonzero()[:, 0].tolist():
        of_prompt = indices_of.setdefault(tuple(sequences[n].prompt_ids), {})
        of_prompt.setdefault(tuple(sequences[n].completion_ids), []).append(n)
    if not indices_of:
        return PolicyGradient()
    by_length = sorted(indices_of, key=lambda prompt: len(prompt) + sum(map(len, indices_of[prompt])))  # less padding
    result, ratios = PolicyGradient(), []
    for start in range(0, len(by_length), micro_batch):
        prompts = by_length[start : start + micro_batch]
        identical = [indices for prompt in prompts for indices in indices_of[prompt].values()]
        unique = [sequences[indices[0]] for indices in identical]
        logp_NT = rollout_logprobs(model, prompts, [list(indices_of[prompt]) for prompt in prompts])
        old_logp_NT = padded([sequence.logprobs for sequence in unique])
        mask_NT = padded([sequence.sampled_mask for sequence in unique])
        summed_advantages_N = torch.stack([advantages_N[indices].sum() for indices in identical])
        divide_by_N = denominators_N[[indices[0] for indices in identical]]
        constants = (old_logp_NT, summed_advantages_N, mask_NT, divide_by_N)
        loss = policy_loss(logp_NT, *(t.to(hardware.device()) for t in constants), settings.variant)
        loss.backward()
        result.loss += loss.item()
        ratios.append((logp_NT.detach().cpu() - old_logp_NT)[mask_NT > 0].exp())
    ratio = torch.cat(ratios)
    result.figures = {
        "ratio_mean": ratio.mean().item(),
        "ratio_max": ratio.max().item(),
        "sampler_kl": (ratio - ratio.log() - 1).mean().item(),  # estimate of the KL divergence of trainer and sampler
    }
    informative = advantages_N.nonzero()[:, 0].tolist()
    result.tokens = sum(len(sequences[n].completion_ids) for n in informative) + sum(map(len, indices_of))
    return result


def rollout_logprobs(model, prompts, rollouts: list[list[list[int]]]) -> torch.Tensor:
    """log P of every token of every rollout, (N, T), 0 after its end. `rollouts` are token ids, grouped by prompt."""
    device = hardware.device()
    tokens, layout, logit_positions = shared_prompt_rows([list(p) for p in prompts], rollouts, model.dtype, device)
    flat = [ids for group in rollouts for ids in group]
    targets = torch.tensor([token for ids in flat for token in ids], device=device)
    logprobs = model.logprobs(tokens, targets, layout=layout, logit_positions=logit_positions)
    inside_NT = padded([[1.0] * len(ids) for ids in flat]).to(device) > 0
    return torch.zeros(inside_NT.shape, device=device).masked_scatter(inside_NT, logprobs)


def padded(rows: list[list]) -> torch.Tensor:
    """Lists of numbers as one fp32 matrix, padded with zeros."""
    longest = max(map(len, rows))
    return torch.tensor([[float(x) for x in row] + [0.0] * (longest - len(row)) for row in rows])


def rollout_stats(rollouts: Rollouts, tasks: dict[str, Task], settings) -> dict[str, float]:
    """Figures of the rollouts of all processes."""
    rewards, lengths, G = rollouts.rewards, rollouts.lengths, settings.rollouts
    groups = [rewards[start : start + G] for start in range(0, len(rewards), G)]
    groups_with_signal = sum(max(group) > min(group) for group in groups)
    stats = {
        "reward": sum(rewards) / len(rewards),
        "entropy": -sum(rollouts.logprobs) / sum(lengths),  # nats per sampled token
        "length": sum(lengths) / len(lengths),
        "groups_with_signal": groups_with_signal,
        "groups_without_signal": len(groups) - groups_with_signal,
    }
    for name in tasks:
        of_task = [reward for task, reward in zip(rollouts.tasks, rewards) if task == name]
        stats[f"pass_rate_{name}"] = sum(of_task) / max(1, len(of_task))
    return stats
