"""The engine: prompts in, tokens out. A step is schedule, run, postprocess.

The tokens of a sequence depend only on its prompt, its settings and its seed, not on the other sequences that are
served at the same time. tests/test_engine.py holds the engine to this contract.
"""

from pathlib import Path

import torch

from nanoghost import hardware
from nanoghost.engine.model_runner import ModelRunner
from nanoghost.engine.output_processor import accept_tokens, max_sequence_len
from nanoghost.engine.paged_runner import open_paged_runner
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
        run_tool=None,
        adapter: str | None = None,
        rng_stream: int = 0,
    ) -> list[Sequence]:
        """Queue `samples` completions of a prompt, with streams of random numbers from `rng_stream` on.

        Raises UserError if the prompt fills the context.
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
        self.scheduler.add(sequences)
        return sequences

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)

    @torch.no_grad()
    def step(self) -> None:
        batch = self.scheduler.schedule()
        logits_LV = self.runner.run(batch)
        self.postprocess(batch, logits_LV)

    def postprocess(self, batch: list[ScheduledChunk], logits_LV: torch.Tensor) -> None:
        """Sample for every sequence whose tokens are all computed; release those that are finished."""
        ready = self.scheduler.advance(batch)
        if not ready:
            return
        sampled = self.sample(ready, logits_LV)
        for item in ready:
            tokens = [next(sampled) for _ in item.logits_rows]
            if item.sequence.logits_processor:
                item.sequence.logits_processor.accept(tokens[0][0])
            accept_tokens(item.sequence, item.draft_ids, tokens, self.tokenizer)
            if item.sequence.finish_reason:
                self.runner.release(item.sequence)
        self.scheduler.remove_finished()

    def sample(self, ready: list[ReadySequence], logits_LV: torch.Tensor):
        """An iterator over (token id, log-probability): for each sequence one, and one more for each draft token."""
        rows = [row for item in ready for row in item.logits_rows]
        if len(rows) != len(logits_LV):  # forked samples share the logits of their prompt
            logits_LV = logits_LV[rows]
        params, uniforms = [], []
        for item in ready:
            sequence = item.sequence
            if sequence.logits_processor:
                sequence.logits_processor.process(logits_LV[len(params)])
            for i in range(len(item.logits_rows)):
                position = len(sequence.completion_ids) + i
                params.append(sequence.sampling)
                uniforms.append(uniform(sequence.sampling.seed, sequence.rng_stream, position))
        return zip(*sample(logits_LV, params, uniforms))


def open_engine(
    folder: ModelFolder, slots: int = 1, slot_tokens: int | None = None, adapter: Path | None = None
) -> Engine:
    """An engine for a model folder, with memory for `slots` sequences of `slot_tokens` tokens (default: the context).

    A Llama runs from quantized weights where this machine has the kernels; everything else runs in PyTorch. Sequences
    that request no adapter use the one in the folder `adapter`, or that of BASE@NAME.
    """
    base = folder.path.with_name(folder.base)
    if adapter is None and "@" in folder.name:
        adapter = folder.path
    config = load_config(base)
    slot_tokens = min(slot_tokens or config.context, config.context)
    runner = open_paged_runner(base, config, slots, slot_tokens)
    if runner is None:
        model, _ = load_model(base, hardware.compute_dtype(), hardware.device())
        runner = TorchRunner(model, slots, slot_tokens)
    if adapter:
        runner.add_adapter(adapter)
    return Engine(runner, load_tokenizer(base), str(adapter or ""))
