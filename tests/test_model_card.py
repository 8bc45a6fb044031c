"""Model cards and the home folder: round trip through JSON, ancestors, formats of older versions, locks."""

import json

import pytest

from nanoghost.errors import UserError
from nanoghost.formats.model_card import CARD_FORMAT, ModelCard
from nanoghost.home import ModelFolder, exclusive_lock, write_lock

BASE = ModelCard(name="base", stage="pretrain", parameters=10, finished=1.0)
SFT = ModelCard(name="sft", stage="sft", parent=BASE, teacher=BASE, steps=3, figures={"loss": 2.5})


def test_a_card_survives_json_with_its_ancestors():
    values = json.loads(json.dumps(SFT.to_json()))
    assert values["format"] == CARD_FORMAT
    assert values["parent"]["name"] == "base"
    assert ModelCard.from_json(values) == SFT


def test_root_is_the_first_ancestor_and_lineage_starts_with_it():
    rl = ModelCard(name="rl", stage="rl", parent=SFT)
    assert rl.root == BASE
    assert rl.lineage() == [BASE, SFT, rl]
    assert BASE.root == BASE


@pytest.fixture
def old_folder():
    """A model folder of an older version."""
    folder = ModelFolder("old")
    folder.write_card(BASE)
    path = folder.path / "card.json"
    path.write_text(path.read_text().replace(f'"format": {CARD_FORMAT}', '"format": 1'))
    return folder


def test_a_folder_of_an_older_format_is_refused_in_one_line(nanoghost, old_folder):
    code, _, err = nanoghost("show", "old")
    assert code == 2
    (line,) = err.strip().splitlines()
    for text in ("'base'", "format 1", f"format {CARD_FORMAT}", "remove its folder"):
        assert text in line


def test_a_folder_of_an_older_format_can_be_removed_and_does_not_block_others(nanoghost, old_folder):
    ModelFolder("new").write_card(ModelCard(name="new", stage="pretrain", finished=2.0, seed=7, steps=1))
    assert nanoghost("show", "new")[0] == 0
    assert nanoghost("rm", "old", "--yes")[0] == 0
    assert not old_folder.path.exists()


def test_a_locked_folder_has_no_second_writer(home):
    folder = ModelFolder("toy")
    with write_lock(folder), pytest.raises(UserError, match="another process is writing 'toy'"), write_lock(folder):
        pass
    with write_lock(folder):  # free again
        pass


def test_a_lock_on_a_folder_leaves_no_file(tmp_path):
    with exclusive_lock(tmp_path), pytest.raises(UserError, match="busy"), exclusive_lock(tmp_path, "busy"):
        pass
    assert list(tmp_path.iterdir()) == []
