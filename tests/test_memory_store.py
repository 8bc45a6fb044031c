"""A person's chat log and fact store: nothing is lost, people share nothing, and facts can be changed and deleted."""

import json
import stat
import threading
import unicodedata
import zipfile
from pathlib import Path

import pytest

from nanoghost.errors import UserError
from nanoghost.memory.extract import parse_facts
from nanoghost.memory.store import Fact, LogEntry, Person, current_facts, merge_facts
from nanoghost.tools.retrieval import TextIndex
from tests.support.people import make_fact, memory

# -- chat log ---------------------------------------------------------------------------------------------------------


def test_chat_log_keeps_every_message_with_increasing_ids(me):
    first = me.log_message("user", "Grüße\nzwei Zeilen")
    second = me.log_message("assistant", "ok")
    assert me.read_chat_log() == [first, second]
    assert second.id > first.id


def test_chat_log_survives_a_crash_in_the_middle_of_a_line(me):
    first = me.log_message("user", "hello")
    with open(me.path / "chat_log.jsonl", "a") as f:
        f.write('{"id": 2, "te')
    second = me.log_message("user", "still here")
    assert me.read_chat_log() == [first, second]


ODD_TEXT = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj\r\nk\x00l\ud800m [/red] \x1b[2J"
"""Everything that some program takes for the end of a line, half of a surrogate pair, markup, a control sequence."""


def test_no_character_locks_a_persons_memory(me, capsys):
    """Everything can be stored, listed, searched, corrected and forgotten."""
    stored = ODD_TEXT.replace("\ud800", "?")
    me.log_message("user", ODD_TEXT)
    memory(me, add=(ODD_TEXT, ODD_TEXT))
    assert [entry.text for entry in me.read_chat_log()] == [stored, f"My {stored} is {stored}."]
    [fact] = me.read_facts()
    assert (fact.relation, fact.value) == (stored, stored)
    memory(me, correct=(1, f"{ODD_TEXT} bello"))
    capsys.readouterr()
    memory(me, search="bello")
    [line] = capsys.readouterr().out.splitlines()
    assert line.isprintable()
    memory(me, json=True)
    assert len(capsys.readouterr().out.split("\n")) == 2
    memory(me, forget=2)
    assert not me.read_facts()
    assert not me.read_chat_log()


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c", "\x1e"])
def test_an_extracted_fact_may_contain_line_separators(separator):
    value = f"Rex{separator}Max"
    facts, rejected = parse_facts(f"dog's name: {value}\nnothing", f"It is {value}")
    assert (facts, rejected) == ([("dog's name", value)], [])


@pytest.mark.parametrize(
    "line",
    [b"nonsense", b'{"id": 1', b'{"id": 1}', b"[]", b"\xff\xfe", b"[" * 10**5, b"\0\0\0"],
)
def test_a_damaged_line_of_the_chat_log_is_named_with_a_remedy(me, line):
    me.log_message("user", "hello")
    with open(me.path / "chat_log.jsonl", "ab") as f:
        f.write(line + b"\n")
    with pytest.raises(UserError, match=r"chat_log.jsonl, line 2\b.*delete this line"):
        me.read_chat_log()


def test_folder_of_a_person_is_readable_by_its_owner_only(me):
    assert stat.S_IMODE(me.path.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["../you", "a/b", "", ".hidden"])
def test_name_of_a_person_cannot_be_a_path(name):
    with pytest.raises(UserError, match="not a valid name"):
        Person(name)


def test_concurrent_writers_of_a_chat_log_get_distinct_ids(me):
    """A server and a terminal chat may write at once, and deleting a fact rewrites the chat log in between."""

    def write(name):
        for i in range(20):
            me.log_message("user", f"{name} {i}")

    me.log_message("user", "My sister is Ines.")
    me.write_facts([make_fact(1, "sister's name", "Ines", [1])])
    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    me.delete_fact(1)
    for thread in threads:
        thread.join()
    ids = [entry.id for entry in me.read_chat_log()]
    assert len(ids) == 40
    assert ids == sorted(set(ids))


# -- fact store -------------------------------------------------------------------------------------------------------


def test_newer_value_supersedes_older_one_and_equal_value_adds_a_source():
    stated = [
        (LogEntry(1, 1.0, "user", ""), [("sister's name", "Ines")]),
        (LogEntry(2, 2.0, "user", ""), [("sister's name", "ines")]),
        (LogEntry(3, 3.0, "user", ""), [("Sister's name", "Maren"), ("dog's name", "Rex")]),
    ]
    merged = merge_facts([], stated)
    ines, maren, rex = merged.facts
    assert current_facts(merged.facts) == [maren, rex]
    assert ines.sources == (1, 2)
    assert maren.supersedes == ines.id
    assert merged.corrections == [maren]
    assert merged.added == merged.facts
    assert merge_facts(merged.facts, []).facts == merged.facts


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_value_in_another_unicode_form_is_the_same_value(form):
    stored = [make_fact(1, unicodedata.normalize("NFC", "café"), "Zoé")]
    relation, value = (unicodedata.normalize(form, text) for text in ("Café", "zoé"))
    merged = merge_facts(stored, [(LogEntry(7, 1.0, "user", ""), [(relation, value)])])
    assert not merged.added
    assert merged.facts[0].sources == (7,)


def test_deleting_a_fact_deletes_older_values_messages_nights_and_adapter(me):
    texts = ("My sister is Ines.", "Sorry, Maren.", "My dog is Rex.")
    entries = [me.log_message("user", text) for text in texts]
    facts = [
        make_fact(1, "sister's name", "Ines", [1]),
        make_fact(2, "sister's name", "Maren", [2], 1),
        make_fact(3, "dog's name", "Rex", [3]),
    ]
    me.write_facts(facts)
    for name in ("adapter", "nights/0001"):
        (me.path / name).mkdir(parents=True)
    mention = me.log_message("assistant", "Say hello to maren!")
    longer_word = me.log_message("user", "Marenka is somebody else.")
    assert me.delete_fact(2) == (facts[1], 3)
    assert mention not in me.read_chat_log()
    assert me.read_facts() == [facts[2]]
    assert me.read_chat_log() == [entries[2], longer_word]
    assert not me.adapter
    assert not any((me.path / "nights").iterdir())
    with pytest.raises(UserError, match="no fact 2"):
        me.delete_fact(2)
    me.delete_fact(3)
    assert me.read_chat_log() == [longer_word]
    assert me.log_message("user", "and?").id == longer_word.id + 1


def test_id_of_a_deleted_message_is_not_used_again(me):
    """A fact may still name the deleted message as its source."""
    me.log_message("user", "My dog is Rex and my cat is Mog.")
    me.write_facts([make_fact(1, "dog's name", "Rex", [1]), make_fact(2, "cat's name", "Mog", [1])])
    me.delete_fact(1)
    assert not me.read_chat_log()
    assert me.log_message("user", "hello").id == 2


def test_facts_survive_writing_and_reading(me):
    facts = [make_fact(1, "sister's name", "Ines", [1, 4]), make_fact(2, "sister's name", "Maren", [5], 1)]
    me.write_facts(facts)
    assert me.read_facts() == facts


def test_facts_can_be_written_by_hand(me):
    (me.path / "facts.jsonl").write_text(
        '{"relation": "dog\'s name", "value": "Rex"}\n\n{"relation": "car", "value": "a van", "id": 7}'
    )
    assert me.read_facts() == [Fact(1, "dog's name", "Rex"), Fact(7, "car", "a van")]


@pytest.mark.parametrize(
    "line, error",
    [
        ("nonsense", "line 1"),
        ('{"relation": "x"}', "value"),
        ('{"relation": 1, "value": "y"}', "relation"),
        ('["x", "y"]', "relation"),
        ('{"relation": "x", "value": "y", "note": "z"}', '"note" is not a key'),
        ('{"relation": "x", "value": "y", "id": "1"}', "\"id\" of a fact cannot be '1'"),
        ('{"relation": "x", "value": "y", "sources": 5}', '"sources" of a fact cannot be 5'),
        ('{"relation": "x", "value": "y", "supersedes": [1]}', '"supersedes"'),
        ("[" * 10**5, "line 1"),
    ],
)
def test_an_invalid_line_of_the_fact_store_is_named(me, line, error):
    (me.path / "facts.jsonl").write_text(line)
    with pytest.raises(UserError, match=error):
        me.read_facts()


# -- nanoghost memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def two_facts(me, capsys):
    """A person with a dog, whose name was corrected, and a sister's birthday."""
    memory(me, add=("dog's name", "Rex"))
    memory(me, add=("sister's birthday", "the 4th of July"))
    memory(me, correct=(1, "Bello"))
    capsys.readouterr()
    return me


def test_added_and_corrected_facts_are_stored_with_a_message(two_facts):
    facts = two_facts.read_facts()
    assert [fact.value for fact in current_facts(facts)] == ["Bello", "the 4th of July"]
    assert facts[2].supersedes == 1
    assert two_facts.read_chat_log()[-1].text == "My dog's name is Bello."


def test_search_lists_matching_facts_only(two_facts, capsys):
    memory(two_facts, search="When are birthdays?")
    assert capsys.readouterr().out.count("\n") == 1


def test_listing_tells_how_many_messages_wait_for_the_next_night(two_facts, capsys):
    two_facts.log_message("user", "And a cat.")
    memory(two_facts, search="xylophone")
    output = capsys.readouterr()
    assert output.out == ""
    assert "no night has processed yet: 1" in output.err


def test_json_output_has_all_current_facts(two_facts, capsys):
    memory(two_facts, json=True)
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert [fact["value"] for fact in facts] == ["Bello", "the 4th of July"]


@pytest.mark.parametrize(
    "settings",
    [
        {"correct": (9, "x")},
        {"correct": (1, " ")},
        {"forget": 9},
        {"add": ("", "x")},
        {"add": ("a", "b"), "search": "c"},
        {"export": Path("x.tar")},
    ],
)
def test_invalid_memory_settings_change_nothing(two_facts, settings):
    before = two_facts.read_facts()
    with pytest.raises(UserError):
        memory(two_facts, **settings)
    assert two_facts.read_facts() == before


def test_add_creates_a_person_unless_the_fact_is_invalid(home):
    you = Person("you")
    with pytest.raises(UserError):
        memory(you, add=("", "x"))
    assert not you.exists
    memory(you, add=("town", "Porto"))
    assert [fact.value for fact in you.read_facts()] == ["Porto"]


def test_export_contains_everything_of_one_person(me, tmp_path):
    memory(me, add=("dog's name", "Rex"))
    Person("you").create().log_message("user", "hello")
    memory(me, export=tmp_path / "me.zip")
    names = zipfile.ZipFile(tmp_path / "me.zip").namelist()
    assert {"me/chat_log.jsonl", "me/facts.jsonl"} <= set(names)
    assert not any(name.rpartition("/")[2].startswith(".") for name in names)
    assert not any("you" in name for name in names)
    with pytest.raises(UserError, match="exists already"):
        memory(me, export=tmp_path / "me.zip")


def test_delete_needs_confirmation_and_spares_other_people(me):
    memory(me, add=("dog's name", "Rex"))
    Person("you").create().log_message("user", "hello")
    with pytest.raises(UserError, match="--yes"):
        memory(me, delete=True)
    memory(me, delete=True, yes=True)
    assert not me.exists
    assert Person("you").read_chat_log()


# -- full-text search -------------------------------------------------------------------------------------------------

SEARCHED_TEXTS = [
    "Your sister's birthday is on the 4th of July.",
    "Your dog's name is Rex.",
    "Your sister works as a vet.",
]


@pytest.mark.parametrize(
    "query, limit, matches",
    [
        ("When is my sister's birthday?", 2, [0, 2]),
        ("the birthdays", 1, [0]),
        ("what was the name of my dogs", 3, [1]),
        ("Do you know me?", 1, []),
        ('"; drop table texts --', 1, []),
    ],
)
def test_search_matches_word_stems(query, limit, matches):
    assert TextIndex(SEARCHED_TEXTS).search(query, limit) == matches


def test_facts_are_found_in_every_script(me, capsys):
    for relation, value in (
        ("town", "上海"),
        ("dog's name", "レックス"),
        ("friend", "สมชาย"),
        ("pet", "🐶"),
        ("car", "Škoda"),
    ):
        memory(me, add=(relation, value))
    for query, fact_id in (("住在上海吗", 1), ("ﾚｯｸｽは？", 2), ("ชื่อสมชายไหม", 3), ("a 🐶?", 4), ("ＳＫＯＤＡ", 5)):
        capsys.readouterr()
        memory(me, search=query)
        assert capsys.readouterr().out.split()[0] == str(fact_id), query


def test_search_in_an_empty_index_finds_nothing():
    assert TextIndex([]).search("x") == []
