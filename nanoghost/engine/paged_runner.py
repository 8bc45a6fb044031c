"""A model runner for Llamas with quantized weights and a paged KV cache (PagedAttention, Kwon et al. 2023)."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nanoghost.engine.block_manager import BLOCK_SIZE, BlockManager
from nanoghost.engine.quantized_llama import (
    AdapterSlices,
    QuantizedLlama,
    load_quantized,
    quantize_model,
    supports_quantization,
)
from nanoghost.engine.sequence import ScheduledChunk, Sequence
from nanoghost.formats.peft import read_adapter
from nanoghost.model.llama import Llama


class PagedRunner:
    """A `ModelRunner`."""

    token_budget = 512
    speculative = True

    def __init__(self, model: QuantizedLlama, cache_tokens: int, slots: int = 64):
        """`cache_tokens`: size of the KV cache, shared by all sequences."""
        num_blocks = math.ceil(cache_tokens / BLOCK_SIZE)
        self.model = model
        self.context = min(model.config.context, num_blocks * BLOCK_SIZE)
        self.kv_cache = model.new_kv_cache(num_blocks)
        self.block_manager = BlockManager(num_blocks, slots, self.context)

    def admit(self, sequence: Sequence) -> bool:
        return self.block_manager.allocate(sequence)

    def fork(self, sequence: Sequence, siblings: list[Sequence]) -> int:
        num_full, num_rest = divmod(sequence.num_computed, BLOCK_SIZE)
        for i, sibling in enumerate(siblings):
            if not self.block_manager.fork(sequence, sibling):
                return i
            if num_rest:
                source = self.block_manager.blocks_of(sequence)[num_full]
                target = self.block_manager.blocks_of(sibling)[num_full]
                self.kv_cache[:, target] = self.kv_cache[:, source]
        return len(siblings)

    def release(self, sequence: Sequence) -> None:
        self.block_manager.free(sequence)

    def add_adapter(self, folder: Path, name: str = "") -> None:
        self.model.adapters[name or str(folder)] = read_adapter(folder, self.model.config, torch.float32)

    @property
    def adapter_names(self) -> list[str]:
        return list(self.model.adapters)

    def run(self, batch: list[ScheduledChunk]) -> torch.Tensor:
        token_ids, slots, positions, logits_indices = [], [], [], []
        adapter_slices: AdapterSlices = []
        for chunk in batch:
            sequence = chunk.sequence
            start = len(token_ids)
            self.block_manager.register_full_blocks(sequence)
            token_ids += chunk.token_ids
            end = len(token_ids)
            num_tokens = end - start
            slots += [self.block_manager.slot_of(sequence)] * num_tokens
            positions += range(sequence.num_computed, sequence.num_computed + num_tokens)
            logits_indices += range(end - chunk.num_logits, end)
            if sequence.adapter:
                adapter = self.model.adapters[sequence.adapter]
                previous_slice, previous_adapter = adapter_slices[-1] if adapter_slices else (slice(0, 0), None)
                if adapter is previous_adapter and start == previous_slice.stop:
                    adapter_slices.pop()  # one matmul for neighbors with the same adapter
                    start = previous_slice.start
                adapter_slices.append((slice(start, end), adapter))
        return self.model.forward(
            torch.tensor(token_ids, dtype=torch.long),
            torch.tensor(slots, dtype=torch.int32),
            torch.tensor(positions, dtype=torch.int32),
            self.kv_cache,
            self.block_manager.block_table,
            torch.tensor(logits_indices, dtype=torch.long),
            adapter_slices,
        )

    def single_sequence(self, num_tokens: int, adapter: str = "") -> Callable[[list[int], int], torch.Tensor]:
        kv_cache = self.model.new_kv_cache(math.ceil(num_tokens / BLOCK_SIZE))
        lora = self.model.adapters[adapter] if adapter else None
        return partial(self.model.forward_one, kv_cache=kv_cache, adapter=lora)


def paged_runner_for_folder(base: Path, config, slots: int, slot_tokens: int) -> PagedRunner | None:
    """A runner for a model folder, with memory for `slots` sequences of `slot_tokens` tokens.

    None if the kernels cannot run this model, or not on this machine.
    """
    if not supports_quantization(config):
        return None
    cache_tokens = slots * math.ceil(slot_tokens / BLOCK_SIZE) * BLOCK_SIZE
    return PagedRunner(load_quantized(base), cache_tokens, slots)


def paged_runner_for_model(model: Llama, slots: int, slot_tokens: int) -> PagedRunner | None:
    """A runner for a copy of a model in memory, in bf16; None as for `paged_runner_for_folder`."""
    if not supports_quantization(model.config):
        return None
    slot_tokens = min(slot_tokens, model.config.context) + BLOCK_SIZE  # a sequence occupies whole blocks
    return PagedRunner(quantize_model(model, bits=16), slots * slot_tokens, slots)
