"""The commands list, show, rename and rm. The model folders hold only a card: these commands read nothing else."""

import io
import json
from dataclasses import replace

import pytest

from nanoghost import home
from nanoghost.commands import models
from nanoghost.formats.model_card import ModelCard
from nanoghost.home import ModelFolder, write_lock


def make(name, finished=1.0):
    folder = ModelFolder(name)
    folder.write_card(
        ModelCard(
            name=name,
            stage="pretrain",
            parameters=1_500_000,
            steps=3,
            command="nanoghost pretrain",
            data=[{"name": "plays", "license": "CC BY 2.5"}],
            figures={"bpb": 2.0},
            finished=finished,
        )
    )
    return folder


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_list_without_models_names_the_command_that_makes_one(nanoghost):
    assert "no models yet" in nanoghost("list")[2]


def test_list_shows_the_model_finished_last_first(nanoghost):
    make("old", 1.0)
    make("new", 2.0)
    code, out, _ = nanoghost("list", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["models"]] == ["new", "old"]
    assert "1.5M" in nanoghost("list")[2]


def test_show_without_a_name_shows_the_model_finished_last(nanoghost):
    make("old", 1.0)
    make("new", 2.0)
    assert json.loads(nanoghost("show", "--json")[1])["name"] == "new"


def test_show_prints_a_card_to_standard_error(nanoghost):
    make("old")
    code, out, err = nanoghost("show", "old")
    assert code == 0
    assert out == ""
    assert "CC BY 2.5" in err
    assert nanoghost("show", "nobody")[0] == 2


def test_rename_changes_the_folder_and_the_name_on_the_card(nanoghost):
    before = make("a").card
    assert nanoghost("rename", "a", "b")[0] == 0
    assert ModelFolder("b").card == replace(before, name="b")
    assert not ModelFolder("a").path.exists()


@pytest.mark.parametrize(
    "old, new", [("b", "c"), ("b", "b"), ("nobody", "d"), ("b", "../d"), ("b", "x/y"), ("b", "b@d")]
)
def test_rename_to_a_bad_or_existing_name_is_an_error(nanoghost, old, new):
    before = make("b").card
    make("c")
    code, _, err = nanoghost("rename", old, new)
    assert code == 2
    assert err.startswith("nanoghost: ")
    assert ModelFolder("b").card == before


def test_a_locked_model_is_neither_renamed_nor_removed(nanoghost):
    before = make("b").card
    with write_lock(ModelFolder("b")):
        assert nanoghost("rename", "b", "d")[0] == 2
        assert nanoghost("rm", "b", "--yes")[0] == 2
    assert ModelFolder("b").card == before


def test_on_a_full_disk_a_model_keeps_its_old_name(nanoghost, monkeypatch):
    before = make("a").card

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(home, "write_atomic", full)
    assert nanoghost("rename", "a", "b")[0] == 2
    assert ModelFolder("a").card == before
    assert not ModelFolder("b").path.exists()


@pytest.mark.parametrize(
    "answer, removed", [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_rm_asks_on_a_terminal(nanoghost, monkeypatch, answer, removed):
    make("a")
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert nanoghost("rm", "a")[0] == 0
    assert ModelFolder("a").path.exists() != removed


def test_rm_without_a_terminal_needs_yes(nanoghost):
    make("a")
    code, _, err = nanoghost("rm", "a")
    assert code == 2
    assert "--yes" in err
    assert ModelFolder("a").exists
    assert nanoghost("rm", "a", "--yes")[0] == 0
    assert not ModelFolder("a").path.exists()


def test_an_interrupted_rm_leaves_no_model_and_can_be_repeated(nanoghost, monkeypatch):
    make("a")

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(models.shutil, "rmtree", interrupted)
        assert nanoghost("rm", "a", "--yes")[0] == 130
    assert not ModelFolder("a").exists
    assert home.model_names() == []
    make("a")
    assert nanoghost("rm", "a", "--yes")[0] == 0
    assert not ModelFolder("a").path.exists()
