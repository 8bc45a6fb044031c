"""Checksums for the blocks of a large file.

A run does not have to read the whole file before it starts, and still never trains on damaged data.
"""

import hashlib
from pathlib import Path

import numpy as np

from nanoghost.errors import UserError

BLOCK = 2**20  # bytes per checksum


def file_checksums(path: Path, min_bytes: int) -> dict:
    """SHA-256 (hex) of a file ("sha256") and, if it has at least `min_bytes` bytes, of each block ("blocks")."""
    with open(path, "rb") as f:
        checksums = {"sha256": hashlib.file_digest(f, "sha256").hexdigest()}
        if path.stat().st_size >= min_bytes:
            f.seek(0)
            blocks = []
            while content := f.read(BLOCK):
                blocks.append(hashlib.sha256(content).hexdigest())
            checksums["blocks"] = blocks
    return checksums


class BlockChecksums:
    """Verifies the blocks of a file of tokens when they are first used."""

    def __init__(self, path: Path, expected: list[str], itemsize: int):
        """`expected` are the checksums of the blocks, `itemsize` is the number of bytes per token."""
        self.path, self.expected, self.itemsize = path, expected, itemsize
        self.verified = np.zeros(len(expected), bool)

    def check(self, positions: np.ndarray, count: int) -> None:
        """Verify the blocks that hold the `count` tokens from each position on. Raises UserError if one differs."""
        first_blocks = positions * self.itemsize // BLOCK
        last_blocks = ((positions + count) * self.itemsize - 1) // BLOCK
        needed: set[int] = set()
        for first, last in zip(first_blocks.tolist(), last_blocks.tolist()):
            needed.update(range(first, last + 1))
        for block in needed:
            if not self.verified[block]:
                self.verify(block)

    def verify(self, block: int) -> None:
        with open(self.path, "rb") as f:
            f.seek(block * BLOCK)
            content = f.read(BLOCK)
        if hashlib.sha256(content).hexdigest() != self.expected[block]:
            raise UserError(
                f"{self.path} is damaged: bytes {block * BLOCK} to {block * BLOCK + len(content)} differ from their"
                f" checksum. Nothing was trained on them. Remove {self.path.parent}: the next run makes it again"
            )
        self.verified[block] = True
