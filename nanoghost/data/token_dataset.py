"""The tokens of a data source on disk, memory-mapped: a file for each split.

    $NANOGHOST_HOME/data/plays-1f0c93ab/
        train.bin  val.bin  test.bin    token ids, little-endian, each document preceded by <|endoftext|>
        manifest.json                   source, license, tokenizer, counts and SHA-256 of the files

The name ends with a fingerprint of source and tokenizer: another text or another tokenizer gets another folder.
tokenize_source.py writes them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanoghost.data.batches import Batches
from nanoghost.data.block_checksums import BlockChecksums
from nanoghost.data.mixed_batches import MixedBatches
from nanoghost.data.sources import sha256_of
from nanoghost.errors import UserError
from nanoghost.home import read_json

FORMAT = 2


@dataclass(frozen=True)
class TokenDataset:
    """The token ids of the three splits of a source, in a folder."""

    folder: Path
    manifest: dict

    def tokens(self, split: str) -> np.ndarray:
        """All token ids of a split, (N,), memory-mapped."""
        count = self.manifest["splits"][split]["tokens"]
        if count == 0:
            return np.empty(0, self.manifest["dtype"])  # an empty file cannot be mapped
        return np.memmap(self.folder / f"{split}.bin", dtype=self.manifest["dtype"], mode="r")

    def verifier(self, split: str) -> Callable[[np.ndarray, int], None] | None:
        """A function (positions, count) that verifies the `count` tokens from each position on, before they are used.

        None if `open_token_dataset` has verified the whole file.
        """
        blocks = self.manifest["splits"][split].get("blocks")
        if blocks is None:
            return None
        return BlockChecksums(self.folder / f"{split}.bin", blocks, np.dtype(self.manifest["dtype"]).itemsize).check

    def batches(self, context: int, rows: int, seed: int, rank: int = 0, world_size: int = 1) -> Batches:
        """Batches of the training text; `rows` is the size of the global batch."""
        tokens, verify = self.tokens("train"), self.verifier("train")
        if "mixture" in self.manifest:
            return MixedBatches(tokens, self.manifest["mixture"], context, rows, seed, rank, world_size, verify)
        return Batches(tokens, context, rows, seed, rank, world_size, verify)

    def bytes(self, split: str) -> int:
        """Bytes of UTF-8 text in the split: the denominator of bits per byte."""
        return self.manifest["splits"][split]["bytes"]


def open_token_dataset(folder: Path) -> TokenDataset:
    """Open tokenized text and compare the files with the manifest. Raises UserError if one is damaged.

    Files that have block checksums are only compared in size here; `TokenDataset.verifier` verifies their content.
    """
    remedy = f"remove {folder}, and the next run tokenizes the text again"
    if not (folder / "manifest.json").exists():
        raise UserError(f"{folder} has no manifest.json: {remedy}")
    manifest = read_json(folder / "manifest.json")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder} has format {manifest['format']}, not {FORMAT}: {remedy}")
    for split, entry in manifest["splits"].items():
        file = folder / f"{split}.bin"
        actual_size = file.stat().st_size if file.exists() else -1
        expected_size = entry["tokens"] * np.dtype(manifest["dtype"]).itemsize
        damaged = actual_size != expected_size
        if not damaged and "blocks" not in entry:
            damaged = sha256_of(file) != entry["sha256"]
        if damaged:
            raise UserError(f"{file} is damaged (it differs from manifest.json): {remedy}")
    return TokenDataset(folder, manifest)
