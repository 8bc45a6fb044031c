"""The engine: prompts in, tokens out. A step is schedule, run, postprocess.

The tokens of a sequence depend only on its prompt, its settings and its seed, not on the other sequences that are
served at the same time. tests/test_engine.py holds the engine to this contract.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.engine.logits_processors import mask_unused_ids
from nanoghost.engine.model_runner import ModelRunner
from nanoghost.engine.output_processor import accept_tokens, max_sequence_len
from nanoghost.engine.paged_runner import paged_runner_for_folder
from nanoghost.engine.sampler import SamplingParams, sample, uniform
from nanoghost.engine.scheduler import ReadySequence, Scheduler
from nanoghost.engine.sequence import ScheduledChunk, Sequence
from nanoghost.engine.torch_runner import TorchRunner
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_config, load_model, load_tokenizer
from nanoghost.home import ModelFolder


class Engine:
    def __init__(self, runner: ModelRunner, tokenizer, adapter: str = ""):
        """`adapter`: name of the adapter for sequences that request none; empty for the base model."""
        self.runner = runner
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.scheduler = Scheduler(runner)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(
        self,
        prompt_ids: list[int],
        sampling: SamplingParams,
        samples: int = 1,
        run_tool: Callable[[dict], str] | None = None,
        adapter: str | None = None,
        rng_stream: int = 0,
    ) -> list[Sequence]:
        """Queue `samples` completions of a prompt; they draw from random streams `rng_stream`, `rng_stream` + 1, ...

        `run_tool`: as in `Sequence`. `adapter`: None is the adapter of the engine. Raises UserError if the prompt fills
        the context.
        """
        context = self.runner.context
        if len(prompt_ids) >= context:
            raise UserError(f"a prompt of {len(prompt_ids)} tokens leaves no room in a context of {context}")
        max_len = min(context, max_sequence_len(prompt_ids, sampling, has_tools=run_tool is not None))
        adapter = self.adapter if adapter is None else adapter
        sequences = []
        for i in range(samples):
            sequence = Sequence(list(prompt_ids), sampling, max_len, rng_stream + i, run_tool, adapter)
            sequence.pending_ids = list(prompt_ids)
            sequences.append(sequence)
        self.scheduler.add_samples(sequences)
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)

    @torch.no_grad()
    def step(self) -> None:
        batch = self.scheduler.schedule()
        logits_LV = mask_unused_ids(self.runner.run(batch), self.tokenizer)
        self.postprocess(batch, logits_LV)

    def postprocess(self, batch: list[ScheduledChunk], logits_LV: torch.Tensor) -> None:
        """Sample for every sequence whose tokens are all computed; release those that are finished."""
        ready_sequences = self.scheduler.mark_computed(batch)
        if not ready_sequences:
            return
        for ready, tokens in zip(ready_sequences, self.sample(ready_sequences, logits_LV)):
            sequence = ready.sequence
            if sequence.logits_processor:
                token_id, _ = tokens[0]
                sequence.logits_processor.accept(token_id)
            accept_tokens(sequence, ready.draft_ids, tokens, self.tokenizer)
            if sequence.finish_reason:
                self.runner.release(sequence)
        self.scheduler.remove_finished()

    def sample(self, ready_sequences: list[ReadySequence], logits_LV: torch.Tensor) -> list[list[tuple[int, float]]]:
        """For each sequence the sampled (token id, log-probability): one, and one more for each draft token."""
        rows = [row for ready in ready_sequences for row in ready.logits_rows]
        if len(rows) != len(logits_LV):  # forked samples share the logits of their prompt
            logits_LV = logits_LV[rows]
        params, uniforms = [], []
        for ready in ready_sequences:
            sequence = ready.sequence
            if sequence.logits_processor:
                sequence.logits_processor.process(logits_LV[len(params)])
            for i in range(len(ready.logits_rows)):
                position = len(sequence.completion_ids) + i
                params.append(sequence.sampling)
                uniforms.append(uniform(sequence.sampling.seed, sequence.rng_stream, position))
        token_ids, logprobs = sample(logits_LV, params, uniforms)
        tokens = list(zip(token_ids, logprobs))
        tokens_by_sequence, start = [], 0
        for ready in ready_sequences:
            end = start + len(ready.logits_rows)
            tokens_by_sequence.append(tokens[start:end])
            start = end
        return tokens_by_sequence


def open_engine(
    folder: ModelFolder, slots: int = 1, slot_tokens: int | None = None, adapter: Path | None = None
) -> Engine:
    """An engine for a model folder, with memory for `slots` sequences of `slot_tokens` tokens (default: the context).

    A Llama runs from quantized weights if the kernels work on this machine; everything else runs in PyTorch. Sequences
    that request no adapter use the one in the folder `adapter`; if the model is BASE@NAME, the default is that adapter.
    """
    base = folder.path.with_name(folder.base)
    if adapter is None and "@" in folder.name:
        adapter = folder.path
    config = load_config(base)
    slot_tokens = min(slot_tokens or config.context, config.context)
    runner = paged_runner_for_folder(base, config, slots, slot_tokens)
    if runner is None:
        model, _ = load_model(base, hardware.compute_dtype(), hardware.device())
        runner = TorchRunner(model, slots, slot_tokens)
    if adapter:
        runner.add_adapter(adapter)
    return Engine(runner, load_tokenizer(base), str(adapter or ""))
