"""What `nanoghost adopt` is given: GGUF models in several files, files that are something else, names from paths."""

import json
import os
import struct
from pathlib import Path

import gguf
import pytest
import torch

from nanoghost.commands.adopt import default_name
from nanoghost.errors import UserError
from nanoghost.formats.gguf_reader import GGUFFile
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.gguf_files import read_gguf, write_gguf
from tests.support.toys import random_llama_folder, toy_text


@pytest.fixture
def folder():
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    return random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 64, 2, 64, 4, 2, 96), tokenizer)


@pytest.fixture
def whole(nanoghost, folder, tmp_path) -> Path:
    path = tmp_path / "whole.gguf"
    assert nanoghost("export", folder.name, "--quant", "f32", "--out", path)[0] == 0
    return path


def write_split(path: Path, whole: Path, **options) -> list[Path]:
    """The file in several parts, by llama.cpp's library; returns them in their order."""
    write_gguf(path, *read_gguf(whole), split_max_tensors=8, **options)
    return sorted(path.parent.glob(f"{path.stem}-*.gguf"))


@pytest.fixture
def parts(whole, tmp_path) -> list[Path]:
    parts = write_split(tmp_path / "big.gguf", whole)
    assert [part.name for part in parts] == [f"big-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    return parts


@torch.no_grad()
def logits(name: str) -> torch.Tensor:
    model, _ = load_model(ModelFolder(name).path, torch.float32)
    return model(torch.arange(30)[None])


def adopt_error(nanoghost, source) -> str:
    """The error of adopting it: one line."""
    code, _, err = nanoghost("adopt", source, "--name", "refused")
    assert code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert not ModelFolder("refused").path.exists()
    return err


# -- GGUF models in several files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [0, 1, 2])
def test_all_parts_are_read_whichever_is_given(nanoghost, parts, given):
    code, _, err = nanoghost("adopt", parts[given])
    assert code == 0, err
    assert torch.equal(logits("toy"), logits("big"))
    [entry] = ModelFolder("big").card.data
    assert entry["name"] == "toy"
    assert "big-00001-of-00003.gguf" in entry["attribution"]


def test_a_first_part_without_tensors_is_read(nanoghost, whole, tmp_path):
    parts = write_split(tmp_path / "big.gguf", whole, small_first_shard=True)
    assert not GGUFFile(parts[0]).tensors
    assert nanoghost("adopt", parts[-1])[0] == 0
    assert torch.equal(logits("toy"), logits("big"))


@pytest.mark.parametrize(("missing", "given"), [(0, 1), (1, 0), (2, 0)])
def test_a_missing_part_is_named(nanoghost, parts, missing, given):
    parts[missing].unlink()
    assert f"one of 3 parts of a GGUF model, and {parts[missing].name} is not next to it" in adopt_error(
        nanoghost, parts[given]
    )


def test_a_renamed_part_is_told_how_parts_are_called(nanoghost, parts, tmp_path):
    renamed = parts[1].rename(tmp_path / "second.gguf")
    assert "part 2 of 3" in adopt_error(nanoghost, renamed)
    assert "NAME-00002-of-00003.gguf" in adopt_error(nanoghost, renamed)


def test_parts_in_the_wrong_place_or_of_another_model_are_refused(nanoghost, parts):
    second, third = parts[1].read_bytes(), parts[2].read_bytes()
    parts[1].write_bytes(third)
    assert f"{parts[1]} is not what its name says" in adopt_error(nanoghost, parts[0])
    parts[1].write_bytes(parts[0].read_bytes())
    assert f"{parts[1]} is not what its name says" in adopt_error(nanoghost, parts[0])
    parts[1].write_bytes(second.replace(b"blk.", b"blk?"))
    assert "blk?" in adopt_error(nanoghost, parts[0])
    parts[1].write_bytes(second[:-4000])
    assert f"{parts[1]} as a GGUF file: it is cut off" in adopt_error(nanoghost, parts[0])


def test_the_number_of_tensors_of_all_parts_is_checked(nanoghost, parts):
    """A part of an earlier version of the model may lack some."""
    for part in parts:
        content = part.read_bytes()
        position = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
        [count] = struct.unpack_from("<i", content, position)
        part.write_bytes(content[:position] + struct.pack("<i", count + 1) + content[position + 4 :])
    assert f"have {count} tensors instead of {count + 1}" in adopt_error(nanoghost, parts[0])


# -- files that are something else ------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (POINTER, "git lfs pull"),
        (PAGE, "web page"),
        (b"<html>", "web page"),
        (b"PK\x03\x04" + bytes(100), "pickle"),
        (b"\x80\x02}q\x00.", "pickle"),
        (struct.pack("<Q", 100) + b'{"__metadata__":{}}' + bytes(200), "safetensors file: adopt the folder"),
        (b"tjgg" + bytes(100), "GGML"),
        (b"hello, this is a text", "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "its version is 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "gguf-convert-endian"),
        (b"GGUF" + struct.pack("<IQ", 3, 0), "cut off"),
        (b"", "empty"),
    ],
)
def test_a_file_that_is_no_gguf_file_is_told_what_it_is(nanoghost, tmp_path, content, hint):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert hint in adopt_error(nanoghost, path)


def test_a_big_endian_file_of_the_library_is_recognized(nanoghost, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.block_count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "big-endian" in adopt_error(nanoghost, tmp_path / "big.gguf")


def test_a_cut_off_download_names_both_sizes(nanoghost, whole):
    content = whole.read_bytes()
    whole.write_bytes(content[:-5000])
    assert f"the file has {len(content) - 5000}; download it again" in adopt_error(nanoghost, whole)


@pytest.mark.parametrize("content", [POINTER, PAGE])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_of_a_folder_that_is_something_else_is_named(nanoghost, folder, file, content):
    """`git clone` without Git LFS leaves pointers; a browser may save a page."""
    (folder.path / file).write_bytes(content)
    error = adopt_error(nanoghost, folder.path)
    assert file in error
    assert ("git lfs pull" if content == POINTER else "web page") in error


def test_a_folder_with_another_kind_of_weights_is_told_what_to_adopt(nanoghost, folder, whole, tmp_path):
    assert f"adopt one of them, such as {whole}" in adopt_error(nanoghost, tmp_path)
    (folder.path / "model.safetensors").rename(folder.path / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in adopt_error(nanoghost, folder.path)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("My Model", "my-model"),
        ("Modèle-Été", "modele-ete"),
        ("Ｑwen３", "qwen3"),
        ("Zürich v1.5", "zurich-v1.5"),
        ("中文LLaMA", "llama"),
        (".hidden", "hidden"),
        ("-model-", "model"),
        ("model...", "model"),
        ("x" * 100, "x" * 64),
        ("x" * 63 + "-yz", "x" * 63),
        ("models--Qwen--Qwen3-0.6B/snapshots/0123456789abcdef", "qwen3-0.6b"),
        ("models--gpt2/snapshots/0123456789abcdef", "gpt2"),
        ("OWNER/Model-1B.5", "model-1b.5"),
    ],
)
def test_the_name_of_a_folder_is_made_a_model_name(tmp_path, path, name):
    (tmp_path / path).mkdir(parents=True)
    assert default_name(f"{tmp_path / path}/") == name
    assert ModelFolder(name).name == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("SmolLM2-135M.Q4_1.gguf", "smollm2-135m.q4_1"),
        ("big-00002-of-00003.gguf", "big"),
        ("model.GGUF", "model"),
        ("model.v0.2", "model.v0.2"),
        ("models--a--b/snapshots/0123/weights.gguf", "weights"),
    ],
)
def test_the_name_of_a_file_is_made_a_model_name(tmp_path, path, name):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).touch()
    assert default_name(str(tmp_path / path)) == name


def test_a_link_is_called_as_its_owner_called_it(tmp_path, monkeypatch):
    """The cache of the Hub keeps files under their hash, and links to them."""
    blob, link = tmp_path / "blobs" / "4d7a2146", tmp_path / "snapshots" / "Tiny.gguf"
    for path in (blob, link):
        path.parent.mkdir()
    blob.touch()
    link.symlink_to("../blobs/4d7a2146")
    (tmp_path / "mine").symlink_to(tmp_path / "blobs")
    assert default_name(str(link)) == "tiny"
    assert default_name(str(tmp_path / "mine")) == "mine"
    monkeypatch.chdir(tmp_path / "blobs")
    assert default_name(".") == "blobs"
    assert default_name("../snapshots") == "snapshots"


@pytest.mark.parametrize("path", ["模型", "نموذج", "---", "👻", ".gguf"])
def test_a_path_without_a_letter_for_a_name_asks_for_one(tmp_path, path):
    (tmp_path / path).touch()
    with pytest.raises(UserError, match="--name"):
        default_name(str(tmp_path / path))


def test_a_snapshot_in_the_cache_of_the_hub_is_adopted_under_its_name(nanoghost, folder, tmp_path):
    """Its files are links to blobs. The folder above it is not a model, and the error says where one is."""
    cached = tmp_path / "models--maker--Tiny-1B"
    snapshot, blobs = cached / "snapshots" / "0123456789abcdef", cached / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.path.iterdir())):
        os.rename(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert f"adopt its folder {snapshot}" in adopt_error(nanoghost, cached)
    code, out, err = nanoghost("adopt", snapshot, "--json")
    assert code == 0, err
    assert json.loads(out)["name"] == "tiny-1b"
    assert ModelFolder("tiny-1b").card.data[0]["name"] == "Tiny-1B"
    assert not any(path.is_symlink() for path in ModelFolder("tiny-1b").path.iterdir())
    (snapshot / "model.safetensors").resolve().unlink()
    assert f"{snapshot / 'model.safetensors'}" in adopt_error(nanoghost, snapshot)


@pytest.mark.parametrize("name", ["-", "模型", "a" * 65, "a/b", ".x", ""])
def test_an_invalid_model_name_is_told_what_is_valid(name):
    with pytest.raises(UserError, match="letters from a to z.*at most 64"):
        ModelFolder(name)
