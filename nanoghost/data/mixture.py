"""Several sources by weight: `--data plays=0.7,./notes=0.3` takes 7 of 10 rows from the plays, however long either is.

Each source keeps its own epochs, so a short one comes round more often. Which source a row is from depends on the seed and
the row's number alone, as all else about batches: exactly by weight in every thousand rows, in random order.
"""

import shutil
from itertools import chain, islice
from pathlib import Path

import numpy as np

from nanoghost.data.batches import Batches
from nanoghost.data.block_checksums import sums_of
from nanoghost.data.shards import CHECKED_BYTES, Shards, open_shards, tokenise
from nanoghost.data.sources import SPLITS, Source, fingerprint, folder_name, open_source
from nanoghost.errors import UserError
from nanoghost.home import exclusive_lock, write_json

BLOCK = 1000
"""Rows in which the weights hold exactly."""


def open_mixture(spec: str) -> Source:
    """A source by "NAME=WEIGHT,NAME=WEIGHT ...", of which each part can be all that `--data` names."""
    names, weights = zip(
        *((name, float(weight)) for name, _, weight in (part.rpartition("=") for part in spec.split(",")))
    )
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"'{spec}' is no mixture: name two or more different sources, as in plays=0.7,./notes=0.3")
    if min(weights) * BLOCK < sum(weights):
        raise UserError(f"'{spec}': every weight must be at least a thousandth of their sum")
    parts = tuple(zip(map(open_source, names), weights))
    return Source(
        name=folder_name("-".join(source.name for source, _ in parts))[:60],
        license="; ".join(dict.fromkeys(source.license for source, _ in parts)),
        attribution="; ".join(f"{weight / sum(weights):.1%} {source.attribution}" for source, weight in parts),
        fingerprint=fingerprint(
            (str(weight / sum(weights)), bytes.fromhex(source.fingerprint)) for source, weight in parts
        ),
        documents=lambda skip=0: islice(chain.from_iterable(source.documents() for source, _ in parts), skip, None),
        parts=parts,
    )


def tokenise_mixture(source: Source, tokenizer, folder: Path) -> Shards:
    """Shards of the parts, one after the other in one file, and where each begins."""
    if not folder.exists():
        parts = [tokenise(part, tokenizer) for part, _ in source.parts]
        with exclusive_lock(folder.parent):
            if not folder.exists():
                partial = folder.with_name(".partial-mixture")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                join(partial, source, parts)
                partial.rename(folder)
    return open_shards(folder)


def join(folder: Path, source: Source, parts: list[Shards]) -> None:
    first = parts[0].manifest
    splits = {}
    for split in SPLITS:
        with open(folder / f"{split}.bin", "wb") as whole:
            for part in parts:
                with open(part.folder / f"{split}.bin", "rb") as f:
                    shutil.copyfileobj(f, whole)
        figures = [part.manifest["splits"][split] for part in parts]
        splits[split] = {key: sum(f[key] for f in figures) for key in ("tokens", "bytes", "documents")}
        splits[split] |= sums_of(folder / f"{split}.bin", CHECKED_BYTES)
    about = {key: getattr(source, key) for key in ("name", "fingerprint", "license", "attribution")}
    mixture = [
        {"source": part.manifest["source"], "weight": weight, "tokens": part.manifest["splits"]["train"]["tokens"]}
        for part, (_, weight) in zip(parts, source.parts)
    ]
    write_json(folder / "manifest.json", first | {"source": about, "splits": splits, "mixture": mixture})


class MixedBatches(Batches):
    """Batches of which each source has its share of rows."""

    def __init__(self, tokens: np.ndarray, mixture: list[dict], context: int, rows: int, seed: int, *ranks, check=None):
        super().__init__(tokens, context, rows, seed, *ranks, check=check)
        ends = np.cumsum([part["tokens"] for part in mixture])
        self.offsets = ends - [part["tokens"] for part in mixture]
        self.parts = [Batches(self.tokens[start:end], context, 1, seed) for start, end in zip(self.offsets, ends)]
        self.quotas = quotas([part["weight"] for part in mixture])
        self.blocks = {}  # the blocks that the last batch touched

    def starts(self, row: np.ndarray) -> np.ndarray:
        block, place = np.divmod(row, BLOCK)
        touched = np.unique(block).tolist()
        self.blocks = {b: self.blocks[b] if b in self.blocks else self.dealt(b) for b in touched}
        found = np.empty(len(row), np.int64)
        part, index = (
            np.array([self.blocks[b][which][p] for b, p in zip(block.tolist(), place.tolist())]) for which in (0, 1)
        )
        for p in np.unique(part).tolist():
            found[part == p] = self.offsets[p] + self.parts[p].starts(index[part == p])
        return found

    def epochs_in(self, steps: int) -> float:
        """How often so many steps read what a row is from, on average over the rows."""
        shares = self.quotas / BLOCK
        return sum(share * steps * self.rows * share / part.rows_per_epoch for share, part in zip(shares, self.parts))

    def dealt(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a block its part, and its number among all rows of that part, [BLOCK] each."""
        part = np.random.Generator(np.random.PCG64([self.seed, block])).permutation(
            np.repeat(np.arange(len(self.quotas)), self.quotas)
        )
        index = np.empty(BLOCK, np.int64)
        for p, quota in enumerate(self.quotas):
            index[part == p] = block * quota + np.arange(quota)
        return part, index


def quotas(weights: list[float]) -> np.ndarray:
    """Rows of a block for each part, by largest remainders: they sum to BLOCK and are less than one row from the weights."""
    exact = np.array(weights) / sum(weights) * BLOCK
    rows = np.floor(exact).astype(int)
    rows[np.argsort(rows - exact, kind="stable")[: BLOCK - rows.sum()]] += 1
    return rows
