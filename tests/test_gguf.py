"""GGUF: read as it was written, and nothing that is wrong gets through."""

import random
import struct

import gguf
import numpy as np
import pytest

from nanoghost.errors import UserError
from nanoghost.model.gguf import GGUF, READABLE

WRITABLE = [k for k in READABLE if not k.endswith("_K")]


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
    g = GGUF(path)
    assert g.fields["general.architecture"] == "llama" and g.fields["llama.block_count"] == 2
    assert (g.fields["llama.eps"], g.fields["yes"], g.fields["name"]) == (0.5, True, "naïve")
    assert (g.fields["words"], g.fields["numbers"].tolist()) == (["a", "", "ö"], [1, -2, 3])
    assert list(g.tensors) == WRITABLE
    for kind, (x, rounded) in written.items():
        assert np.array_equal(g.tensor(kind), rounded.reshape(3, 64))
        assert np.abs(g.tensor(kind) - x).max() < 0.4, kind
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert {n: (t.start, t.size) for n, t in g.tensors.items()} == {
        n: (int(t.data_offset), int(t.n_bytes)) for n, t in theirs.items()
    }


def test_a_file_cut_anywhere_is_refused(small):
    path, _ = small
    whole = path.read_bytes()
    end = max(t.start + t.size for t in GGUF(path).tensors.values())  # behind it is only padding
    for length in [*range(0, 1200, 7), *range(1200, end, 61), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            GGUF(path)


def test_absurd_counts_are_refused_before_memory_is_taken(small):
    path, _ = small
    whole = path.read_bytes()
    for place in (8, 16, 24):  # tensors, fields, the length of the first key
        for count in (2**63, 2**40, 2**32):
            path.write_bytes(whole[:place] + struct.pack("<Q", count) + whole[place + 8 :])
            with pytest.raises(UserError):
                GGUF(path)


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
            g = GGUF(path)
            with np.errstate(all="ignore"):
                for name in g.tensors:
                    g.tensor(name)
        except UserError:
            refused += 1
    assert 100 < refused < 600
