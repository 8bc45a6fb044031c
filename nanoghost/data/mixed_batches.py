"""Batches of a mixture: each row comes from one source. Each source has its own epochs: a short one repeats more often.

The source of a row depends on the seed and the row's number alone. In each block of BLOCK rows the sources have exactly
their weights, in random order.
"""

from dataclasses import dataclass

import numpy as np

from nanoghost.data.batches import Batches

BLOCK = 1000
"""Number of rows in which the weights hold exactly."""


@dataclass(frozen=True)
class RowAssignment:
    """The sources of the rows of one block, shape (BLOCK,) each."""

    source: np.ndarray
    """Index of the row's source."""
    row_in_source: np.ndarray
    """Number of the row among all rows of its source, from the start of the run."""


class MixedBatches(Batches):
    """Batches whose rows come from several token streams, by weight."""

    def __init__(
        self,
        tokens: np.ndarray,
        mixture: list[dict],
        context: int,
        rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        verify=None,
    ):
        """`tokens` of all sources, one after the other; `mixture` has "tokens" (a number) and "weight" of each."""
        super().__init__(tokens, context, rows, seed, rank, world_size, verify)
        ends = np.cumsum([source["tokens"] for source in mixture])
        self.offsets = ends - [source["tokens"] for source in mixture]
        self.sources = [Batches(self.tokens[start:end], context, 1, seed) for start, end in zip(self.offsets, ends)]
        self.quotas = rows_per_block([source["weight"] for source in mixture])
        self.blocks: dict[int, RowAssignment] = {}  # cache: the blocks of the last batch

    def starts_of(self, row_numbers: np.ndarray) -> np.ndarray:
        block, index_in_block = np.divmod(row_numbers, BLOCK)
        self.cache_blocks(np.unique(block).tolist())
        source = np.empty(len(row_numbers), np.int64)
        row_in_source = np.empty(len(row_numbers), np.int64)
        for number, assignment in self.blocks.items():
            in_block = block == number
            source[in_block] = assignment.source[index_in_block[in_block]]
            row_in_source[in_block] = assignment.row_in_source[index_in_block[in_block]]
        starts = np.empty(len(row_numbers), np.int64)
        for i in np.unique(source).tolist():
            from_source = source == i
            starts[from_source] = self.offsets[i] + self.sources[i].starts_of(row_in_source[from_source])
        return starts

    def epochs_in(self, steps: int) -> float:
        """How often `steps` steps read the source of a row, averaged over the rows."""
        # A fraction w of the rows comes from a source, which is thus read w * steps * rows / rows_per_epoch times.
        weights = self.quotas / BLOCK
        return sum(w * steps * self.rows * w / source.rows_per_epoch for w, source in zip(weights, self.sources))

    def cache_blocks(self, numbers: list[int]) -> None:
        self.blocks = {n: self.blocks[n] if n in self.blocks else self.assign_rows(n) for n in numbers}

    def assign_rows(self, block: int) -> RowAssignment:
        random = np.random.Generator(np.random.PCG64([self.seed, block]))
        source = random.permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
        row_in_source = np.empty(BLOCK, np.int64)
        for i, quota in enumerate(self.quotas):
            row_in_source[source == i] = block * quota + np.arange(quota)
        return RowAssignment(source, row_in_source)


def rows_per_block(weights: list[float]) -> np.ndarray:
    """Number of rows of each source in a block, by largest remainders.

    Their sum is BLOCK, and each differs from its exact share by less than one row.
    """
    exact = np.array(weights) / sum(weights) * BLOCK
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: BLOCK - rows.sum()]] += 1
    return rows
