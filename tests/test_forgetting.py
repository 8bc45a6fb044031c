"""Forgetting a fact: what mentions it is deleted in every script and form, and what is left is shown."""

import io
import shutil
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, line_history
from nanoghost.memory.answers import contains_values
from nanoghost.memory.mentions import Mentions
from nanoghost.memory.store import Person
from nanoghost.tools.text_forms import fold, whole_word
from tests.support.people import make_fact, memory

NFD = "NFD"

CERTAIN = [
    (
        "Rex",
        ["My dog REX barks.", "Rex's bowl", "two Rexs", "_Rex_", "Ｒｅｘ", "Re\u200bx", "Re\u00adx", "Rexは犬です"],
    ),
    ("José", ["JOSÉ", unicodedata.normalize(NFD, "josé is here")]),
    ("Straße", ["STRASSE"]),
    ("上海", ["我住在上海市。", "in 上海!"]),
    ("レックス", ["私の犬はレックスです", "ﾚｯｸｽ"]),
    ("สมชาย", ["ผมชื่อสมชายครับ"]),
    ("렉스", ["렉스는 개예요", unicodedata.normalize(NFD, "우리 렉스가")]),
    ("🐶", ["I love🐶!", "🐱🐶"]),
    ("New York", ["new\nyork", "New\u00a0York", "New\x1cYork\u2028"]),
    ("C++", ["I write c++."]),
]
POSSIBLE = [
    ("Rex", ["Rexona", "Rexin koira", "Rexem"]),
    ("Анна", ["Анне", "у Анны", "Аннушка"]),
    ("José", ["Jose"]),
    ("安", ["我叫安", "安全"]),
    ("上海", ["上 海"]),
    ("رکس", ["ورکس", "الرکس"]),
    ("New York", ["New-York", "NewYork", "York"]),
    ("Ines Holt", ["Ines called."]),
    ("+491701234567", ["+49 170 1234567"]),
    ("Maren", ["Marenka", "Remaren"]),
    ("Łukasz", ["I met LUKASZ", "Lukasza"]),
    ("Köln", ["Koeln", "in koln"]),
    ("Mueller", ["Müller", "Muller"]),
    ("Ørsted", ["Orsted", "Oersted"]),
    ("Æsa Holt", ["Aesa"]),
    ("Åse", ["Aase", "Ase"]),
    ("Joe", ["Joey"]),
    ("Zoë", ["Zoey", "Zoe"]),
    ("さくら", ["サクラは花です", "ｻｸﾗ"]),
    ("ガガ", ["ががさん"]),
]
UNRELATED = [
    ("Rex", ["T. rxe", "the tyre x"]),
    ("Maren", ["I am around", "nightmare"]),
    ("4", ["42", "the 4th", "1.500"]),
    ("Al", ["also", "all of it"]),
    ("the 4th of July", ["of the"]),
    ("上海", ["上午 海"]),
    ("\u200b", ["", "anything"]),
    ("Joe", ["joy", "a job"]),
    ("臺北", ["台北"]),  # a table would be needed
]


def cases(table):
    return [(value, text) for value, texts in table for text in texts]


@pytest.mark.parametrize("value, text", cases(CERTAIN))
def test_a_value_is_found_in_every_script_and_unicode_form(value, text):
    assert Mentions.of([value]).is_certain(text)


@pytest.mark.parametrize("value, text", cases(POSSIBLE))
def test_inflected_and_partial_values_are_possible_mentions(value, text):
    mentions = Mentions.of([value])
    assert mentions.is_possible(text)
    assert not mentions.is_certain(text)


@pytest.mark.parametrize("value, text", cases(UNRELATED))
def test_other_texts_do_not_mention_a_value(value, text):
    assert not Mentions.of([value]).is_possible(text)


@given(st.text(min_size=1, max_size=8), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_every_visible_value_is_possibly_mentioned_by_itself(value, form):
    """Except for values of unassigned or combining characters alone, which nobody can see."""
    if any(unicodedata.category(c)[0] in "LN" for c in fold(value)):
        assert Mentions.of([value]).is_possible(unicodedata.normalize(form, f"a {value}, b"))


def test_a_whole_word_in_a_script_without_blanks_counts_as_recalled():
    assert contains_values("あなたの犬の名前はレックスです。", ("レックス",))
    assert contains_values("You live in 上海市.", ("上海",))
    assert not whole_word("4").search("42")


# -- nanoghost memory --forget ----------------------------------------------------------------------------------------


@pytest.fixture
def dog_owner(me):
    """A person whose dog Rex is mentioned in several forms."""
    me.log_message("user", "My dog is Rex.")
    me.log_message("assistant", "Rexs are friendly!")
    me.log_message("user", "うちのRexは元気です")
    me.log_message("user", "I use Rexona.\nEvery day.")
    me.log_message("user", "It rains.")
    me.write_facts([make_fact(1, "dog's name", "Rex", [1]), make_fact(2, "favorite film", "Rex and I")])
    return me


def chat_log_texts(person: Person) -> list[str]:
    return [entry.text for entry in person.read_chat_log()]


def test_possible_mentions_are_shown_before_anything_is_deleted(dog_owner, capsys):
    facts, texts = dog_owner.read_facts(), chat_log_texts(dog_owner)
    with pytest.raises(UserError, match="messages may mention your dog's name: add --mentions delete or keep"):
        memory(dog_owner, forget=1)
    assert "message 4 (user): I use Rexona. Every day." in capsys.readouterr().err
    assert (dog_owner.read_facts(), chat_log_texts(dog_owner)) == (facts, texts)


def test_what_is_left_is_shown_before_the_fact_is_said_to_be_deleted(dog_owner, capsys):
    (dog_owner.path / "facts.jsonl~").write_text("a backup that an editor made: Rex")
    (dog_owner.path / "facts.jsonl.old").write_text("something else")
    line_history().write_text("hello Rex")
    memory(dog_owner, forget=1, mentions="keep")
    shown, _, deleted = capsys.readouterr().err.partition("deleted: ")
    assert deleted.startswith("your dog's name, 3 messages")
    assert "adapter" not in deleted, "there was none"
    for line in (
        "message 4 (user): I use Rexona. Every day.",
        "fact 2: Your favorite film is Rex and I.",
        f"file {dog_owner.path / 'facts.jsonl~'}",
        f"file {line_history()}",
    ):
        assert line in shown
    assert "facts.jsonl.old" not in shown
    assert chat_log_texts(dog_owner) == ["I use Rexona.\nEvery day.", "It rains."]


@pytest.mark.parametrize("answer, number_left", [("y\n", 1), ("n\n", 2), ("", 2)])
def test_on_a_terminal_the_person_decides_about_possible_mentions(dog_owner, monkeypatch, answer, number_left):
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    memory(dog_owner, forget=1)
    assert len(dog_owner.read_chat_log()) == number_left


def test_possible_mentions_can_be_deleted_too(dog_owner, capsys):
    memory(dog_owner, forget=1, mentions="delete")
    assert chat_log_texts(dog_owner) == ["It rains."]
    assert "message" not in capsys.readouterr().err.partition("deleted: ")[0]


@pytest.mark.parametrize("value, texts", CERTAIN)
def test_no_file_mentions_a_forgotten_value(me, value, texts):
    for text in texts:
        me.log_message("assistant", text)
    memory(me, add=("name", value))
    (me.path / "line_history").write_text("\n".join(texts))
    (me.path / ".chat_log.jsonl.1.2.tmp").write_text("\n".join(texts))  # left by a crash
    (me.path / "nights" / "0001").mkdir(parents=True)
    (me.path / "nights" / "0001" / "report.html").write_text(value)
    memory(me, forget=1)
    mentions = Mentions.of([value])
    files = [path for path in me.path.rglob("*") if path.is_file()]
    assert len(files) >= 2
    assert not [path for path in files if mentions.is_possible(path.read_text())]


def test_a_value_without_visible_characters_takes_nothing_else_with_it(me):
    me.log_message("user", "It rains.")
    me.write_facts([make_fact(1, "name", "\u200b")])
    memory(me, forget=1)
    assert chat_log_texts(me) == ["It rains."]


def test_a_file_that_cannot_be_deleted_keeps_the_fact_listed(me, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    me.write_facts([make_fact(1, "dog's name", "Rex")])
    (me.path / "nights" / "0001").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        me.delete_fact(1)
    assert me.read_facts()


def test_forgetting_works_after_the_base_model_was_removed(me):
    me.write_facts([make_fact(1, "dog's name", "Rex")])
    (me.path / "adapter").mkdir()
    (me.path / "adapter" / "adapter_model.safetensors").write_text("")
    (me.path / "adapter" / "inputs.json").write_text('{"base": "gone", "base_finished": 1, "facts": []}')
    assert not ModelFolder("gone").exists
    memory(me, forget=1)
    assert not me.read_facts()
    assert not me.adapter


def test_mentions_option_needs_forget(me):
    with pytest.raises(UserError, match="--mentions needs --forget"):
        memory(me, mentions="keep")
