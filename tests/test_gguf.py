"""GGUF: read as it was written, and nothing that is wrong gets through."""

import random
import struct

import gguf
import numpy as np
import pytest

from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile, READABLE_TYPES

WRITABLE = [k for k in READABLE_TYPES if not k.endswith("_K")]


@pytest.fixture
def small(tmp_path):
    """A file with a value of every kind and a tensor of every kind that can be written."""
    path = tmp_path / "small.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint32("llama.block_count", 2)
    w.add_float32("llama.eps", 0.5)
    w.add_bool("yes", True)
    w.add_string("name", "naïve")
    w.add_array("words", ["a", "", "ö"])
    w.add_array("numbers", [1, -2, 3])
    rng = np.random.default_rng(0)
    written = {}
    for kind in WRITABLE:
        number = gguf.GGMLQuantizationType[kind]
        x = rng.standard_normal((3, 64)).astype(np.float32)
        raw = gguf.quants.quantize(x, number)
        w.add_tensor(kind, raw, raw_dtype=number)
        written[kind] = (x, gguf.quants.dequantize(raw, number))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path, written


def test_what_is_written_is_read(small):
    path, written = small
    g = GGUFFile(path)
    assert g.fields["general.architecture"] == "llama" and g.fields["llama.block_count"] == 2
    assert (g.fields["llama.eps"], g.fields["yes"], g.fields["name"]) == (0.5, True, "naïve")
    assert (g.fields["words"], g.fields["numbers"].tolist()) == (["a", "", "ö"], [1, -2, 3])
    assert list(g.tensors) == WRITABLE
    for kind, (x, rounded) in written.items():
        assert np.array_equal(g.read_tensor(kind), rounded.reshape(3, 64))
        assert np.abs(g.read_tensor(kind) - x).max() < 0.4, kind
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert {n: (t.start, t.size) for n, t in g.tensors.items()} == {
        n: (int(t.data_offset), int(t.n_bytes)) for n, t in theirs.items()
    }


def test_a_file_cut_anywhere_is_refused(small):
    path, _ = small
    whole = path.read_bytes()
    end = max(t.start + t.size for t in GGUFFile(path).tensors.values())  # behind it is only padding
    for length in [*range(0, 1200, 7), *range(1200, end, 61), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            GGUFFile(path)


def test_absurd_counts_are_refused_before_memory_is_taken(small):
    path, _ = small
    whole = path.read_bytes()
    for place in (8, 16, 24):  # tensors, fields, the length of the first key
        for count in (2**63, 2**40, 2**32):
            path.write_bytes(whole[:place] + struct.pack("<Q", count) + whole[place + 8 :])
            with pytest.raises(UserError):
                GGUFFile(path)


def test_no_damage_does_more_than_raise(small):
    """Some bytes changed anywhere: either it is refused, or all tensors can be read within the file."""
    path, _ = small
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(1100)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(damaged)
        try:
            g = GGUFFile(path)
            with np.errstate(all="ignore"):
                for name in g.tensors:
                    g.read_tensor(name)
        except UserError:
            refused += 1
    assert 100 < refused < 600


# ── K-quants: the library can only read them, so they are held to the slow loops of their definition ────────────────


def scales_and_mins(packed):
    """The eight scales and mins of six bits each that twelve bytes hold."""
    low = [(packed[j] & 63, packed[j + 4] & 63) for j in range(4)]
    high = [
        ((packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4), (packed[j + 4] >> 4) | (packed[j] >> 6 << 4))
        for j in range(4, 8)
    ]
    return low + high


def q4_k(block, fifth=None):
    d, dmin = np.frombuffer(block[:4], np.float16).astype(np.float32)
    low = block[16:144] if fifth is None else block[48:176]
    x = np.zeros(256, np.float32)
    for i in range(256):
        group, inside = divmod(i, 32)
        byte = low[group // 2 * 32 + inside]
        q = byte >> 4 if group % 2 else byte & 15
        if fifth is not None:
            q += 16 * (fifth[inside] >> group & 1)
        scale, least = scales_and_mins(block[4:16])[group]
        x[i] = d * np.float32(scale) * np.float32(q) - dmin * np.float32(least)
    return x


def q5_k(block):
    return q4_k(block, fifth=block[16:48])


def q6_k(block):
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    d = np.frombuffer(block[208:], np.float16).astype(np.float32)[0]
    x = np.zeros(256, np.float32)
    for i in range(256):
        half, rest = divmod(i, 128)
        quarter, inside = divmod(rest, 32)
        four = low[half * 64 + quarter % 2 * 32 + inside] >> (4 * (quarter // 2)) & 15
        two = high[half * 32 + inside] >> (2 * quarter) & 3
        x[i] = d * np.float32(scales[i // 16]) * np.float32(int(four | two << 4) - 32)
    return x


@pytest.mark.parametrize(
    ("kind", "slow", "halves"), [("Q4_K", q4_k, (0, 2)), ("Q5_K", q5_k, (0, 2)), ("Q6_K", q6_k, (208,))]
)
def test_k_quants_are_read_as_they_are_defined(tmp_path, kind, slow, halves):
    number = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[number][1]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2 * size), np.uint8)
    for block in raw.reshape(-1, size):
        for at in halves:  # any bytes are a block, but those that scale it are numbers of half precision
            block[at : at + 2] = np.array([0.01 * (at + 1)], np.float16).view(np.uint8)
    path = tmp_path / "k.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_tensor("x", raw, raw_dtype=number)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    expected = np.stack([slow(block.tobytes()) for block in raw.reshape(-1, size)]).reshape(3, 512)
    assert np.allclose(GGUFFile(path).read_tensor("x"), expected, rtol=1e-6, atol=1e-6)
