"""What the engine expects of a model runner: slots for sequences, their KV cache, and one forward pass a step."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from nanoghost.engine.sequence import ScheduledChunk, Sequence


class ModelRunner(Protocol):
    """T tokens of one sequence, L logits of all sequences of a step, V vocabulary."""

    context: int
    """Maximum number of tokens of one sequence."""
    token_budget: int
    """Maximum number of tokens that one step computes. Decoding sequences are computed even if they exceed it."""
    speculative: bool
    """Whether drafts are worth their cost: computing a few tokens must cost little more than computing one."""

    def admit(self, sequence: Sequence) -> bool:
        """Give a sequence a slot and memory for `max_len` tokens; False if there is not enough.

        Sets `num_computed` to the length of the prefix that is in the cache already.
        """

    def fork(self, sequence: Sequence, siblings: list[Sequence]) -> int:
        """Admit siblings, with the tokens of `sequence` in their cache. Returns the number that got memory."""

    def release(self, sequence: Sequence) -> None:
        """Free the slot and the memory of a sequence."""

    def run(self, batch: list[ScheduledChunk]) -> torch.Tensor:
        """Logits (L, V), `num_logits` rows for each chunk, in the order of the batch."""

    def add_adapter(self, folder: Path, name: str = "") -> None:
        """Load a LoRA adapter under a name; default: its path."""

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that sequences can use."""

    def single_sequence(self, num_tokens: int, adapter: str = "") -> Callable[[list[int], int], torch.Tensor]:
        """A function (token ids, position of the first) -> logits (T, V), with its own KV cache for one sequence."""
