"""GGUF, the file of llama.cpp: metadata, then tensors, most of them quantised.

Such files come from strangers. The header is parsed here, and every count is held against the bytes that are left before
anything is made of it; the numbers behind it are decoded by the library of llama.cpp's authors.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from nanoghost.errors import UserError

READABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """Rows first, as in PyTorch (the file has it the other way round)."""
    kind: GGMLQuantizationType
    start: int
    size: int
    """Bytes."""


class GGUF:
    """A file's metadata, and its tensors by name; nothing is decoded until it is asked for.

    Anything wrong with the file raises UserError.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as f:
                self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:  # mmap calls an empty file a ValueError
            raise UserError(f"cannot read {path}: {e}") from None
        self._at = 0
        if self._take(4) != b"GGUF":
            raise self._bad("it does not begin with 'GGUF'")
        version = self._number("I")
        if version not in (2, 3):
            raise self._bad(f"its version is {version}; nanoghost reads 2 and 3")
        tensors, fields = self._count(24), self._count(13)
        self.fields: dict = {}
        for _ in range(fields):
            key = self._text()
            if key in self.fields:
                raise self._bad(f"'{key}' is there twice")
            self.fields[key] = self._value(self._number("I"))
        self.tensors = self._directory(tensors)

    def tensor(self, name: str) -> np.ndarray:
        """The numbers of a tensor, fp32."""
        t = self.tensors[name]
        raw = np.frombuffer(self._bytes, np.uint8, t.size, t.start)
        return gguf.quants.dequantize(raw, t.kind).reshape(t.shape)

    def _directory(self, count: int) -> dict[str, Tensor]:
        found = []
        for _ in range(count):
            name, dimensions = self._text(), self._number("I")
            if not 1 <= dimensions <= 4:
                raise self._bad(f"tensor '{name}' has {dimensions} dimensions")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            found.append((name, shape, self._number("I"), self._number("Q")))
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in (2**i for i in range(3, 21)):
            raise self._bad(f"its alignment is {alignment}")
        data = -(-self._at // alignment) * alignment
        names = {kind.value: kind for kind in GGMLQuantizationType}
        tensors = {}
        for name, shape, number, offset in found:
            kind = names.get(number)
            if kind is None or kind.name not in READABLE:
                raise self._bad(f"tensor '{name}' is stored as {kind.name if kind else number}, which is not read here")
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if shape[-1] % block or not all(shape):
                raise self._bad(f"the rows of tensor '{name}', {shape[-1]} long, are no whole blocks of {block}")
            t = Tensor(shape, kind, data + offset, math.prod(shape) // block * block_bytes)
            if offset % alignment or t.start + t.size > len(self._bytes):
                raise self._bad(f"tensor '{name}' lies outside of the file's {len(self._bytes)} bytes")
            if name in tensors:
                raise self._bad(f"tensor '{name}' is there twice")
            tensors[name] = t
        in_order = sorted((t.start, t.start + t.size, name) for name, t in tensors.items())
        for (_, end, name), (start, _, other) in zip(in_order, in_order[1:]):
            if start < end:
                raise self._bad(f"tensors '{name}' and '{other}' overlap")
        return tensors

    # ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _bad(self, why: str) -> UserError:
        return UserError(f"{self.path} is no GGUF file that can be read: {why}")

    def _take(self, count: int) -> bytes:
        if count > len(self._bytes) - self._at:
            raise self._bad(f"it ends at byte {len(self._bytes)}, in the middle of its header")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def _number(self, form: str):
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._number("Q")
        if count * least > len(self._bytes) - self._at:
            raise self._bad(f"it announces {count} entries, more than {len(self._bytes)} bytes can hold")
        return count

    def _text(self) -> str:
        try:
            return self._take(self._number("Q")).decode()
        except UnicodeDecodeError:
            raise self._bad("a text in it is not UTF-8") from None

    def _value(self, kind: int):
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            inner = self._number("I")
            if inner == STRING:
                return [self._text() for _ in range(self._count(8))]
            if inner not in NUMBERS:
                raise self._bad(f"an array in it holds values of kind {inner}")
            form = NUMBERS[inner]  # the same letters in struct and numpy
            count = self._count(struct.calcsize("<" + form))
            return np.frombuffer(self._take(count * struct.calcsize("<" + form)), "<" + form)
        if kind not in NUMBERS:
            raise self._bad(f"a value in it is of kind {kind}")
        return self._number(NUMBERS[kind])
