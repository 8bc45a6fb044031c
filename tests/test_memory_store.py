"""A person's journal and ledger: they lose nothing, keep to themselves, and their owner has a say in them."""

import stat
import threading
import zipfile
from pathlib import Path

import pytest

from nanoghost.errors import UserError
from nanoghost.memory import extract
from nanoghost.memory.store import Person, current
from nanoghost.tools.retrieval import Index
from tests.conftest import remember, row

# ── people ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_journal_grows_and_is_its_owners(me):
    first, second = me.say("user", "Grüße\nzwei Zeilen"), me.say("assistant", "ok")
    assert me.journal == [first, second] and second["id"] > first["id"]
    assert stat.S_IMODE(me.path.stat().st_mode) == 0o700
    with open(me.path / "journal.jsonl", "a") as f:
        f.write('{"id": 3, "te')  # a crash in the middle of a line
    third = me.say("user", "still here")
    assert me.journal == [first, second, third]
    for name in ("../you", "a/b", "", ".hidden"):
        with pytest.raises(UserError):
            Person(name)


def test_the_newest_holds_and_what_it_replaces_is_known():
    told = [({"id": 1, "time": 1.0}, [("sister's name", "Ines")]), ({"id": 2, "time": 2.0}, [("sister's name", "ines")]),
            ({"id": 3, "time": 3.0}, [("Sister's name", "Maren"), ("dog's name", "Rex")])]  # fmt: skip
    ledger, new, corrected = extract.merge([], told)
    assert [r["value"] for r in current(ledger)] == ["Maren", "Rex"]
    assert ledger[0]["sources"] == [1, 2] and corrected == [ledger[1]] and ledger[1]["supersedes"] == ledger[0]["id"]
    assert extract.merge(ledger, [])[0] == ledger


def test_what_is_forgotten_leaves_ledger_and_journal(me):
    entries = [me.say("user", text) for text in ("My sister is Ines.", "Sorry, Maren.", "My dog is Rex.")]
    rows = [
        row(1, "sister's name", "Ines", [1]),
        row(2, "sister's name", "Maren", [2], 1),
        row(3, "dog's name", "Rex", [3]),
    ]
    me.write_ledger(rows)
    for name in ("adapter", "nights/0001"):
        (me.path / name).mkdir(parents=True)
    echo = me.say("assistant", "Say hello to maren!")
    kept = me.say("user", "Marenka is somebody else.")
    assert me.forget(2) == (rows[1], 3) and echo not in me.journal
    assert me.ledger == rows[2:] and me.journal == [entries[2], kept]
    assert not me.adapter and not any((me.path / "nights").iterdir())
    with pytest.raises(UserError, match="no row 2"):
        me.forget(2)
    me.forget(3)
    assert me.journal == [kept] and me.say("user", "and?")["id"] == kept["id"] + 1


def test_a_number_that_was_forgotten_is_not_given_again(me):
    me.say("user", "My dog is Rex and my cat is Mog.")
    me.write_ledger([row(1, "dog's name", "Rex", [1]), row(2, "cat's name", "Mog", [1])])
    me.forget(1)
    assert not me.journal and me.say("user", "hello")["id"] == 2


def test_a_ledger_may_be_edited_by_hand(me):
    path = me.path / "ledger.jsonl"
    path.write_text('{"relation": "dog\'s name", "value": "Rex"}\n\n{"relation": "car", "value": "a van", "id": 7}')
    assert [(r["id"], r["value"], r["subject"], r["sources"]) for r in me.ledger] == [
        (1, "Rex", "user", []),
        (7, "a van", "user", []),
    ]
    for bad, said in (
        ("nonsense", "line 1"),
        ('{"relation": "x"}', "value"),
        ('{"relation": 1, "value": "y"}', "relation"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=said):
            print(me.ledger)


# ── a say in it ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_is_listed_searched_written_and_corrected(me, capsys):
    remember(me, add=("dog's name", "Rex"))
    remember(me, add=("sister's birthday", "the 4th of July"))
    remember(me, correct=(1, "Bello"))
    assert [r["value"] for r in current(me.ledger)] == ["Bello", "the 4th of July"] and me.ledger[2]["supersedes"] == 1
    assert [e["text"] for e in me.journal][-1] == "My dog's name is Bello."
    capsys.readouterr()
    remember(me, search="When are birthdays?")
    assert capsys.readouterr().out.count("\n") == 1
    me.say("user", "And a cat.")
    remember(me, search="xylophone")
    shown = capsys.readouterr()
    assert shown.out == "" and "no night has read yet: 1" in shown.err
    for wrong in (
        {"correct": (9, "x")},
        {"forget": 9},
        {"add": ("", "x")},
        {"add": ("a", "b"), "search": "c"},
        {"export": Path("x.tar")},
    ):
        with pytest.raises(UserError):
            remember(me, **wrong)
    assert len(me.ledger) == 3
    with pytest.raises(UserError):
        remember(Person("you"), add=("", "x"))
    assert not Person("you").exists
    remember(Person("you"), add=("town", "Porto"))
    assert [row["value"] for row in Person("you").ledger] == ["Porto"], "who has not talked yet may begin by writing"


def test_all_of_a_person_goes_into_one_file_or_away(me, tmp_path):
    remember(me, add=("dog's name", "Rex"))
    Person("you").create().say("user", "hello")
    remember(me, export=tmp_path / "me.zip")
    names = zipfile.ZipFile(tmp_path / "me.zip").namelist()
    assert not any(name.rpartition("/")[2].startswith(".") for name in names)
    assert {"me/journal.jsonl", "me/ledger.jsonl"} <= set(names) and not any("you" in name for name in names)
    with pytest.raises(UserError, match="there already"):
        remember(me, export=tmp_path / "me.zip")
    with pytest.raises(UserError, match="--yes"):
        remember(me, delete=True)
    remember(me, delete=True, yes=True)
    assert not me.exists and Person("you").journal


def test_lookup_finds_by_stems_and_nothing_where_nothing_fits():
    texts = ["Your sister's birthday is on the 4th of July.", "Your dog's name is Rex.", "Your sister works as a vet."]
    index = Index(texts)
    assert index.search("When is my sister's birthday?", 2) == [0, 2] and index.search("the birthdays") == [0]
    assert index.search("what was the name of my dogs", 3) == [1]
    assert (
        index.search("Do you know me?") == []
        and index.search('"; drop table texts --') == []
        and Index([]).search("x") == []
    )


def test_two_who_write_into_a_journal_at_once_give_each_line_its_number(me):
    """A server and a chat in the terminal may, and a correction in between loses nothing."""

    def write(name):
        for i in range(20):
            me.say("user", f"{name} {i}")

    me.say("user", "My sister is Ines.")
    me.write_ledger(
        [
            {
                "id": 1,
                "subject": "user",
                "relation": "sister's name",
                "value": "Ines",
                "time": 1,
                "sources": [1],
                "supersedes": None,
            }
        ]
    )
    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    me.forget(1)
    for thread in threads:
        thread.join()
    numbers = [entry["id"] for entry in me.journal]
    assert len(numbers) == 40 and numbers == sorted(set(numbers))
