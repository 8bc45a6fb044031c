"""Files with names of 255 bytes, the most that a file system allows, are read and written."""

import shutil

import pytest

from nanoghost.data.registry import open_data_source
from nanoghost.home import write_atomic
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import random_llama_folder, toy_text


def long_name(ending: str, letter: str = "a") -> str:
    """A name of 255 bytes."""
    return letter * ((255 - len(ending)) // len(letter.encode())) + ending


@pytest.mark.parametrize("letter", ["a", "ä", "界"])
def test_a_file_is_written_and_no_other_is_left(tmp_path, letter):
    path = tmp_path / long_name(".json", letter)
    write_atomic(path, "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("letter", ["a", "ä"])
def test_text_is_tokenized(tmp_path, nanoghost, letter):
    path = tmp_path / long_name(".txt", letter)
    path.write_text(toy_text(100))
    code, _, err = nanoghost("data", path, "--vocab-size", 300)
    assert code == 0, err
    mixture = f"{path}=1,{shutil.copy(path, tmp_path / 'b.txt')}=1"
    assert len(open_data_source(mixture).name) <= 60


def test_a_model_is_exported_with_its_license(tmp_path, nanoghost, home):
    tokenizer = Tokenizer.train([toy_text(100)], 300)
    random_llama_folder("toy", LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64), tokenizer)
    (home / "models" / "toy" / "LICENSE").write_text("free")
    path = tmp_path / long_name(".gguf")
    code, _, err = nanoghost("export", "toy", "--out", path)
    assert code == 0, err
    [license] = tmp_path.glob("*.LICENSE")
    assert license.name.startswith("aaa")
