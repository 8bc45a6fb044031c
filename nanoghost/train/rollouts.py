"""The parts of an RL step: sample rollouts, score them, compute advantages, backpropagate the policy gradient.

`settings` is the `RlSettings` of rl.py. N rollouts, G rollouts of each problem (a group), T tokens.
"""

import itertools
import random
from dataclasses import dataclass, field

import torch

from nanoghost import distributed, hardware
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.evals.task_accuracy import generate_replies
from nanoghost.model.layout import shared_prompt_rows
from nanoghost.tasks.base import Problem, Task
from nanoghost.train.policy_loss import advantages, denominators, policy_loss
from nanoghost.train.settings import sampling_seed


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of one step. All fields but `sequences` cover all processes, in the order of their ranks."""

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


def sample_rollouts(model, tokenizer, tasks: dict[str, Task], settings, step: int) -> Rollouts:
    """Sample `settings.rollouts` replies to each problem of a step with the engine, and score them."""
    rank, world_size = distributed.rank_and_world_size()
    problems = problems_of_step(tasks, settings, step, rank, world_size)
    seed = sampling_seed(settings.seed, step)
    sampling = SamplingParams(settings.max_tokens, temperature=1.0, seed=seed, constrain_calls=False)
    sequences = generate_replies(model, tokenizer, problems, sampling, settings.rollouts, rank, world_size)
    local_results = []
    for i, sequence in enumerate(sequences):
        problem = problems[i // settings.rollouts]
        reward = compute_reward(tasks[problem.task], problem, sequence)
        local_results.append((problem.task, reward, sum(sequence.sampled_mask), sum(sequence.logprobs)))
    results = itertools.chain.from_iterable(distributed.all_gather_object(local_results))
    names, rewards, lengths, logprobs = zip(*results)
    return Rollouts(sequences, list(names), list(rewards), list(lengths), list(logprobs))


def compute_reward(task: Task, problem: Problem, sequence: Sequence) -> float:
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
    local_rollouts = slice(rank * len(rollouts.sequences), (rank + 1) * len(rollouts.sequences))
    return advantages_N[local_rollouts], denominators_N[local_rollouts]


@dataclass
class PolicyLossStats:
    """Figures of `accumulate_policy_gradients`; the gradients themselves are in .grad."""

    loss: float = 0.0
    tokens: int = 0
    """Number of tokens that went through the model."""
    figures: dict[str, float] = field(default_factory=dict)


def accumulate_policy_gradients(
    model, sequences: list[Sequence], advantages_N, denominators_N, settings, micro_batch: int = 16
) -> PolicyLossStats:
    """Add the gradients of the policy loss of this process's rollouts, those with an advantage of 0 left out.

    A prompt goes through the model once for all its rollouts, and identical rollouts count as one with the sum of their
    advantages: several times faster than one row per rollout.
    """
    # The loss is a sum over all processes, and the optimizer averages the gradients over them.
    _, world_size = distributed.rank_and_world_size()
    advantages_N = advantages_N * world_size
    # prompt -> completion -> indices of the identical rollouts
    rollouts_by_prompt: dict[tuple, dict[tuple, list[int]]] = {}
    for n in advantages_N.nonzero()[:, 0].tolist():
        completions = rollouts_by_prompt.setdefault(tuple(sequences[n].prompt_ids), {})
        completions.setdefault(tuple(sequences[n].completion_ids), []).append(n)
    if not rollouts_by_prompt:
        return PolicyLossStats()

    def row_length(prompt: tuple) -> int:
        return len(prompt) + sum(map(len, rollouts_by_prompt[prompt]))

    sorted_prompts = sorted(rollouts_by_prompt, key=row_length)  # rows of similar length need less padding
    result, ratios = PolicyLossStats(), []
    for start in range(0, len(sorted_prompts), micro_batch):
        prompts = sorted_prompts[start : start + micro_batch]
        identical_rollouts = [indices for prompt in prompts for indices in rollouts_by_prompt[prompt].values()]
        first_rollouts = [indices[0] for indices in identical_rollouts]
        logp_NT = rollout_logprobs(model, prompts, [list(rollouts_by_prompt[prompt]) for prompt in prompts])
        old_logp_NT = pad_rows([sequences[n].logprobs for n in first_rollouts])
        mask_NT = pad_rows([sequences[n].sampled_mask for n in first_rollouts])
        summed_advantages_N = torch.stack([advantages_N[indices].sum() for indices in identical_rollouts])
        constants = (old_logp_NT, summed_advantages_N, mask_NT, denominators_N[first_rollouts])
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
    result.tokens = sum(len(sequences[n].completion_ids) for n in informative) + sum(map(len, rollouts_by_prompt))
    return result


def rollout_logprobs(model, prompts, completions: list[list[list[int]]]) -> torch.Tensor:
    """log P of every token of every rollout, (N, T), 0 after its end. `completions`: token ids by prompt."""
    device = hardware.device()
    tokens, layout, logit_positions = shared_prompt_rows([list(p) for p in prompts], completions, model.dtype, device)
    flat = [ids for group in completions for ids in group]
    targets = torch.tensor([token for ids in flat for token in ids], device=device)
    logprobs = model.logprobs(tokens, targets, layout=layout, logit_positions=logit_positions)
    inside_NT = pad_rows([[1.0] * len(ids) for ids in flat]).to(device) > 0
    return torch.zeros(inside_NT.shape, device=device).masked_scatter(inside_NT, logprobs)


def pad_rows(rows: list[list]) -> torch.Tensor:
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
        task_rewards = [reward for task, reward in zip(rollouts.tasks, rewards) if task == name]
        stats[f"pass_rate_{name}"] = sum(task_rewards) / max(1, len(task_rewards))
    return stats
