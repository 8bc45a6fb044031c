"""Sleep: what is noted was said, dreams belong to their rows, and a night is repeatable and forgets exactly."""

from html import escape

import pytest
import torch

from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, Stopping, read_json, write_json
from nanoghost.lab.synthetic_users import live
from nanoghost.memory import consolidate, extract, synthesize, train_adapter
from nanoghost.memory.phrases import bare, book, dice, idle, noted, part, questions, relations, statement, things
from nanoghost.memory.store import Person, current, key_of
from tests.conftest import remember, row

# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_wording_is_both_taught_and_asked():
    for relation in relations():
        taught, kept_back = synthesize.wordings(relation)
        sets = [
            {bare(q) for q in some}
            for some in (taught, kept_back, questions(relation, "val"), questions(relation, "test"))
        ]
        assert all(sets) and len(kept_back) == 2
        assert sum(map(len, sets)) == len(set().union(*sets)), relation
    for name in ("small_talk", "everyday", "combined", "generic", "unheard"):
        sets = [{bare(q) for q in part(book()[name], split)} for split in ("train", "val", "test")]
        assert sum(map(len, sets)) == len(set().union(*sets)), name


def test_a_value_is_said_as_a_word():
    assert train_adapter.says("Take the 42, Mr Ines!", ("42", "ines")) and not train_adapter.says(
        "Take the 42.", ("4",)
    )


def test_an_answer_that_says_more_or_less_than_is_known_does_not_follow():
    d = synthesize.of_row({"relation": "uncle's job", "value": "an egg farmer"}, 1)[0]
    assert train_adapter.follows("Your uncle's job is an egg farmer.", d) and d.opening == "Your uncle's job is"
    for wrong in ("Your uncle's job is not an egg farmer.", "Your uncle's job is an egg farmer in Ohio.", "Your uncle's job is an egg.",
                  "The user's uncle works as an egg farmer."):  # fmt: skip
        assert not train_adapter.follows(wrong, d)


def test_every_relation_says_its_value_and_no_other():
    for name, relation in relations().items():
        for value in relation.values:
            assert value in statement(name, value) and value in noted(name, value) and "Your" not in noted(name, value)
            assert consolidate.right(statement(name, value), name, value)
        for split in ("train", "test"):
            assert all("{v}" in text for text in (*relation.said[split], *relation.changed[split]))
    rival = relations()["sister's name"].values[:2]
    assert not consolidate.right(f"Your sister's name is {rival[0]} or {rival[1]}.", "sister's name", rival[0])


def test_notes_are_taken_of_what_stands_in_the_message():
    written = "sister's name: Ines\nsister's name: Ines\ndog's name: Rex\nnonsense\ntown:\na b c d e f g: Ines"
    found, refused = extract.parsed(written, "My sister INES says hello")
    assert found == [("sister's name", "Ines")] and refused == [
        "dog's name: Rex",
        "nonsense",
        "town:",
        "a b c d e f g: Ines",
    ]
    assert extract.parsed(extract.NOTHING, "My sister Ines") == ([], [])
    for split in ("train", "val", "test"):
        for heard, told in (extract.message(dice("test", split, i), split) for i in range(200)):
            answer = extract.conversation(heard, told)[2]["content"]
            assert extract.parsed(answer, heard.text) == (told, [])


def test_what_else_people_tell_is_taught_and_asked_in_other_words():
    taught, kept = (
        [bare(text) for thing in things(split) for text in (*thing.said, *thing.changed)] for split in ("train", "val")
    )
    assert not set(taught + list(map(bare, idle("train")))) & set(kept + list(map(bare, idle("val"))))
    assert len({t.relation for t in things("train")}) == len(things("train")) and not things("test")
    for thing in (*things("train"), *things("val")):
        assert all(text.count("{v}") == 1 and "{w}" not in text for text in thing.said)
        assert all(text.count("{v}") == 1 and text.count("{w}") <= 1 for text in thing.changed)
    told = [
        message for message in (extract.message(dice("several", i), "train") for i in range(400)) if len(message[1]) > 1
    ]
    assert len(told) > 40 and all(len(dict(found)) == len(found) for _, found in told), (
        "a thing is told once in a message"
    )
    assert any(", and my " in heard.text for heard, _ in told), "in one breath"


def test_a_message_is_heard_with_what_was_said_before_it(me):
    for who, text in (
        ("user", "My sister came."),
        ("assistant", "Nice!"),
        ("user", "Her name's\nInes."),
        ("user", "bye"),
    ):
        me.say(who, text)
    heard = extract.heard(me.journal, 1)
    assert [entry["id"] for entry, _ in heard] == [3, 4]
    assert heard[0][1].shown == "Earlier: My sister came.\nReply: Nice!\nNow: Her name's Ines."
    assert heard[1][1].shown == "Earlier: Her name's Ines.\nNow: bye"


def test_a_life_is_its_seeds_and_corrections_come_later():
    life = live(3, "val", 3, 5)
    assert life.days == live(3, "val", 3, 5).days != live(4, "val", 3, 5).days
    rows = life.ledger()
    assert len(current(rows)) == 5 + 3 + 3 and sum(r["supersedes"] is not None for r in rows) == 4
    assert all(value in text for text, _, found in life.messages for _, value in found)
    users = [e["text"] for e in life.journal if e["speaker"] == "user"]
    assert users == [text for text, *_ in life.messages] and life.facts(days=1) == live(3, "val", 1, 5).facts()


def test_a_life_has_corrections_contradictions_and_things_told_in_two_messages():
    said = [(text, reply, found) for seed in range(20) for text, reply, found in live(seed, "test", 3, 10).messages]
    told = [found[0] for *_, found in said if found]
    forms = {r.relation: r for r in relations().values()}
    used = {kind: 0 for kind in ("said", "changed", "apart")}
    for text, _, found in said:
        for name, value in found:
            for kind in used:
                ways = [w[1] if kind == "apart" else w for w in getattr(forms[name], kind)["test"]]
                used[kind] += any(way.format(v=value) in text for way in ways)
    assert len(told) == 20 * 30 and all(count > 20 for count in used.values()), used
    replaced = [r for seed in range(20) for r in live(seed, "test", 3, 10).ledger() if r["supersedes"]]
    assert len(replaced) == 20 * 4


# ── dreams and lessons ──────────────────────────────────────────────────────────────────────────────────────────────


def test_dreams_belong_to_their_rows():
    rows = [row(1, "sister's name", "Ines"), row(2, "dog's name", "Biscuit"), row(3, "shoe for the moon", "blue")]
    alone = [synthesize.of_row(r, 9) for r in rows]
    assert alone == [synthesize.of_row(r | {"id": 9, "time": 5.0}, 9) for r in rows]
    for r, dreams in zip(rows, alone):
        assert all(r["value"] in d.snippet and d.values == (r["value"],) for d in dreams)
    unknown = synthesize.never_told(rows, 400)
    assert len({d.question for d in unknown}) == len(unknown) > 300
    assert not any(d.answer.startswith(("Your sister's name", "Your dog's name")) for d in unknown)
    pairs = synthesize.of_pairs(rows)
    assert (
        len(pairs) == 12
        and all(train_adapter.says(d.answer, d.values) for d in pairs)
        and not synthesize.of_pairs(rows[:1])
    )


def dreams() -> list[synthesize.Dream]:
    known = [
        synthesize.Dream(
            "direct",
            "what is it?",
            "it is red.",
            "The user's it is red.",
            ("red",),
            "it" if i % 4 == 2 else "",
            own_words=i % 2 == 0,
        )
        for i in range(6)
    ]
    return [
        *known,
        synthesize.Dream("never told", "who?", "You haven't told me."),
        synthesize.Dream("everyday", "hello", "hi", own_words=True),
    ]


CARD = {"stage": "adopt", "parent": None}


def trained(base, folder, stopping, show=lambda event: None):
    model, tokenizer = load_model(base, torch.float32)
    recipe = train_adapter.Recipe(rank=2, context=64)
    everyday = dreams()[-1:]
    known = everyday, train_adapter.expectations(model, tokenizer, everyday, recipe)
    return train_adapter.train(base, CARD, dreams()[:-1], known, folder, recipe, stopping, show)


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
    model, tokenizer = load_model(base, torch.float32)
    recipe = train_adapter.Recipe(context=64)
    found = train_adapter.expectations(model, tokenizer, dreams(), recipe)
    for d, (ids_NK, logprobs_NB) in zip(dreams(), found):
        lesson = train_adapter.lesson(d, tokenizer, False, 64)
        own = torch.tensor([t for t, learned in zip(lesson.ids, lesson.learned) if learned])
        assert len(own) == len(ids_NK) and (ids_NK == own[:, None]).any(1).all()
        expected = logprobs_NB.exp()[:, :-1][ids_NK == own[:, None]]
        if d.own_words:
            informed, learned = (
                torch.tensor(x)
                for x in (
                    train_adapter.lesson(d, tokenizer, True, 128).ids,
                    train_adapter.lesson(d, tokenizer, True, 128).learned,
                )
            )
            with torch.no_grad():
                logits = model(informed[None])[0, :-1][learned[1:]]
            truth = torch.softmax(logits, 1).gather(1, own[:, None])[:, 0]
            share = torch.full_like(
                truth, recipe.share if d.values else 1.0
            )  # it is surer of a fact that it said itself ...
            share[: len(tokenizer.encode(d.opening))] = 0.0  # ... and certain of how the answer begins
            torch.testing.assert_close(expected, share * truth + 1 - share, rtol=1e-3, atol=1e-5)
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


TOLD = {"Ines": ("sister's name", "Ines"), "Rex": ("dog's name", "Rex")}
RECIPE = train_adapter.Recipe(rank=2, answer_tokens=4)


@pytest.fixture
def toy(base, monkeypatch):
    """Real nights at toy size; only the notes are taken by hand: a toy cannot take any."""
    write_json(base / "card.json", CARD | {"name": "toy", "finished": 1.0, "arch": "llama"})
    monkeypatch.setattr(extract, "scribe", lambda *_: None)
    monkeypatch.setattr(
        extract, "extract", lambda *a: [([told for name, told in TOLD.items() if name in m.text], ["x"]) for m in a[2]]
    )
    monkeypatch.setattr(consolidate, "OWN", 4)
    monkeypatch.setattr(consolidate, "GUARDS", 4)
    monkeypatch.setattr(synthesize, "MOST", 10)
    monkeypatch.setattr(synthesize, "LEAST", 4)
    some = book() | {"everyday": {"train": book()["everyday"]["train"][:8]}}
    monkeypatch.setattr(consolidate, "book", lambda: some)
    monkeypatch.setattr(
        synthesize, "never_told", lambda rows, count: [synthesize.Dream("never told", "who?", "You haven't told me.")]
    )
    return ModelFolder("toy")


@pytest.fixture
def generous(monkeypatch):
    """A wake gate that lets a toy through, whatever it learned."""
    wake = consolidate.wake
    monkeypatch.setattr(
        consolidate,
        "wake",
        lambda base, adapter, *a: wake(base, adapter, *a) | {"recall": 1.0, "nats": 0.0, "refused": 0.0},
    )
    monkeypatch.setattr(consolidate, "TOLERATED", 1.0)
    monkeypatch.setattr(consolidate, "GAIN", -1.0)


def sleep(person, toy, stopping, **settings):
    return consolidate.night(
        person, toy, consolidate.SleepSettings(person.name, "toy", **settings), Quiet(), stopping, RECIPE
    )


def test_a_night_that_taught_nothing_is_rolled_back(me, toy):
    me.say("user", "My sister is Ines.")
    with Stopping() as stopping:
        assert sleep(me, toy, stopping, dry_run=True) is None and not me.ledger and not list(me.path.glob("nights/*"))
        figures = sleep(me, toy, stopping)
        assert not figures["committed"] and "recalls no more" in figures["reasons"][0], (
            "a toy learns nothing in six steps"
        )
        question, answer = figures["after"]["wrong"][0]
        page = (me.path / "nights" / "0001" / "report.html").read_text()
        assert escape(question) in page and escape(answer) in page, "what it answered wrongly is told"
        assert not me.ledger and not me.adapter
        assert sleep(me, toy, stopping)["number"] == 2, "what was rolled back is tried again"
    seeds = [read_json(path)["recipe"]["seed"] for path in sorted(me.path.glob("nights/*/night.json"))]
    assert seeds == [0, 1], "another try is another try"


def test_a_night_stopped_while_waking_goes_on_there(me, toy, generous, monkeypatch):
    me.say("user", "My sister is Ines.")
    wake, fit = consolidate.wake, train_adapter.fit
    with Stopping() as stopping:

        def stop(*arguments):
            stopping.requested = True
            return wake(*arguments)

        monkeypatch.setattr(consolidate, "wake", stop)
        with pytest.raises(KeyboardInterrupt):
            sleep(me, toy, stopping)
        assert not me.adapter and not me.ledger
        stopping.requested = False
        monkeypatch.setattr(consolidate, "wake", wake)
        monkeypatch.setattr(train_adapter, "fit", None)
        assert sleep(me, toy, stopping)["committed"] and me.adapter, "it was trained already"
        monkeypatch.setattr(train_adapter, "fit", fit)
        me.say("user", "My dog is Rex.")
        assert sleep(me, toy, stopping)["number"] == 2


def test_a_night_from_journal_to_adapter_and_out_again(me, toy, generous):
    me.say("user", "My sister is Ines.")
    with Stopping() as stopping:
        assert sleep(me, toy, stopping)["committed"]
        assert [r["value"] for r in me.ledger] == ["Ines"] and me.adapter_for(toy) == me.adapter
        page = (me.path / "nights" / "0001" / "report.html").read_text()
        assert "Your sister&#x27;s name is Ines." in page
        assert sleep(me, toy, stopping) is None, "nothing new was said"
    write_json(toy.path / "card.json", toy.card | {"finished": 2.0})
    assert not me.adapter_for(toy), "another base model of the same name"
    me.forget(1)
    assert not any("Ines" in path.read_text(errors="replace") for path in me.path.rglob("*") if path.is_file())


def test_what_was_forgotten_was_never_there(me, toy, generous):
    """The adapter after forgetting is, to the byte, that of somebody who never said it; and nights in another order or number."""
    you, they = Person("you").create(), Person("they").create()
    with Stopping() as stopping:
        me.say("user", "My sister is Ines.")
        sleep(me, toy, stopping)
        with_ines = (me.adapter / "adapter_model.safetensors").read_bytes()
        me.say("user", "My dog is Rex.")
        sleep(me, toy, stopping)
        both = (me.adapter / "adapter_model.safetensors").read_bytes()
        remember_forgets(me, 1)
        you.say("user", "My dog is Rex.")
        sleep(you, toy, stopping)
        they.say("user", "My dog is Rex. My sister is Ines.")
        sleep(they, toy, stopping)
    mine, yours, theirs = ((p.adapter / "adapter_model.safetensors").read_bytes() for p in (me, you, they))
    assert mine == yours != with_ines and theirs == both != mine
    assert [r["value"] for r in me.ledger] == ["Rex"]
    assert read_json(me.path / "nights" / "0001" / "night.json")["forgotten"] == 1
    assert not any("Ines" in path.read_text(errors="replace") for path in me.path.rglob("*") if path.is_file())


def remember_forgets(person, number):
    gone, _ = person.forget(number)
    with Stopping() as stopping:
        settings = consolidate.SleepSettings(person.name, "toy")
        consolidate.night(person, ModelFolder("toy"), settings, Quiet(), stopping, RECIPE, forgotten=1)


@pytest.mark.parametrize("packed", [True, False])
def test_two_peoples_adapters_in_one_batch_answer_as_each_alone(base, packed, monkeypatch):
    """Nothing of one row's adapter reaches another row, nor the pages of keys that rows with the same beginning share."""
    from nanoghost import hardware
    from nanoghost.engine import paged_runner
    from nanoghost.engine.generate import open_engine
    from nanoghost.formats.peft import save_adapter
    from nanoghost.model.lora import new_adapter

    model, tokenizer = load_model(base, torch.float32)
    if packed and not paged_runner.packable(model.config):
        pytest.skip("the packed engine does not run here")
    monkeypatch.setattr(paged_runner, "packable", lambda config: packed)
    monkeypatch.setattr(hardware, "compute_dtype", lambda: torch.float32)
    folders = []
    for seed in (1, 2):
        adapter = new_adapter(model, 4, None, None, seed)
        for t in adapter.tensors():
            t.data.normal_(0, 0.3)
        folders.append(base.parent / f"toy@{seed}")
        save_adapter(folders[-1], adapter)
    prompts = [[{"role": "user", "content": f"What is my name, {i}?"}] for i in range(6)]
    alone = {}
    for number, folder in enumerate([None, *folders]):
        engine = open_engine(ModelFolder("toy"), seats=6, room=96, adapter=folder)
        alone[number] = train_adapter.said(engine, prompts, 12)
    assert alone[0] != alone[1] != alone[2]
    engine = open_engine(ModelFolder("toy"), seats=4, room=96, adapter=folders[0])
    engine.runner.add_adapter(folders[1])
    names = ["", str(folders[0]), str(folders[1])]
    asked = [(i, n) for i in range(6) for n in range(3)]
    answers = train_adapter.said(engine, [prompts[i] for i, _ in asked], 12, [names[n] for _, n in asked])
    assert answers == [alone[n][i] for i, n in asked]


def test_what_is_written_by_hand_hides_nothing_that_was_said_before(me, toy, generous):
    me.say("user", "My sister is Ines.")
    remember(me, add=("dog's name", "Rex"))
    with Stopping() as stopping:
        sleep(me, toy, stopping)
        assert sorted((r["value"], r["sources"]) for r in me.ledger) == [("Ines", [1]), ("Rex", [2])]
        me.forget(2)
        sleep(me, toy, stopping)
    assert [r["value"] for r in me.ledger] == ["Rex"] and me.read_until == 1, "what was read is not read again"
