"""A model runner for any model, in plain PyTorch: one slot per sequence, each with memory for the longest sequence.

Sequences that decode are one batch over the slots from the first to the last used one; chunks of prompts are another.

B rows of a batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from nanoghost.engine.sequence import ScheduledChunk, Sequence
from nanoghost.formats.peft import read_adapter

MAX_USED_FRACTION = 0.7  # sequences move together when at most this fraction of the slots up to the last one is used


class TorchRunner:
    """A `ModelRunner`; `slot_tokens` is the length of the longest sequence."""

    token_budget = 4096
    speculative = False

    def __init__(self, model, slots: int, slot_tokens: int):
        self.model = model
        self.context = min(model.config.context, slot_tokens)
        self.cache = model.new_cache(slots, slot_tokens)
        self.slots: list[Sequence | None] = [None] * slots
        """The sequence in each slot."""
        self.adapter_names: list[str] = []
        """In the order of `model.adapters`."""

    def add_adapter(self, folder: Path, name: str = "") -> None:
        self.model.adapters = [*self.model.adapters, read_adapter(folder, self.model.config, self.model.dtype)]
        self.adapter_names.append(name or str(folder))

    def admit(self, sequence: Sequence) -> bool:
        if None not in self.slots:
            return False
        self.slots[self.slots.index(None)] = sequence
        return True

    def fork(self, sequence: Sequence, siblings: list[Sequence]) -> int:
        if not siblings:
            return 0
        free = [i for i, occupant in enumerate(self.slots) if occupant is None][: len(siblings)]
        for slot, sibling in zip(free, siblings):
            self.slots[slot] = sibling
        self.cache.copy_rows([self.slots.index(sequence)] * len(free), free, sequence.num_computed)
        return len(free)

    def release(self, sequence: Sequence) -> None:
        self.slots[self.slots.index(sequence)] = None

    def run(self, batch: list[ScheduledChunk]) -> torch.Tensor:
        self.compact()
        slot_of = {id(sequence): slot for slot, sequence in enumerate(self.slots) if sequence is not None}
        decode = [chunk for chunk in batch if chunk.is_decode]
        prefill = batch[len(decode) :]  # the scheduler puts decoding sequences first
        logits = []
        if decode:
            logits.append(self.run_decode(decode, [slot_of[id(chunk.sequence)] for chunk in decode]))
        if prefill:
            logits.append(self.run_prefill(prefill, [slot_of[id(chunk.sequence)] for chunk in prefill]))
        return torch.cat(logits)

    def run_decode(self, chunks: list[ScheduledChunk], slots: list[int]) -> torch.Tensor:
        """One token in every slot up to the last used one.

        A slot whose sequence does not decode computes token 0 at its next position. Nobody reads the result, and the
        sequence overwrites these keys and values when it continues.
        """
        num_slots = max(slots) + 1
        token_ids = [[0]] * num_slots
        for slot, chunk in zip(slots, chunks):
            token_ids[slot] = chunk.token_ids
        sequences = self.slots[:num_slots]
        starts = [sequence.num_computed if sequence else 0 for sequence in sequences]
        logits_BV = self.forward(token_ids, starts, None, [0] * num_slots, sequences)
        all_slots_decode = slots == list(range(num_slots))
        return logits_BV if all_slots_decode else logits_BV[slots]

    def run_prefill(self, chunks: list[ScheduledChunk], slots: list[int]) -> torch.Tensor:
        """Chunks of any lengths, padded to the longest."""
        longest = max(len(chunk.token_ids) for chunk in chunks)
        token_ids = [chunk.token_ids + [0] * (longest - len(chunk.token_ids)) for chunk in chunks]
        sequences = [chunk.sequence for chunk in chunks]
        starts = [sequence.num_computed for sequence in sequences]
        last = [len(chunk.token_ids) - 1 for chunk in chunks]
        logits_BV = self.forward(token_ids, starts, slots, last, sequences)
        return logits_BV[[i for i, chunk in enumerate(chunks) if chunk.num_logits]]

    def forward(
        self,
        token_ids: list[list[int]],
        starts: list[int],
        slots: list[int] | None,
        last: list[int],
        sequences: list[Sequence | None],
    ) -> torch.Tensor:
        """Logits (B, V) after one token of each row, the one with the index `last`.

        `starts`: positions of the first tokens. `slots`: slots of the rows; None: row i belongs to slot i.
        """
        device = self.model.device
        tokens_BT, starts_B, last_B = (torch.tensor(x, device=device) for x in (token_ids, starts, last))
        self.cache.select(slots, starts_B)
        if not self.adapter_names:
            return self.model(tokens_BT, cache=self.cache, last_B=last_B)[:, 0]
        adapters = [self.adapter_index(sequence.adapter if sequence else "") for sequence in sequences]
        adapters_B = torch.tensor(adapters, device=device)
        return self.model(tokens_BT, cache=self.cache, last_B=last_B, adapters_B=adapters_B)[:, 0]

    def adapter_index(self, name: str) -> int:
        """Index of an adapter in `model.adapters`; -1 for the base model."""
        return self.adapter_names.index(name) if name else -1

    def compact(self) -> None:
        """If many slots are free, move the last sequences there: computing the free slots costs more than the copy."""
        used = [i for i, sequence in enumerate(self.slots) if sequence is not None]
        if used and len(used) <= MAX_USED_FRACTION * (used[-1] + 1):
            free = [i for i in range(len(used)) if self.slots[i] is None]
            moving_slots = used[len(used) - len(free) :]
            self.cache.copy_rows(moving_slots, free, max(self.slots[i].num_computed for i in moving_slots))
            for source, target in zip(moving_slots, free):
                self.slots[target] = self.slots[source]
                self.slots[source] = None

    def single_sequence(self, num_tokens: int, adapter: str = "") -> Callable[[list[int], int], torch.Tensor]:
        model, device = self.model, self.model.device
        cache = model.new_cache(1, num_tokens)
        arguments = {}
        if self.adapter_names:
            arguments["adapters_B"] = torch.tensor([self.adapter_index(adapter)], device=device)

        def forward_one(token_ids: list[int], start: int) -> torch.Tensor:
            cache.select([0], torch.tensor([start], device=device))
            return model(torch.tensor([token_ids], device=device), cache=cache, **arguments)[0]

        return forward_one
