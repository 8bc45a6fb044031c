"""Accuracy on the held-out problems of a task, with a confidence interval."""

import math
from itertools import chain

import torch

from nanoghost import distributed
from nanoghost.engine.generate import generate
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.tasks.base import Problem, Task
from nanoghost.tasks.tool_use import tool_runner
from nanoghost.tokenizer.chat_format import render

MIN_REPLY_TOKENS = 8
"""Room for a reply to a problem that is longer than the context of a toy model: its beginning is cut off."""


def wilson_interval(solved: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """(low, high) of the 95% confidence interval of a proportion (Wilson 1927).

    Unlike p +- 1.96 standard errors it is accurate near 0 and 1.
    """
    p = solved / count
    center = (p + z * z / (2 * count)) / (1 + z * z / count)
    half_width = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, center - half_width), min(1.0, center + half_width)


def generate_replies(
    model,
    tokenizer,
    problems: list[Problem],
    sampling: SamplingParams,
    samples: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[Sequence]:
    """Sample replies to problems, with the tools that they allow. Sequence p * samples + i is reply i to problem p.

    `problems` are those of this process: every `world_size`-th, from `rank` on. The number of processes does not change
    the replies.
    """
    context = model.config.context if isinstance(model, torch.nn.Module) else model.context
    prompts = [render(list(problem.messages), tokenizer, add_generation_prompt=True)[0] for problem in problems]
    prompts = [prompt[-(context - MIN_REPLY_TOKENS) :] for prompt in prompts]
    tools = {name for problem in problems for name in problem.tools}
    run_tool = tool_runner(tools) if tools else None
    return generate(model, tokenizer, prompts, sampling, samples, run_tool, rank, world_size)


def accuracy(
    model, tokenizer, task: Task, problems: list[Problem], max_tokens: int = 128, batch_size: int = 128
) -> tuple[dict, list[tuple]]:
    """Accuracy with greedy decoding. The processes share the problems, and each returns the result of all.

    Returns ({"accuracy", "low", "high", "count"}, [(problem, reply messages, score)]); low and high bound the 95%
    confidence interval.
    """
    rank, world_size = distributed.rank_and_world_size()
    by_length = sorted(problems, key=lambda problem: len(str(problem.messages)))  # similar lengths in a batch
    local_problems = by_length[rank::world_size]
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
    local_results = []
    for start in range(0, len(local_problems), batch_size):
        batch = local_problems[start : start + batch_size]
        replies = generate_replies(model, tokenizer, batch, sampling)
        for problem, reply in zip(batch, replies):
            local_results.append((problem, reply.messages, task.score(problem, reply.messages)))
    results = list(chain.from_iterable(distributed.all_gather_object(local_results)))
    solved = sum(score for _, _, score in results)
    low, high = wilson_interval(solved, len(results))
    return {"accuracy": solved / len(results), "low": low, "high": high, "count": len(results)}, results
