"""Generation as one function call: complete a list of prompts, all at once."""

from collections.abc import Callable, Iterator

import torch

from nanoghost.engine.engine import Engine
from nanoghost.engine.model_runner import ModelRunner
from nanoghost.engine.output_processor import max_sequence_len
from nanoghost.engine.paged_runner import paged_runner_for_model
from nanoghost.engine.sampler import SamplingParams
from nanoghost.engine.sequence import Sequence
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.tokenizer.tokenizer import Tokenizer


def generate(
    model: torch.nn.Module | ModelRunner,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: SamplingParams,
    samples: int = 1,
    run_tool: Callable[[dict], str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Sequence]:
    """The finished sequences of all prompts; arguments as for `generate_steps`."""
    *_, sequences = generate_steps(model, tokenizer, prompts, sampling, samples, run_tool, rank, world_size)
    return sequences


def generate_steps(
    model: torch.nn.Module | ModelRunner,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    sampling: SamplingParams,
    samples: int = 1,
    run_tool: Callable[[dict], str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Sequence]]:
    """Complete every prompt `samples` times; yields all sequences after each step.

    Sequence p * samples + i is sample i of prompt p. With several processes, `prompts` are those of this process (every
    `world_size`-th, from `rank` on); they get the same completions as in a single process. Raises UserError if a prompt
    fills the context.
    """
    runner = model
    if isinstance(model, torch.nn.Module):
        max_len = max(max_sequence_len(prompt, sampling, has_tools=run_tool is not None) for prompt in prompts)
        runner = runner_for_model(model, len(prompts) * samples, max_len)
    engine = Engine(runner, tokenizer)
    sequences = []
    for i, prompt in enumerate(prompts):
        rng_stream = (rank + i * world_size) * samples
        sequences += engine.add(prompt, sampling, samples, run_tool, rng_stream=rng_stream)
    while not all(sequence.finish_reason for sequence in sequences):
        engine.step()
        yield sequences


def runner_for_model(model: torch.nn.Module, slots: int, slot_tokens: int) -> ModelRunner:
    """A runner for a model in memory. A Llama in bf16 (during RL on a CPU) is copied into the layout of the kernels."""
    runner = None
    if model.dtype == torch.bfloat16:
        runner = paged_runner_for_model(model, slots, slot_tokens)
    return runner or TorchRunner(model, slots, slot_tokens)
