"""Sleep: journal and ledger lose nothing and keep to themselves, dreams belong to their rows, and a night is repeatable."""

import stat

import pytest
import torch

from nanoghost.errors import UserError
from nanoghost.lab.sleep import live
from nanoghost.model.llama import Llama, LlamaConfig
from nanoghost.model.weights import save_model
from nanoghost.people import Person, current, key_of
from nanoghost.runs import ModelFolder, Stopping, home, write_json
from nanoghost.sleep import dream, extract, learn, night
from nanoghost.sleep.phrases import bare, book, noted, questions, relations, statement
from nanoghost.tokenizer import Tokenizer
from tests.conftest import toy_text


@pytest.fixture
def me(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOGHOST_HOME", str(tmp_path))
    return Person("me").create()


def row(number, relation, value, sources=(), supersedes=None):
    return {"id": number, "subject": "user", "relation": relation, "value": value, "time": number, "sources": list(sources),
            "supersedes": supersedes}  # fmt: skip


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
    me.forget(2)
    assert me.ledger == rows[2:] and me.journal == entries[2:]
    assert not me.adapter and not any((me.path / "nights").iterdir())
    with pytest.raises(UserError, match="no row 2"):
        me.forget(2)


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_wording_is_both_taught_and_asked():
    for relation in relations():
        taught, kept_back = dream.wordings(relation)
        sets = [{bare(q) for q in some} for some in (taught, kept_back, questions(relation, "test"))]
        assert all(sets) and len(kept_back) == dream.KEPT_BACK
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2]), relation
    for name in ("small_talk", "everyday", "combined", "generic"):
        assert not {bare(q) for q in book()[name]["train"]} & {bare(q) for q in book()[name]["test"]}


def test_every_relation_says_its_value_and_no_other():
    for name, relation in relations().items():
        for value in relation.values:
            assert value in statement(name, value) and value in noted(name, value) and "Your" not in noted(name, value)
            assert night.right(statement(name, value), name, value)
        for split in ("train", "test"):
            assert all("{v}" in text for text in (*relation.said[split], *relation.changed[split]))
    rival = relations()["sister's name"].values[:2]
    assert not night.right(f"Your sister's name is {rival[0]} or {rival[1]}.", "sister's name", rival[0])


def test_notes_are_taken_of_what_stands_in_the_message():
    written = "sister's name: Ines\nsister's name: Ines\ndog's name: Rex\nnonsense\ntown:\na b c d e f g: Ines"
    assert extract.parsed(written, "My sister INES says hello") == [("sister's name", "Ines")]
    assert extract.parsed(extract.NOTHING, "My sister Ines") == []
    for messages in extract.lessons(200):
        asked, answer = messages[1]["content"], messages[2]["content"]
        found = extract.parsed(answer, asked)
        assert answer == extract.NOTHING or "\n".join(f"{r}: {v}" for r, v in found) == answer


def test_a_life_is_its_seeds_and_corrections_come_later():
    life = live(3, "val", 3, 5)
    assert life.days == live(3, "val", 3, 5).days != live(4, "val", 3, 5).days
    rows = life.ledger()
    assert len(current(rows)) == 5 + 3 + 3 and sum(r["supersedes"] is not None for r in rows) == 4
    for text, found in (m for day in life.days for m in day):
        assert all(value in text for _, value in found)


# ── dreams and lessons ──────────────────────────────────────────────────────────────────────────────────────────────


def test_dreams_belong_to_their_rows():
    rows = [row(1, "sister's name", "Ines"), row(2, "dog's name", "Biscuit"), row(3, "shoe for the moon", "blue")]
    alone = [dream.of_row(r) for r in rows]
    assert alone == [dream.of_row(r | {"id": 9, "time": 5.0}) for r in rows]
    for r, dreams in zip(rows, alone):
        assert all(r["value"] in d.snippet and d.values == (r["value"],) for d in dreams)
    unknown = dream.never_told(rows, 400)
    assert len({d.question for d in unknown}) == len(unknown) > 300
    assert not any("sister's name" in d.answer or "dog's name" in d.answer for d in unknown)
    pairs = dream.of_pairs(rows)
    assert len(pairs) == 3 and all(learn.says(d.answer, d.values) for d in pairs) and not dream.of_pairs(rows[:1])


@pytest.fixture
def base(me):
    """A toy Llama's folder, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train([toy_text(300)], 300)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 512, 2, 32, 2, 1, 48))
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    folder = home() / "models" / "toy"
    folder.mkdir(parents=True)
    save_model(folder, model, tokenizer)
    return folder


def dreams() -> list[dream.Dream]:
    known = [
        dream.Dream("direct", "what is it?", "it is red.", "The user's it is red.", ("red",), own_words=i % 2 == 0)
        for i in range(6)
    ]
    return [
        *known,
        dream.Dream("never told", "who?", "You haven't told me."),
        dream.Dream("everyday", "hello", "hi", own_words=True),
    ]


CARD = {"stage": "adopt", "parent": None}


def trained(base, folder, stopping, show=lambda event: None):
    recipe = learn.Recipe(rank=2, passes=3, rows=1, context=64)
    return learn.train(base, CARD, dreams(), folder, recipe, stopping, show)


def test_a_night_is_a_function_and_goes_on_where_it_was(base, me, monkeypatch):
    with Stopping() as stopping:
        figures = trained(base, me.path / "one", stopping)
        stopping.requested = False

        def stop(event):
            stopping.requested = event["step"] == figures["steps"] // 2

        with pytest.raises(KeyboardInterrupt):
            trained(base, me.path / "two", stopping, stop)
        assert not (me.path / "two" / "adapter").exists()
        stopping.requested = False
        trained(base, me.path / "two", stopping)
    one, two = ((me.path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_teacher_sees_the_snippet_and_only_its_own_words_are_its_probabilities(base):
    from nanoghost.model.weights import load_model

    model, tokenizer = load_model(base, torch.float32)
    recipe = learn.Recipe(context=64)
    found = learn.expectations(model, tokenizer, dreams(), recipe)
    for d, (ids_NK, logprobs_NB) in zip(dreams(), found):
        lesson = learn.lesson(d, tokenizer, False, 64)
        own = torch.tensor([t for t, learned in zip(lesson.ids, lesson.learned) if learned])
        assert len(own) == len(ids_NK) and (ids_NK == own[:, None]).any(1).all()
        expected = logprobs_NB.exp()[:, :-1][ids_NK == own[:, None]]
        if d.own_words:
            informed, learned = (
                torch.tensor(x)
                for x in (learn.lesson(d, tokenizer, True, 128).ids, learn.lesson(d, tokenizer, True, 128).learned)
            )
            with torch.no_grad():
                logits = model(informed[None])[0, :-1][learned[1:]]
            truth = torch.softmax(logits, 1).gather(1, own[:, None])[:, 0]
            torch.testing.assert_close(expected, truth, rtol=1e-3, atol=1e-5)
        else:
            assert (expected == 1).all()


def test_the_order_of_telling_leaves_no_trace():
    rows = [row(1, "sister's name", "Ines"), row(2, "dog's name", "Biscuit")]
    one, other = (sorted(current(some), key=key_of) for some in (rows, rows[::-1]))
    assert [r["value"] for r in one] == [r["value"] for r in other]


class Quiet:
    def say(self, text):
        self.said = text

    def __call__(self, event):
        pass


def test_a_night_from_journal_to_adapter_and_out_again(base, me, monkeypatch):
    """The real night at toy size; only the notes are taken by hand: a toy cannot take any."""
    write_json(base / "card.json", CARD | {"name": "toy", "finished": 1.0, "arch": "llama"})
    me.say("user", "My sister is Ines.")
    monkeypatch.setattr(extract, "scribe", lambda *_: None)
    monkeypatch.setattr(extract, "extract", lambda _, texts: [[("sister's name", "Ines")] if "Ines" in t else [] for t in texts])
    monkeypatch.setattr(night, "OWN", 4)
    monkeypatch.setattr(night, "EVERYDAY", 4)
    some = book() | {"everyday": {"train": book()["everyday"]["train"][:8], "test": []}}
    for module in (dream, night):
        monkeypatch.setattr(module, "book", lambda: some)
    monkeypatch.setattr(dream, "never_told", lambda rows, count: [dream.Dream("never told", "who?", "You haven't told me.")])
    settings, display, recipe = night.SleepSettings("me", "toy"), Quiet(), learn.Recipe(rank=2, passes=2, answer_tokens=4)
    with Stopping() as stopping:
        assert night.night(me, ModelFolder("toy"), night.SleepSettings("me", "toy", dry_run=True), display, stopping, recipe) is None
        assert "Ines" in display.said and not me.ledger
        figures = night.night(me, ModelFolder("toy"), settings, display, stopping, recipe)
        assert not figures["committed"] and "recalls no more" in figures["reasons"][0], "a toy learns nothing in six steps"
        assert not me.ledger and not me.adapter
        better = iter([0.0, 1.0])
        wake = night.wake
        monkeypatch.setattr(night, "MOST_NATS", 99.0)
        monkeypatch.setattr(night, "wake", lambda *a: wake(*a) | {"recall": next(better)})
        figures = night.night(me, ModelFolder("toy"), settings, display, stopping, recipe)
        assert figures["committed"] and figures["number"] == 2, "what was rolled back is tried again"
        assert [r["value"] for r in me.ledger] == ["Ines"] and me.adapter
        assert me.adapter_for(ModelFolder("toy")) and not me.adapter_for(ModelFolder("other"))
        page = (me.path / "nights" / "0002" / "report.html").read_text()
        assert "Your sister&#x27;s name is Ines." in page
        assert night.night(me, ModelFolder("toy"), settings, display, stopping, recipe) is None, "nothing new was said"
    me.forget(1)
    assert not any("Ines" in path.read_text(errors="replace") for path in me.path.rglob("*") if path.is_file())
