"""Models of unknown origin: damage to their files ends in a UserError of one line, and no file is left behind."""

import copy
import json
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from nanoghost.commands import adopt
from nanoghost.errors import UserError
from nanoghost.formats.model_folder import load_model, save_model
from nanoghost.home import home
from nanoghost.model.llama import Llama
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.jinja_template import ChatTemplate
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.gguf_files import read_gguf, write_gguf
from tests.support.toys import TOY_TEMPLATE, toy_text

LLAMA3_WITHOUT_FACTOR = {"rope_type": "llama3", "factor": 0}
STRANGE_NUMBERS = (0, -1, 1, 3, 7, 2**31, 2**62, 0.0, -2.5, 1e30, float("nan"), float("inf"), True)
STRANGE_TEXTS = ("", "x", "linear", "yarn", "\x1b[2J\n")
STRANGE_LISTS = (["a", "b"], [1, 2, 3], [0.5])
STRANGE_JSON = ({}, [], {"rope_type": "yarn"}, LLAMA3_WITHOUT_FACTOR, {"type": []}, [[]])
STRANGE = (None, *STRANGE_NUMBERS, *STRANGE_TEXTS, *STRANGE_LISTS, *STRANGE_JSON)
STRANGE_IN_GGUF = (None, *STRANGE_NUMBERS, *STRANGE_TEXTS, *STRANGE_LISTS)


@pytest.fixture
def source(tmp_path):
    """A tiny model as a Hugging Face folder."""
    folder = tmp_path / "source"
    tokenizer = Tokenizer.train([toy_text(200)], 300)
    stop_ids = {tokenizer.special_id("<|im_end|>")}
    tokenizer.chat_template = ChatTemplate(TOY_TEMPLATE, tokenizer.special_tokens_map, stop_ids)
    save_model(folder, Llama(LlamaConfig(tokenizer.vocab_size, 32, 2, 32, 4, 2, 48)), tokenizer)
    return folder


@pytest.fixture
def source_gguf(source, nanoghost, tmp_path):
    """The same model as a GGUF file."""
    path = tmp_path / "whole.gguf"
    assert nanoghost("adopt", source, "--name", "whole")[0] == 0
    assert nanoghost("export", "whole", "--gguf", "--quant", "f32", "--out", path)[0] == 0
    shutil.rmtree(home() / "models" / "whole")
    return path


def adoption_error(source: Path) -> str:
    """The error of adopting this source, or "" if it is adopted and the model runs.

    Either way: the error is one printable line, no file is left behind, and no large memory is taken.
    """
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        adopt.main(adopt.AdoptSettings(str(source), "damaged"))
    except UserError as e:
        assert str(e).isprintable(), repr(str(e))
        assert not list((home() / "models").iterdir()), "a file was left behind"
        return str(e)
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert peak - peak_before < 300_000, "memory was allocated before the check"  # kilobytes
    model, _ = load_model(home() / "models" / "damaged", torch.float32)
    with torch.no_grad():
        model(torch.tensor([[1]]))
    shutil.rmtree(home() / "models" / "damaged")
    return ""


# ── GGUF files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_strange_values_in_a_gguf_header_are_refused(source_gguf, tmp_path):
    """Each field of the header, and some that are missing, with strange values; sometimes another field is removed."""
    fields, tensors = read_gguf(source_gguf)
    missing = {"llama.attention.head_count_kv", "llama.rope.scaling.type", "llama.rope.scaling.factor"}
    keys = [*fields, *sorted(missing), "llama.attention.sliding_window", "tokenizer.ggml.eot_token_id"]
    rng = random.Random(0)
    path = tmp_path / "damaged.gguf"
    refused, cases = 0, 0
    assert adoption_error(source_gguf) == ""
    for key in keys:
        for value in rng.sample(STRANGE_IN_GGUF, 5):
            damaged = {k: v for k, v in (fields | {key: value}).items() if v is not None}
            if rng.random() < 0.2:
                damaged.pop(rng.choice(list(damaged)))
            write_gguf(path, damaged, tensors)
            cases += 1
            if adoption_error(path):
                refused += 1
    assert refused > cases / 2


def test_missing_renamed_or_reshaped_tensors_are_refused(source_gguf, tmp_path):
    fields, tensors = read_gguf(source_gguf)
    path = tmp_path / "damaged.gguf"
    for name, x in tensors.items():
        reshaped = tensors | {name: x.T[:, ::2].copy() if x.ndim == 2 else x[::2]}
        missing = {k: v for k, v in tensors.items() if k != name}
        renamed = tensors | {name + "\n": x}
        for damaged in (reshaped, missing, renamed):
            write_gguf(path, fields, damaged)
            is_tied_model = name == "output.weight" and name not in damaged  # valid: the head is the embedding
            assert adoption_error(path) or is_tied_model


def test_unknown_rope_scaling_is_refused(source_gguf, tmp_path):
    fields, tensors = read_gguf(source_gguf)
    path = tmp_path / "damaged.gguf"
    write_gguf(path, fields, tensors | {"rope_freqs.weight": np.zeros(4, np.float32)})
    assert "RoPE scaling" in adoption_error(path)


# ── Hugging Face folders ────────────────────────────────────────────────────────────────────────────────────────────


def paths_in(value, path=()):
    """The path (keys and indices) of each value in a JSON document."""
    yield path
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        items = []
    for key, inner in items[:40]:
        yield from paths_in(inner, (*path, key))


def with_value(document, path, value):
    """A copy of the document with another value at this path; None removes the key of an object."""
    if not path:
        return value
    document = copy.deepcopy(document)
    *parents, last = path
    container = document
    for key in parents:
        container = container[key]
    if value is None and isinstance(container, dict):
        del container[last]
    else:
        container[last] = value
    return document


JSON_FILES = {"config.json": 120, "tokenizer_config.json": 60, "generation_config.json": 40, "tokenizer.json": 80}
"""File -> number of damaged versions to try."""


@pytest.mark.parametrize(("file", "cases"), list(JSON_FILES.items()))
def test_strange_values_anywhere_in_a_json_file_are_refused_or_harmless(source, file, cases):
    rng = random.Random(file)
    document = json.loads((source / file).read_text())
    paths = list(paths_in(document))
    refused = 0
    for _ in range(cases):
        (source / file).write_text(json.dumps(with_value(document, rng.choice(paths), rng.choice(STRANGE))))
        if adoption_error(source):
            refused += 1
    assert refused > cases / 4


@pytest.mark.parametrize("file", list(JSON_FILES))
def test_files_that_are_not_a_json_object_are_refused(source, file):
    whole = (source / file).read_text()
    for content in (whole[: len(whole) // 2], "", "[" * 100000, "\x00", "[]", "null"):
        (source / file).write_text(content)
        assert adoption_error(source), content[:9]
    (source / file).write_bytes(b"\xff" + whole.encode())
    assert adoption_error(source)


def test_truncated_weights_are_refused(source):
    path = source / "model.safetensors"
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    for length in (0, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert adoption_error(source), length


def test_changed_bytes_in_the_weights_header_are_refused_or_harmless(source):
    path, rng = source / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    refused = 0
    for _ in range(120):
        damaged = bytearray(whole)
        damaged[rng.randrange(header)] = rng.choice(b'019"{}[],:FIa\x00\xff')
        path.write_bytes(damaged)
        if adoption_error(source):
            refused += 1
    assert refused > 80


def test_missing_weights_are_named(source):
    (source / "model.safetensors").unlink()
    assert "model.safetensors" in adoption_error(source)


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"weight_map": 3},
        {"weight_map": {}},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": "gone.safetensors"}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "config.json"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
    ],
    ids=json.dumps,
)
def test_an_index_with_invalid_file_names_is_refused(source, index):
    """An index must not lead to files outside of the model's folder."""
    (source / "model.safetensors").rename(source / "part.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert adoption_error(source)


def test_an_index_with_one_valid_file_is_adopted(source):
    (source / "model.safetensors").rename(source / "part.safetensors")
    index = {"weight_map": {"a": "part.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not adoption_error(source)


@pytest.mark.parametrize(
    "change",
    [
        {},  # Mamba layers and experts by default
        {"layer_types": 3},
        {"layer_types": [["attention"]]},
        {"layer_types": ["mamba"]},
        {"layer_types": ["attention"], "num_local_experts": "none"},
        {"layer_types": ["attention"], "num_local_experts": 8},
        {"layer_types": ["attention"], "num_local_experts": 0},  # no rotary embeddings
    ],
    ids=json.dumps,
)
def test_a_granite_4_with_other_parts_than_attention_is_refused(source, change):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "granitemoehybrid"} | change))
    assert adoption_error(source)


def test_a_tied_model_whose_head_has_another_type_than_its_embedding_is_adopted(source):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
    safetensors.torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert not adoption_error(source)
