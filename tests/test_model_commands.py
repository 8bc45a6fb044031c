"""The verbs that look after model folders; the folders hold only a card, as much as these verbs read."""

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


def test_list_and_show(nanoghost):
    assert "no models yet" in nanoghost("list")[2]
    make("old", 1.0), make("new", 2.0)
    code, out, _ = nanoghost("list", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)["models"]] == ["new", "old"]
    assert "1.5M" in nanoghost("list")[2]
    assert json.loads(nanoghost("show", "--json")[1])["name"] == "new", "without a name: the one finished last"
    code, out, err = nanoghost("show", "old")
    assert code == 0 and out == "" and "CC BY 2.5" in err
    assert nanoghost("show", "nobody")[0] == 2


def test_rename_moves_the_folder_and_the_name(nanoghost):
    before = make("a").card
    assert nanoghost("rename", "a", "b")[0] == 0
    assert ModelFolder("b").card == replace(before, name="b") and not ModelFolder("a").path.exists()
    make("c")
    for words in (("b", "c"), ("b", "b"), ("nobody", "d"), ("b", "../d"), ("b", "x/y")):
        code, _, err = nanoghost("rename", *words)
        assert code == 2 and err.startswith("nanoghost: "), words
    with write_lock(ModelFolder("b")):
        assert nanoghost("rename", "b", "d")[0] == 2
        assert nanoghost("rm", "b", "--yes")[0] == 2
    assert ModelFolder("b").card == replace(before, name="b")


def test_a_full_disk_leaves_a_model_under_its_old_name(nanoghost, monkeypatch):
    before = make("a").card

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(home, "write_atomic", full)
    assert nanoghost("rename", "a", "b")[0] == 2
    assert ModelFolder("a").card == before and not ModelFolder("b").path.exists()


@pytest.mark.parametrize("answer, gone", [("y\n", True), ("YES\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_rm_asks_on_a_terminal(nanoghost, monkeypatch, answer, gone):
    make("a")
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert nanoghost("rm", "a")[0] == 0
    assert ModelFolder("a").path.exists() != gone


def test_rm_without_a_terminal_needs_yes_and_never_leaves_half_a_model(nanoghost, monkeypatch):
    make("a")
    code, _, err = nanoghost("rm", "a")
    assert code == 2 and "--yes" in err and ModelFolder("a").exists

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(models.shutil, "rmtree", interrupted)
        assert nanoghost("rm", "a", "--yes")[0] == 130
    assert not ModelFolder("a").exists and home.model_names() == []
    make("a")
    assert nanoghost("rm", "a", "--yes")[0] == 0 and not ModelFolder("a").path.exists()
