"""Generation as one function call: complete a list of prompts, all at once."""

from collections import deque
from collections.abc import Iterator

import torch

from nanoghost.engine.engine import Engine
from nanoghost.engine.model_runner import ModelRunner
from nanoghost.engine.output_processor import max_sequence_len
from nanoghost.engine.paged_runner import paged_runner_for
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.engine.torch_runner import TorchRunner


def generate(
    model,
    tokenizer,
    prompts: list[list[int]],
    sampling: SamplingParams,
    samples: int = 1,
    run_tool=None,
    rank=0,
    world=1,
) -> list[Sequence]:
    """The finished sequences of all prompts; arguments as for `generate_steps`."""
    every_step = generate_steps(model, tokenizer, prompts, sampling, samples, run_tool, rank, world)
    return deque(every_step, maxlen=1).pop()


def generate_steps(
    model,
    tokenizer,
    prompts: list[list[int]],
    sampling: SamplingParams,
    samples: int = 1,
    run_tool=None,
    rank=0,
    world=1,
) -> Iterator[list[Sequence]]:
    """Complete every prompt `samples` times; yields all sequences after each step.

    Sequence p * samples + i is sample i of prompt p. `model` is a model or a runner. With several processes, `prompts`
    are those of this process (every `world`-th, from `rank` on); they get the same completions as in a single process.
    Raises UserError if a prompt fills the context.
    """
    runner = model
    if isinstance(model, torch.nn.Module):
        max_len = max(max_sequence_len(prompt, sampling, has_tools=run_tool is not None) for prompt in prompts)
        runner = runner_for(model, len(prompts) * samples, max_len)
    engine = Engine(runner, tokenizer)
    sequences = []
    for i, prompt in enumerate(prompts):
        rng_stream = (rank + i * world) * samples
        sequences += engine.add(prompt, sampling, samples, run_tool, rng_stream=rng_stream)
    while not all(sequence.finish_reason for sequence in sequences):
        engine.step()
        yield sequences


def runner_for(model: torch.nn.Module, slots: int, slot_tokens: int) -> ModelRunner:
    """A runner for a model in memory. A Llama in bf16 (RL on a CPU) is copied into the layout of the kernels."""
    runner = None
    if model.dtype == torch.bfloat16:
        runner = paged_runner_for(model, slots, slot_tokens)
    return runner or TorchRunner(model, slots, slot_tokens)
