"""Checksums of the parts of a large file, so that a run need not read all of it before it starts, and never learns what is damaged."""

import hashlib
from pathlib import Path

import numpy as np

from nanoghost.errors import UserError

BLOCK = 2**20  # bytes to a checksum


def sums_of(path: Path, large: int) -> dict:
    """SHA-256 (hex) of a file, and of each of its blocks if it has at least `large` bytes."""
    with open(path, "rb") as f:
        sums = {"sha256": hashlib.file_digest(f, "sha256").hexdigest()}
        if path.stat().st_size >= large:
            f.seek(0)
            sums["blocks"] = [hashlib.sha256(block).hexdigest() for block in iter(lambda: f.read(BLOCK), b"")]
    return sums


class Blocks:
    def __init__(self, path: Path, expected: list[str], itemsize: int):
        self.path, self.expected, self.itemsize = path, expected, itemsize
        self.known = np.zeros(len(expected), bool)

    def check(self, positions: np.ndarray, count: int) -> None:
        """Raises UserError if a block that holds one of the `count` tokens from a position on differs from its checksum."""
        first = positions * self.itemsize // BLOCK
        last = ((positions + count) * self.itemsize - 1) // BLOCK
        for block in {b for a, z in zip(first.tolist(), last.tolist()) for b in range(a, z + 1) if not self.known[b]}:
            with open(self.path, "rb") as f:
                f.seek(block * BLOCK)
                content = f.read(BLOCK)
            if hashlib.sha256(content).hexdigest() != self.expected[block]:
                raise UserError(
                    f"{self.path} is damaged: bytes {block * BLOCK} to {block * BLOCK + len(content)} differ from their checksum;"
                    f" nothing of them was learned. Remove {self.path.parent}, it is made anew"
                )
            self.known[block] = True
