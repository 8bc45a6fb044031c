"""Drafts for speculative decoding by prompt lookup (Saxena 2023): they come from the text itself, not from a model.

If the last MIN_MATCH tokens occurred before in the sequence, the tokens that followed them are proposed again. The
model computes the whole draft in one step, and the engine accepts the tokens that it would have sampled anyway
(output_processor.accept_tokens), so a draft changes the speed and never the text. It helps where a text repeats
itself: quotes, code, corrections of an earlier answer.
"""

from dataclasses import dataclass, field

MIN_MATCH = 3  # tokens that must have occurred before, in this order
MAX_SPEC_BATCH = 4  # with more running sequences there are no drafts: arithmetic, not memory, then limits a step
INITIAL_DRAFT = 4  # lengths of drafts, in tokens
MIN_DRAFT = 2
MAX_DRAFT = 16


@dataclass
class PromptLookup:
    """The n-gram index of one sequence."""

    ngram_index: dict[tuple[int, ...], int] = field(default_factory=dict)
    """MIN_MATCH tokens -> index of the token after their last occurrence."""
    num_indexed: int = 0
    """How many positions of the sequence are in the index."""
    draft_len: int = INITIAL_DRAFT
    """Number of tokens to propose next (`update_draft_len`)."""

    def propose_draft(self, token_ids: list[int], max_len: int) -> list[int]:
        """The tokens that followed the last occurrence of the current n-gram; empty if there was none.

        At most `draft_len`, and so that the sequence does not exceed `max_len`.
        """
        for i in range(self.num_indexed, len(token_ids) - MIN_MATCH):
            self.ngram_index[tuple(token_ids[i : i + MIN_MATCH])] = i + MIN_MATCH
        self.num_indexed = max(0, len(token_ids) - MIN_MATCH)
        start = self.ngram_index.get(tuple(token_ids[-MIN_MATCH:]), len(token_ids))
        return token_ids[start : start + min(self.draft_len, max_len - len(token_ids))]

    def update_draft_len(self, num_draft: int, num_accepted: int) -> None:
        """Double it after a draft that was accepted completely; otherwise use the accepted number plus 1."""
        if num_accepted == num_draft:
            self.draft_len = min(MAX_DRAFT, 2 * self.draft_len)
        else:
            self.draft_len = max(MIN_DRAFT, num_accepted + 1)
