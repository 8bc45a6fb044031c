"""Read GGUF, the file format of llama.cpp: metadata fields, then tensors, most of them quantized.

GGUF files are untrusted input. The header is parsed here, and every count in it is compared with the number of bytes
that are left before anything is allocated. Tensor data is decoded by the `gguf` package of llama.cpp's authors.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from nanoghost.errors import UserError
from nanoghost.formats.file_kinds import check_content

READABLE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
# Metadata value types: the number in the file -> format character, which is the same in `struct` and in numpy.
NUMBER_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING_TYPE, ARRAY_TYPE = 8, 9
OLDER_MAGICS = (b"lmgg", b"fmgg", b"tjgg")  # GGML, GGMF and GGJT: little-endian numbers, so the letters are reversed
ALIGNMENTS = tuple(2**i for i in range(3, 21))  # the format allows multiples of 8; files have powers of two
# The fewest bytes that an entry of the header takes: the number of entries in the header is checked against them.
MIN_TENSOR_INFO_BYTES = 8 + 4 + 4 + 8  # length of the name, number of dimensions, type, offset
MIN_FIELD_BYTES = 8 + 4 + 1  # length of the key, type, value


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and how it is stored."""

    file: mmap.mmap
    """The file, in memory; a split model has several."""
    shape: tuple[int, ...]
    """Rows first, as in PyTorch (the file has the reverse order)."""
    type: GGMLQuantizationType
    start: int
    """Position of the first byte in the file."""
    size: int
    """Size in bytes."""


class GGUFFile:
    """Metadata fields and tensors of a GGUF file. Tensors are decoded one by one, when they are read.

    Any damage to the file raises UserError. A model may have several files: gguf_split.py.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as f:
                self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:  # mmap raises ValueError for an empty file
            raise UserError(f"cannot read {path}: {e}") from None
        self._position = 0
        check_content(path)
        magic = self._read_bytes(4)
        if magic in OLDER_MAGICS:
            raise self._error("it is in an older format, GGML: convert the original model with a current llama.cpp")
        if magic != b"GGUF":
            if self._bytes[7:9] == b"\0{":  # the length of a header in eight bytes, and its first brace
                raise self._error("it is a safetensors file: adopt the folder that it is in")
            raise self._error("it does not begin with 'GGUF'")
        version = self._read_number("I")
        if version and version % 2**16 == 0:
            raise self._error(
                "it is big-endian: `gguf-convert-endian FILE little`, which comes with the package gguf, converts it"
            )
        if version not in (2, 3):
            raise self._error(
                f"its version is {version}; nanoghost reads versions 2 and 3: convert the original model with a current"
                " llama.cpp"
            )
        tensor_count = self._read_count(MIN_TENSOR_INFO_BYTES)
        field_count = self._read_count(MIN_FIELD_BYTES)
        self.fields: dict = self._read_fields(field_count)
        self.tensors: dict[str, TensorInfo] = self._read_tensor_infos(tensor_count)

    def read_tensor(self, name: str) -> np.ndarray:
        """The values of a tensor in fp32."""
        info = self.tensors[name]
        raw = np.frombuffer(info.file, np.uint8, info.size, info.start)
        return gguf.quants.dequantize(raw, info.type).reshape(info.shape)

    # -- header -------------------------------------------------------------------------------------------------------

    def _read_fields(self, count: int) -> dict:
        fields = {}
        for _ in range(count):
            key = self._read_string()
            if key in fields:
                raise self._error(f"the field '{key}' occurs twice")
            fields[key] = self._read_value(self._read_number("I"))
        return fields

    def _read_tensor_infos(self, count: int) -> dict[str, TensorInfo]:
        entries = []
        for _ in range(count):
            name, dimensions = self._read_string(), self._read_number("I")
            if not 1 <= dimensions <= 4:
                raise self._error(f"tensor '{name}' has {dimensions} dimensions")
            reversed_shape = [self._read_number("Q") for _ in range(dimensions)]
            entries.append((name, tuple(reversed(reversed_shape)), self._read_number("I"), self._read_number("Q")))
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in ALIGNMENTS:
            raise self._error(f"its alignment is {alignment}")
        data_start = math.ceil(self._position / alignment) * alignment  # the header ends here
        tensors = {}
        for name, shape, type_number, offset in entries:
            if name in tensors:
                raise self._error(f"tensor '{name}' occurs twice")
            if offset % alignment:
                raise self._error(f"tensor '{name}' does not begin at a multiple of {alignment} bytes")
            tensors[name] = self._tensor_info(name, shape, type_number, data_start + offset)
        self._check_no_overlap(tensors)
        return tensors

    def _tensor_info(self, name: str, shape: tuple[int, ...], type_number: int, start: int) -> TensorInfo:
        types = {t.value: t for t in GGMLQuantizationType}
        tensor_type = types.get(type_number)
        if tensor_type is None or tensor_type.name not in READABLE_TYPES:
            type_name = tensor_type.name if tensor_type else type_number
            raise self._error(f"tensor '{name}' is stored as {type_name}, which nanoghost cannot decode")
        block_size, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if not all(shape):
            raise self._error(f"tensor '{name}' has the shape {shape}, which holds no values")
        if shape[-1] % block_size:
            raise self._error(
                f"tensor '{name}' has rows of {shape[-1]} values, not a multiple of the block size {block_size}"
            )
        info = TensorInfo(self._bytes, shape, tensor_type, start, math.prod(shape) // block_size * block_bytes)
        if info.start + info.size > len(self._bytes):
            raise self._error(
                f"it is cut off: tensor '{name}' needs {info.start + info.size} bytes, and the file has"
                f" {len(self._bytes)}; download it again"
            )
        return info

    def _check_no_overlap(self, tensors: dict[str, TensorInfo]) -> None:
        in_file_order = sorted(tensors, key=lambda name: (tensors[name].start, tensors[name].size))
        for name, next_name in pairwise(in_file_order):
            if tensors[next_name].start < tensors[name].start + tensors[name].size:
                raise self._error(f"tensors '{name}' and '{next_name}' overlap")

    # -- values -------------------------------------------------------------------------------------------------------

    def _error(self, reason: str) -> UserError:
        return UserError(f"cannot read {self.path} as a GGUF file: {reason}")

    def _read_bytes(self, count: int) -> bytes:
        if count > len(self._bytes) - self._position:
            raise self._error(f"it is cut off: it ends at byte {len(self._bytes)}, in its header; download it again")
        self._position += count
        return self._bytes[self._position - count : self._position]

    def _read_number(self, format_character: str):
        number_format = "<" + format_character
        return struct.unpack(number_format, self._read_bytes(struct.calcsize(number_format)))[0]

    def _read_count(self, min_bytes: int) -> int:
        """A number of entries, each of which takes at least `min_bytes`."""
        count = self._read_number("Q")
        if count * min_bytes > len(self._bytes) - self._position:
            raise self._error(f"its header has a count of {count} entries, more than fit into {len(self._bytes)} bytes")
        return count

    def _read_string(self) -> str:
        try:
            return self._read_bytes(self._read_number("Q")).decode()
        except UnicodeDecodeError:
            raise self._error("a string in it is not UTF-8") from None

    def _read_value(self, value_type: int):
        if value_type == STRING_TYPE:
            return self._read_string()
        if value_type == ARRAY_TYPE:
            return self._read_array(self._read_number("I"))
        if value_type not in NUMBER_TYPES:
            raise self._error(f"a value in it has the unknown type {value_type}")
        return self._read_number(NUMBER_TYPES[value_type])

    def _read_array(self, value_type: int) -> list[str] | np.ndarray:
        if value_type == STRING_TYPE:
            return [self._read_string() for _ in range(self._read_count(8))]
        if value_type not in NUMBER_TYPES:
            raise self._error(f"an array in it has values of the unknown type {value_type}")
        number_format = "<" + NUMBER_TYPES[value_type]
        number_bytes = struct.calcsize(number_format)
        count = self._read_count(number_bytes)
        return np.frombuffer(self._read_bytes(count * number_bytes), number_format)
