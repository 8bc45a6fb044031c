"""Models from strangers: whatever is wrong with their files ends in one line, and leaves nothing behind."""

import copy
import json
import random
import resource
import shutil

import gguf
import numpy as np
import pytest
import torch

from nanoghost.commands import adopt
from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.home import home
from nanoghost.model.llama import Llama, LlamaConfig
from nanoghost.tokenizer.jinja_template import Dialect
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import TOY_TEMPLATE, toy_text

STRANGE = (
    None, 0, -1, 1, 3, 7, 2**31, 2**62, 0.0, -2.5, 1e30, float("nan"), float("inf"), True, "", "x", "linear", "yarn", "\x1b[2J\n",
    ["a", "b"], [1, 2, 3], [0.5], {}, [], {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 0}, {"type": []}, [[]],
)  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    """A tiny model in Hugging Face's form."""
    folder = tmp_path / "theirs"
    tokenizer = Tokenizer.train([toy_text(200)], 300)
    tokenizer.dialect = Dialect(TOY_TEMPLATE, tokenizer.names, {tokenizer.special("<|im_end|>")})
    save_model(folder, Llama(LlamaConfig(tokenizer.vocab_size, 32, 2, 32, 4, 2, 48)), tokenizer)
    return folder


@pytest.fixture
def their_gguf(theirs, nanoghost, tmp_path):
    assert nanoghost("adopt", theirs, "--name", "whole")[0] == 0
    assert nanoghost("export", "whole", "--gguf", "--quant", "f32", "--out", tmp_path / "whole.gguf")[0] == 0
    shutil.rmtree(home() / "models" / "whole")
    return tmp_path / "whole.gguf"


def outcome(source) -> str:
    """What became of adopting it: the refusal, or "" if the model runs."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        adopt.main(adopt.AdoptSettings(str(source), "damaged"))
    except UserError as e:
        assert str(e).isprintable(), repr(str(e))
        assert not list((home() / "models").iterdir()), "something half-written"
        return str(e)
    finally:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "memory was taken"
    model, _ = load_model(home() / "models" / "damaged", torch.float32)
    with torch.no_grad():
        model(torch.tensor([[1]]))
    shutil.rmtree(home() / "models" / "damaged")
    return ""


def write_gguf(path, fields: dict, tensors: dict) -> None:
    """As llama.cpp's library writes, except that any value may be anything."""
    kinds = {str: "STRING", bool: "BOOL", int: "INT64", float: "FLOAT64", list: "ARRAY"}
    w = gguf.GGUFWriter(path, "llama")
    w.kv_data = [{}]
    for key, value in fields.items():
        w.add_key_value(key, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, x in tensors.items():
        w.add_tensor(name, np.ascontiguousarray(x))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_a_gguf_of_any_wrong_settings(their_gguf, tmp_path):
    g, rng = GGUFFile(their_gguf), random.Random(0)
    fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in g.fields.items()}
    tensors = {name: g.read_tensor(name) for name in g.tensors}
    optional = {"llama.attention.head_count_kv", "llama.rope.scaling.type", "llama.rope.scaling.factor"}
    values = [v for v in STRANGE if v is None or not isinstance(v, dict) and v not in ([], [[]])]
    path, refused, cases = tmp_path / "damaged.gguf", 0, 0
    assert outcome(their_gguf) == ""
    for key in [*fields, *optional, "llama.attention.sliding_window", "tokenizer.ggml.eot_token_id"]:
        for value in rng.sample(values, 5):
            damaged = {k: v for k, v in (fields | {key: value}).items() if v is not None}
            if rng.random() < 0.2:
                damaged.pop(rng.choice(list(damaged)))
            write_gguf(path, damaged, tensors)
            refused, cases = refused + bool(outcome(path)), cases + 1
    assert refused > cases / 2


def test_a_gguf_of_wrong_tensors(their_gguf, tmp_path):
    g = GGUFFile(their_gguf)
    fields = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in g.fields.items()}
    tensors = {name: g.read_tensor(name) for name in g.tensors}
    path = tmp_path / "damaged.gguf"
    for name, x in tensors.items():
        others = {name: x.T[:, ::2].copy() if x.ndim == 2 else x[::2]}
        for damaged in (tensors | others, {k: v for k, v in tensors.items() if k != name}, tensors | {name + "\n": x}):
            write_gguf(path, fields, damaged)
            # a file without a head is one whose head is the embedding
            assert outcome(path) or (name == "output.weight" and name not in damaged)
    write_gguf(path, fields, tensors | {"rope_freqs.weight": np.zeros(4, np.float32)})
    assert "RoPE scaling" in outcome(path)


def places(value, path=()):
    """The way to each value inside of JSON."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(inside)[:40]:
        yield from places(inner, (*path, key))


def changed(said, path, value):
    """Another value at that place; None takes it out."""
    if not path:
        return value
    said = copy.deepcopy(said)
    inside = said
    for key in path[:-1]:
        inside = inside[key]
    if value is None and isinstance(inside, dict):
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return said


@pytest.mark.parametrize(
    ("file", "cases"),
    [("config.json", 120), ("tokenizer_config.json", 60), ("generation_config.json", 40), ("tokenizer.json", 80)],
)
def test_a_folder_with_anything_anywhere(theirs, file, cases):
    rng, whole = random.Random(file), (theirs / file).read_text()
    said, refused = json.loads(whole), 0
    ways = list(places(said))
    for _ in range(cases):
        (theirs / file).write_text(json.dumps(changed(said, rng.choice(ways), rng.choice(STRANGE))))
        refused += bool(outcome(theirs))
    assert refused > cases / 4
    for damaged in (whole[: len(whole) // 2], "", "[" * 100000, "\x00", "[]", "null"):
        (theirs / file).write_text(damaged)
        assert outcome(theirs), damaged[:9]
    (theirs / file).write_bytes(b"\xff" + whole.encode())
    assert outcome(theirs)


def test_weights_cut_or_changed(theirs):
    path, rng = theirs / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for length in (0, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert outcome(theirs)
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] = rng.choice(b'019"{}[],:FIa\x00\xff')
        path.write_bytes(damaged)
        refused += bool(outcome(theirs))
    assert refused > 80
    path.unlink()
    assert "model.safetensors" in outcome(theirs)


def test_an_index_that_leads_nowhere(theirs):
    index = theirs / "model.safetensors.index.json"
    for said in ({}, {"weight_map": 3}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "gone.safetensors"}},
                 {"weight_map": {"a": "../model.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}},
                 {"weight_map": {"a": "config.json"}}, {"weight_map": {"a": ".."}}, {"weight_map": {"a": ""}}):  # fmt: skip
        index.write_text(json.dumps(said))
        assert outcome(theirs), said
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert not outcome(theirs)
