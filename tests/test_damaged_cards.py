"""A model folder with a damaged card does not affect the others."""

import json

import pytest

from nanoghost.commands.models import adapters_of
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, model_names, open_model
from nanoghost.model.llama_config import LlamaConfig
from nanoghost.serve.engine_messages import Capacity
from nanoghost.serve.model_registry import ModelRegistry
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


DAMAGE = {
    "empty": lambda card: "",
    "list": lambda card: [],
    "null": lambda card: None,
    "stage missing": lambda card: {key: card[key] for key in card if key != "stage"},
    "unknown key": lambda card: card | {"color": "red"},
    "other types": lambda card: card | {"figures": None, "parameters": "ten"},
    "parent": lambda card: card | {"parent": 3},
    "text as time": lambda card: card | {"finished": "yesterday"},
    "NaN as time": lambda card: card | {"finished": float("nan")},
    "time after the year 5138": lambda card: card | {"finished": 1e300},
    "older format": lambda card: card | {"format": 1},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_is_one_line_and_leaves_the_others_usable(two_models, nanoghost, damage, home):
    path = home / "models" / "bad" / "card.json"
    damaged = DAMAGE[damage](json.loads((home / "models" / "good" / "card.json").read_text()))
    path.write_text(json.dumps(damaged) if damaged != "" else "")
    for command in ("list", "show good", "rename good new", "rename new good"):
        code, _, err = nanoghost(*command.split())
        assert code == 0, err
    code, _, err = nanoghost("show", "bad")
    assert code == 2
    assert len(err.splitlines()) == 1
    registry = ModelRegistry(None, Capacity())
    assert list(registry.models()) == ["good"]
    assert nanoghost("rm", "bad", "--yes")[0] == 0


def test_a_card_that_is_a_folder_does_not_affect_the_others(two_models, nanoghost, home):
    path = home / "models" / "bad" / "card.json"
    path.unlink()
    path.mkdir()
    code, _, err = nanoghost("list")
    assert code == 0
    assert "Is a directory" in err
    assert open_model(None).name == "good"


def test_damaged_memory_of_one_person_does_not_affect_the_others(home, capsys):
    for name in ("ada", "bob"):
        adapter = home / "people" / name / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").touch()
        inputs = {"base": "good", "base_finished": 1.0, "facts": []}
        (adapter / "inputs.json").write_text(json.dumps(inputs) if name == "ada" else "{")
    registry = ModelRegistry(None, Capacity())
    for _ in range(2):
        assert registry.people() == [{"name": "ada", "base": "good"}, {"name": "bob", "base": None}]
    assert capsys.readouterr().err.count("the memory of bob is not available") == 1


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
