"""A model folder with a damaged card does not affect the others."""

import json

import pytest

from nanoghost.commands.models import adapters_of
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, model_names, open_model
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.tokenizer.tokenizer import Tokenizer
from tests.support.toys import random_llama_folder, toy_text


@pytest.fixture
def two_models(home):
    tokenizer = Tokenizer.train([toy_text(100)], 300)
    config = LlamaConfig(tokenizer.vocab_size, 512, 2, 64, 1, 1, 64)
    for name in ("good", "bad"):
        random_llama_folder(name, config, tokenizer)
    (home / "models" / "bad" / "card.json").write_text('{"format": 2, "name": "ba')


def test_list_shows_the_others(two_models, nanoghost):
    code, out, err = nanoghost("list", "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert rows["good"]["stage"] == "pretrain"
    assert "damaged" in rows["bad"]["error"]
    code, _, err = nanoghost("list")
    assert code == 0
    assert "unreadable" in err


def test_the_default_model_is_a_readable_one(two_models):
    assert model_names() == ["good", "bad"]
    assert open_model(None).name == "good"
    with pytest.raises(UserError, match="damaged"):
        open_model("bad")


@pytest.mark.parametrize("name", ["good", "bad"])
def test_each_can_be_removed(two_models, nanoghost, name):
    assert adapters_of(name) == []
    code, _, err = nanoghost("rm", name, "--yes")
    assert code == 0, err
    assert not ModelFolder(name).path.exists()
