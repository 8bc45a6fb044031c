"""Batches of a token stream: a pure function of (seed, step), the same for any number of ranks.

An epoch cuts the stream into windows of `context` tokens, starting at a random offset, and visits them in random order.
The next epoch has another offset, so that the model sees the same text at other distances from the start of a window.

B batch (rows of this rank), T time (context).
"""

from collections.abc import Iterator

import numpy as np
import torch

from nanoghost.errors import UserError


class Batches:
    """The batches of one token stream. `rows` are windows of the stream, numbered from the start of the run."""

    def __init__(
        self, tokens: np.ndarray, context: int, rows: int, seed: int, rank: int = 0, world_size: int = 1, verify=None
    ):
        """`tokens` and `verify` are from TokenDataset; `rows` is the size of the global batch.

        This rank gets the rows rank, rank + world_size, rank + 2 * world_size ...
        """
        if len(tokens) < context + 1:
            raise UserError(
                f"the text has {len(tokens):,} tokens, too few for one row of {context} + 1: "
                "choose a smaller --context, or give it more text"
            )
        self.tokens = np.asarray(tokens)  # same memory; indexing a memmap object itself is slower
        self.context, self.rows, self.seed = context, rows, seed
        self.rank, self.world_size, self.verify = rank, world_size, verify
        # One window fewer than would fit leaves room for the offset; a corpus of a single row has no room.
        self.rows_per_epoch = max(1, len(tokens) // context - 1)
        self.max_offset = len(tokens) - 1 - self.rows_per_epoch * context
        self.epochs: dict[int, np.ndarray] = {}  # cache: window starts of the epochs of the last batch

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, int64 (B, T) each, targets one token ahead."""
        starts = self.row_starts(step)
        if self.verify:
            self.verify(starts, self.context + 1)
        window = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.context + 1)].astype("i8"))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def epochs_in(self, steps: int) -> float:
        """Number of epochs in this number of steps."""
        return steps * self.rows / self.rows_per_epoch

    def row_starts(self, step: int) -> np.ndarray:
        """Start of each of this rank's rows in the token stream, (B,)."""
        return self.starts_of(step * self.rows + np.arange(self.rank, self.rows, self.world_size))

    def starts_of(self, row_numbers: np.ndarray) -> np.ndarray:
        """Start in the token stream of each of these rows."""
        epoch, index = np.divmod(row_numbers, self.rows_per_epoch)
        needed = np.unique(epoch).tolist()  # one or two; many if the text is shorter than a batch
        self.epochs = {e: self.epochs[e] if e in self.epochs else self.window_starts(e) for e in needed}
        return np.concatenate([self.epochs[e][index[epoch == e]] for e in needed])

    def window_starts(self, epoch: int) -> np.ndarray:
        """Starts of all windows of an epoch in their random order, (rows_per_epoch,)."""
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        offset = random.integers(self.max_offset + 1)
        return offset + random.permutation(self.rows_per_epoch) * self.context


def windows(tokens: np.ndarray, context: int, rows: int = 16) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Non-overlapping evaluation windows: every token except the first is a target exactly once.

    Yields (inputs, targets), int64 (B, T): batches of `rows` full windows, then a smaller batch, then the rest of the
    stream as one short window (1, < T).
    """
    if len(tokens) < 2:
        raise UserError(f"the held-out text has {len(tokens)} tokens, too few to score: give it more text")
    tokens = np.asarray(tokens)
    full = (len(tokens) - 1) // context * context  # targets in full windows
    for start in range(0, full, rows * context):
        end = min(start + rows * context, full)
        yield inputs_and_targets(tokens[start : end + 1], context)
    if full < len(tokens) - 1:
        yield inputs_and_targets(tokens[full:], len(tokens) - 1 - full)


def inputs_and_targets(tokens: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(tokens.astype("i8"))
    return ids[:-1].view(-1, context), ids[1:].view(-1, context)
