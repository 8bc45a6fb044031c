"""How often a model solves held-out problems, with confidence intervals."""

import math

from nanoghost import distributed
from nanoghost.engine.generate import generate
from nanoghost.engine.sequence import Sequence
from nanoghost.engine.sampler import SamplingParams
from nanoghost.tasks.tool_use import tool_runner
from nanoghost.tokenizer.chat_format import render


def wilson(solved: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion (Wilson 1927); sensible near 0 and 1, unlike p +- 1.96 s."""
    p = solved / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def attempt(model, tokenizer, problems, sampling: SamplingParams, samples: int = 1, rank=0, world=1) -> list[Sequence]:
    """The model's attempts at problems, of which it has each `world`-th; row p * samples + i is attempt i at problem p."""
    prompts = [render(list(p.messages), tokenizer, generation=True)[0] for p in problems]
    run = None
    if names := {name for p in problems for name in p.tools}:
        run = tool_runner(names)
    return generate(model, tokenizer, prompts, sampling, samples, run, rank, world)


def accuracy(model, tokenizer, task, problems, max_tokens: int = 128, batch: int = 128) -> tuple[dict, list[tuple]]:
    """({"accuracy", "low", "high", "count"}, [(problem, reply messages, score)]) with greedy decoding; processes share the work."""
    results, (rank, world) = [], distributed.rank_and_world_size()
    ordered = sorted(problems, key=lambda p: len(str(p.messages)))[rank::world]  # rows of a batch alike in length
    for i in range(0, len(ordered), batch):
        some = ordered[i : i + batch]
        rows = attempt(model, tokenizer, some, SamplingParams(max_tokens=max_tokens, temperature=0))
        results += [(p, row.messages, task.score(p, row.messages)) for p, row in zip(some, rows)]
    results = [result for part in distributed.all_gather_object(results) for result in part]
    solved = sum(score for _, _, score in results)
    low, high = wilson(solved, len(results))
    return {"accuracy": solved / len(results), "low": low, "high": high, "count": len(results)}, results
