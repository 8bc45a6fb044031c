"""The scheduler: which sequences run, and how many tokens of each one step computes (continuous batching).

Sequences join and leave at every step. Those that decode get one token each; prompts are computed in chunks next to
them (chunked prefill), within the runner's token budget.
"""

from collections import deque
from dataclasses import dataclass

from nanoghost.engine.model_runner import ModelRunner
from nanoghost.engine.prompt_lookup import MAX_SPEC_BATCH
from nanoghost.engine.sequence import ScheduledChunk, Sequence


@dataclass
class ReadySequence:
    """A sequence whose tokens are all computed, so that its next token is sampled now."""

    sequence: Sequence
    draft_ids: list[int]
    logits_rows: range
    """Rows of the step's logits: after the last token, and after each draft token."""


class Scheduler:
    def __init__(self, runner: ModelRunner):
        self.runner = runner
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add_samples(self, sequences: list[Sequence]) -> None:
        """Queue the samples of one prompt: the first waits for a slot, the others for its prompt to be computed."""
        first, *siblings = sequences
        first.siblings = siblings
        self.waiting.append(first)

    def schedule(self) -> list[ScheduledChunk]:
        """Admit waiting sequences while there is memory, then distribute the token budget of one step."""
        while self.waiting and self.runner.admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            sequence.pending_ids = sequence.pending_ids[sequence.num_computed :]  # without the cached prefix
            self.running.append(sequence)
        budget = self.runner.token_budget
        batch = []
        # Decoding sequences come first and always run, so a long prompt does not delay their next tokens.
        for sequence in sorted(self.running, key=lambda sequence: len(sequence.pending_ids) > 1):
            num_pending = len(sequence.pending_ids)
            num_tokens = 1 if num_pending == 1 else min(num_pending, max(0, budget))
            budget -= num_tokens
            if num_tokens:
                batch.append(self.next_chunk(sequence, num_tokens))
        return batch

    def next_chunk(self, sequence: Sequence, num_tokens: int) -> ScheduledChunk:
        """The next `num_tokens` tokens of a sequence; with logits and a draft if no pending ones remain."""
        token_ids = sequence.pending_ids[:num_tokens]
        if num_tokens < len(sequence.pending_ids):
            return ScheduledChunk(sequence, token_ids, num_logits=0)
        draft_ids = self.propose_draft(sequence)
        return ScheduledChunk(sequence, token_ids + draft_ids, 1 + len(draft_ids), len(draft_ids))

    def propose_draft(self, sequence: Sequence) -> list[int]:
        if not self.runner.speculative or len(self.running) > MAX_SPEC_BATCH:
            return []
        if sequence.siblings or sequence.logits_processor:  # these need the logits of one token at a time
            return []
        return sequence.prompt_lookup.propose_draft(sequence.token_ids, sequence.max_len)

    def mark_computed(self, batch: list[ScheduledChunk]) -> list[ReadySequence]:
        """Count the tokens of a batch as computed, and fork samples. Returns the sequences that sample a token now."""
        ready = []
        num_logits = 0
        for chunk in batch:
            sequence, num_tokens = chunk.sequence, len(chunk.token_ids) - chunk.num_draft
            sequence.num_computed += num_tokens
            sequence.pending_ids = sequence.pending_ids[num_tokens:]
            if not chunk.num_logits:
                continue
            rows = range(num_logits, num_logits + chunk.num_logits)
            num_logits += chunk.num_logits
            for sample in [sequence, *self.fork_samples(sequence)]:
                ready.append(ReadySequence(sample, chunk.token_ids[num_tokens:], rows))
        return ready

    def fork_samples(self, sequence: Sequence) -> list[Sequence]:
        """Start the siblings of a sequence whose prompt is computed, and return them. Those without a slot wait."""
        siblings = [sibling for sibling in sequence.siblings if not sibling.finish_reason]
        sequence.siblings = []
        num_forked = self.runner.fork(sequence, siblings)
        forked = siblings[:num_forked]
        for sibling in forked:
            sibling.num_computed = sequence.num_computed
            sibling.pending_ids = []
        self.running += forked
        self.waiting.extendleft(reversed(siblings[num_forked:]))
        return forked

    def cancel(self, sequence: Sequence) -> None:
        """Stop a sequence in whatever state it is."""
        sequence.finish_reason = sequence.finish_reason or "cancelled"
        if sequence in self.running:
            self.running.remove(sequence)
            self.runner.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        siblings = [sibling for sibling in sequence.siblings if not sibling.finish_reason]
        sequence.siblings = []
        if siblings:  # the next sample computes the prompt for the rest
            siblings[0].siblings = siblings[1:]
            self.waiting.appendleft(siblings[0])

    def remove_finished(self) -> None:
        self.running = [sequence for sequence in self.running if not sequence.finish_reason]
