"""Reading GGUF files: against llama.cpp's library, with damage anywhere, and K-quants against their definition."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import READABLE_TYPES, GGUFFile

WRITABLE_TYPES = [name for name in READABLE_TYPES if not name.endswith("_K")]


def write_file(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> tuple[Path, dict]:
    """(path, {type: (values, values after quantization)}).

    The file has a field of every kind and a tensor of every type that the library can write.
    """
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 0.5)
    writer.add_bool("yes", True)
    writer.add_string("name", "naïve")
    writer.add_array("words", ["a", "", "ö"])
    writer.add_array("numbers", [1, -2, 3])
    rng = np.random.default_rng(0)
    expected = {}
    for name in WRITABLE_TYPES:
        tensor_type = gguf.GGMLQuantizationType[name]
        values = rng.standard_normal((3, 64)).astype(np.float32)
        raw = gguf.quants.quantize(values, tensor_type)
        writer.add_tensor(name, raw, raw_dtype=tensor_type)
        expected[name] = (values, gguf.quants.dequantize(raw, tensor_type).reshape(3, 64))
    write_file(writer)
    return path, expected


@pytest.fixture
def whole(small_file) -> bytes:
    path, _ = small_file
    return path.read_bytes()


def test_fields_are_read_as_written(small_file):
    path, _ = small_file
    fields = GGUFFile(path).fields
    assert fields["general.architecture"] == "llama"
    assert fields["llama.block_count"] == 2
    assert fields["llama.eps"] == 0.5
    assert fields["yes"] is True
    assert fields["name"] == "naïve"
    assert fields["words"] == ["a", "", "ö"]
    assert fields["numbers"].tolist() == [1, -2, 3]


def test_tensors_are_decoded_as_by_the_library(small_file):
    path, expected = small_file
    file = GGUFFile(path)
    assert list(file.tensors) == WRITABLE_TYPES
    for name, (values, quantized) in expected.items():
        assert np.array_equal(file.read_tensor(name), quantized)
        assert np.abs(file.read_tensor(name) - values).max() < 0.4, name


def test_tensor_positions_are_those_of_the_library(small_file):
    path, _ = small_file
    expected = {t.name: (int(t.data_offset), int(t.n_bytes)) for t in gguf.GGUFReader(path).tensors}
    assert {name: (info.start, info.size) for name, info in GGUFFile(path).tensors.items()} == expected


def test_a_truncated_file_is_refused(small_file, whole, tmp_path):
    path, _ = small_file
    end = max(info.start + info.size for info in GGUFFile(path).tensors.values())  # only padding follows
    truncated = tmp_path / "truncated.gguf"
    for length in [*range(0, 1200, 7), *range(1200, end, 61), end - 1]:
        truncated.write_bytes(whole[:length])
        with pytest.raises(UserError):
            GGUFFile(truncated)


@pytest.mark.parametrize("position", [8, 16, 24], ids=["tensor count", "field count", "length of the first key"])
@pytest.mark.parametrize("count", [2**63, 2**40, 2**32])
def test_absurd_counts_are_refused_before_memory_is_allocated(whole, tmp_path, position, count):
    path = tmp_path / "absurd.gguf"
    path.write_bytes(whole[:position] + struct.pack("<Q", count) + whole[position + 8 :])
    with pytest.raises(UserError):
        GGUFFile(path)


def test_changed_header_bytes_are_refused_or_harmless(whole, tmp_path):
    """Either the file is refused, or every tensor can be read without leaving the file."""
    path, rng = tmp_path / "damaged.gguf", random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(1100)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            with np.errstate(all="ignore"):
                for name in file.tensors:
                    file.read_tensor(name)
        except UserError:
            refused += 1
    assert 100 < refused < 600


# ── K-quants: the library cannot write them, so they are compared with slow loops that follow their definition ──────


def unpack_scales_and_mins(packed):
    """Eight pairs of six-bit numbers from twelve bytes."""
    low = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    high = [
        ((packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4))
        for j in range(4, 8)
    ]
    return low + high


def decode_q4_k(block, fifth_bits=None):
    d, dmin = np.frombuffer(block[:4], np.float16).astype(np.float32)
    low_bits = block[16:144] if fifth_bits is None else block[48:176]
    x = np.zeros(256, np.float32)
    for i in range(256):
        group, position = divmod(i, 32)
        byte = low_bits[group // 2 * 32 + position]
        q = byte >> 4 if group % 2 else byte & 15
        if fifth_bits is not None:
            q += 16 * (fifth_bits[position] >> group & 1)
        scale, minimum = unpack_scales_and_mins(block[4:16])[group]
        x[i] = d * np.float32(scale) * np.float32(q) - dmin * np.float32(minimum)
    return x


def decode_q5_k(block):
    return decode_q4_k(block, fifth_bits=block[16:48])


def decode_q6_k(block):
    low_bits, high_bits, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d = np.frombuffer(block[208:], np.float16).astype(np.float32)[0]
    x = np.zeros(256, np.float32)
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, position = divmod(rest, 32)
        four_bits = low_bits[half * 64 + quarter % 2 * 32 + position] >> (4 * (quarter // 2)) & 15
        two_bits = high_bits[half * 32 + position] >> (2 * quarter) & 3
        x[i] = d * np.float32(scales[i // 16]) * np.float32(int(four_bits | two_bits << 4) - 32)
    return x


@pytest.mark.parametrize(
    ("type_name", "decode_block", "float16_positions"),
    [("Q4_K", decode_q4_k, (0, 2)), ("Q5_K", decode_q5_k, (0, 2)), ("Q6_K", decode_q6_k, (208,))],
)
def test_k_quants_are_decoded_by_their_definition(tmp_path, type_name, decode_block, float16_positions):
    tensor_type = gguf.GGMLQuantizationType[type_name]
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2 * block_bytes), np.uint8)
    for block in raw.reshape(-1, block_bytes):
        for position in float16_positions:  # any bytes are a valid block, except for the scales in half precision
            block[position : position + 2] = np.array([0.01 * (position + 1)], np.float16).view(np.uint8)
    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", raw, raw_dtype=tensor_type)
    write_file(writer)
    expected = [decode_block(block.tobytes()) for block in raw.reshape(-1, block_bytes)]
    assert np.allclose(GGUFFile(path).read_tensor("x"), np.stack(expected).reshape(3, 512), rtol=1e-6, atol=1e-6)
