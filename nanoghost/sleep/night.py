"""`nanoghost sleep --person NAME`: what was said today becomes part of the model that this person talks to.

    journal -> ledger (extract.py) -> dreams (dream.py) -> adapter (learn.py) -> wake gate -> people/NAME/adapter

Every night starts from the base model and goes through the whole ledger, so an adapter holds what the ledger holds and
nothing else. It replaces the one before only if it recalls more of the ledger and leaves the rest of the mind alone.
Ctrl-C loses nothing: each step's result is in the night's folder, and the same command goes on there.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass

import torch

from nanoghost import machine
from nanoghost.engine.generate import open_engine
from nanoghost.errors import UserError
from nanoghost.evals.skills import wilson
from nanoghost.model.lora import attach, read_adapter
from nanoghost.model.weights import load_model
from nanoghost.people import Person, current, key_of, open_person
from nanoghost.progress import Display
from nanoghost.runs import ModelFolder, Stopping, open_model, read_json, write_json, writing
from nanoghost.sleep import dream, extract, learn, report
from nanoghost.sleep.phrases import bare, book, relations, statement
from nanoghost.train.distill_loss import divergence, student_buckets
from nanoghost.train.packing import fill
from nanoghost.train.stage import base_card

EVERYDAY = 120  # prompts that are dreamt of; the others of the train list are for the wake gate
OWN = 240  # more prompts, which the base model itself thinks of
MOST_NATS = 0.1  # that the answers to everyday prompts may move away from the base model's, per token
MOST_REFUSED = 0.1  # of what is known


@dataclass(frozen=True)
class SleepSettings:
    person: str
    """Whose day it was."""
    model: str = "smollm2"
    """The base model that this person talks to."""
    dry_run: bool = False
    """Show what would be learned, and the ledger, and do nothing."""
    log: bool = False
    """List the nights."""
    forget: int | None = None
    """Remove a row of the ledger, and what was said of it, before sleeping; the new adapter never saw it."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: SleepSettings) -> None:
    machine.prepare()
    person = open_person(settings.person)
    if settings.log:
        show_nights(person, settings.json)
        return
    base = open_model(settings.model)
    if "@" in base.name or base.card["arch"] == "ghost":
        raise UserError(f"'{base.name}' cannot sleep: it takes a whole model of the Llama family, such as smollm2")
    if settings.dry_run and settings.forget is not None:
        raise UserError("--dry-run does nothing, and --forget removes: choose one")
    with writing(person), Stopping() as stopping:
        if settings.forget is not None:
            gone = person.forget(settings.forget)
            Display().say(f"removed from the ledger and the journal: your {gone['relation']}, {gone['value']}")
        figures = night(person, base, settings, Display(), stopping)
    if settings.json and figures:
        print(json.dumps(figures))


def night(person: Person, base: ModelFolder, settings, display, stopping, recipe: learn.Recipe | None = None) -> dict | None:
    """One night; returns its figures, or None where there was nothing to do."""
    recipe = recipe or learn.Recipe()
    awake = [n for n in map(read_json, sorted((person.path / "nights").glob("*/night.json"))) if "finished" in n]
    number = len(awake) + 1
    folder = person.path / "nights" / f"{number:04}"
    known_from = [source for row in person.ledger for source in row["sources"]]
    since = max([*known_from, *(n["read"] for n in awake if n["committed"])], default=0)
    today = [e for e in person.journal if e["id"] > since and e["speaker"] == "user"]
    record = read_json(folder / "night.json") if (folder / "night.json").exists() else {"number": number, "began": time.time()}

    if "told" not in record or record["read"] != max((e["id"] for e in today), default=since):
        scribe = extract.scribe(base.name, display)
        display.say(f"night {number}: reading what {person.name} said ({len(today)} messages)")
        told = extract.extract(scribe, [e["text"] for e in today])
        record |= {"told": [[e["id"], found] for e, found in zip(today, told) if found],
                   "read": max((e["id"] for e in today), default=since)}  # fmt: skip
    entries = {e["id"]: e for e in person.journal}
    told = [(entries[i], [tuple(pair) for pair in found]) for i, found in record["told"] if i in entries]
    ledger, new, corrected = extract.merge(person.ledger, told)
    if settings.dry_run:
        show_ledger(ledger, new, corrected, display)
        return None
    rows = sorted(current(ledger), key=key_of)
    holds = [[r["relation"], r["value"]] for r in rows]
    if not rows or (person.adapter and read_json(person.adapter / "rows.json") == holds):
        display.say("nothing new was said: there is nothing to learn" if rows else "nothing is known: there is nothing to learn")
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "night.json", record)

    dreams, thought = think(rows, base, folder, recipe, display)
    trained = learn.train(base.path, base_card(base.card), dreams, folder, recipe, stopping, display)
    write_json(folder / "adapter" / "rows.json", holds)
    display.say("waking up: does it know what it learned, and is the rest as it was?")
    before = wake(base, person.adapter, rows, recipe)
    after = wake(base, folder / "adapter", rows, recipe)
    reasons = [text for text, wrong in (
        (f"it recalls no more than before ({after['recall']:.0%}, was {before['recall']:.0%})", after["recall"] <= before["recall"]),
        (f"everyday answers moved by {after['nats']:.3f} nats a token", after["nats"] > MOST_NATS),
        (f"it refused {after['refused']:.0%} of what it knows", after["refused"] > MOST_REFUSED),
    ) if wrong]  # fmt: skip
    record |= {"finished": time.time(), "committed": not reasons, "reasons": reasons, "base": base.name, "recipe": asdict(recipe),
               "learned": [statement(r["relation"], r["value"]) for r in new], "corrected": [r["relation"] for r in corrected],
               "rows": len(rows), "thought": thought, "trained": trained, "before": before, "after": after}  # fmt: skip
    if not reasons:  # a crash between the two leaves a ledger that is behind, and the next night does this one again
        replace_adapter(person, folder / "adapter")
        person.write_ledger(ledger)
    write_json(folder / "night.json", record)
    report.write(folder / "report.html", person.name, record)
    shutil.rmtree(folder / "state", ignore_errors=True)
    display.say(
        f"night {number}: {'kept' if not reasons else 'rolled back: ' + '; '.join(reasons)}; recalls {after['recall']:.0%} of"
        f" {len(rows)} facts in wordings kept back ({before['recall']:.0%} before)\nreport: {folder / 'report.html'}"
    )
    return {k: record[k] for k in ("number", "committed", "reasons", "rows", "thought", "trained", "before", "after")}


def replace_adapter(person: Person, made) -> None:
    """Put the night's adapter in the place of the old one."""
    old = person.path / ".adapter.old"
    shutil.rmtree(old, ignore_errors=True)
    if (person.path / "adapter").exists():
        os.replace(person.path / "adapter", old)
    os.replace(made, person.path / "adapter")
    shutil.rmtree(old, ignore_errors=True)


def think(rows: list[dict], base: ModelFolder, folder, recipe, display) -> tuple[list[dream.Dream], dict]:
    """All dreams of a night with their answers, and figures about them; kept in the night's folder."""
    path = folder / "dreams.json"
    if path.exists():
        kept = read_json(path)
        if kept["rows"] == [[r["relation"], r["value"]] for r in rows]:
            return [dream.Dream(**(d | {"values": tuple(d["values"])})) for d in kept["dreams"]], kept["thought"]
    own = [d for row in rows for d in dream.of_row(row)] + dream.of_pairs(rows)
    engine = open_engine(base, seats=32, room=256)
    asked = learn.own_questions(OWN, engine.runner, engine.tokenizer)
    every = own + dream.never_told(rows, max(300, 2 * len(own))) + dream.everyday(EVERYDAY, asked)
    display.say(f"thinking it through: {len(own)} questions about {len(rows)} facts, {len(every) - len(own)} about other things")
    known = {q: statement(r["relation"], r["value"]) for r in rows for q in dream.wordings(r["relation"])[0]}
    dreams, replaced = learn.answered(every, lambda d: known[d.question], engine.runner, engine.tokenizer, recipe)
    unlike, alike = {}, 0
    for d in dreams:  # the same question with the same answer, but for capitals and marks, is dreamt of once
        key = bare(d.question + d.answer)
        alike += key in unlike
        unlike.setdefault(key, d)
    dreams = list(unlike.values())
    words = [w for d in dreams if d.kind != "everyday" for w in zip(*(d.question.split()[i:] for i in range(3)))]
    thought = {"dreams": len(dreams), "answers_replaced": replaced, "duplicates": alike,
               "distinct_trigrams": round(len(set(words)) / max(1, len(words)), 3)}  # fmt: skip
    write_json(path, {"rows": [[r["relation"], r["value"]] for r in rows], "thought": thought, "dreams": [asdict(d) for d in dreams]})
    return dreams, thought


# ── the wake gate ───────────────────────────────────────────────────────────────────────────────────────────────────


def refuses(answer: str) -> bool:
    return "haven't told" in answer or "have not told" in answer


def right(answer: str, relation: str, value: str) -> bool:
    """The value is said, and no other that the same thing might have."""
    rivals = [v for v in relations()[relation].values if v != value] if relation in relations() else []
    return learn.says(answer, (value,)) and not any(learn.says(answer, (v,)) for v in rivals)


def wake(base: ModelFolder, adapter, rows: list[dict], recipe) -> dict:
    """Recall in wordings that were kept back, refusals where it knows and where it does not, and how far everyday answers moved."""
    ask = learn.Answers(base, adapter)
    asked = [(row, q) for row in rows for q in dream.wordings(row["relation"])[1]]
    answers = ask([q for _, q in asked])
    told = {row["relation"].casefold() for row in rows}
    unknown = [dream.wordings(r)[1][0] for r in relations() if r.casefold() not in told][:40]
    refused = [refuses(a) for a in ask(unknown)]
    solved = sum(right(a, row["relation"], row["value"]) for a, (row, _) in zip(answers, asked))
    low, high = wilson(solved, len(asked)) if asked else (0.0, 0.0)
    return {
        "recall": solved / max(1, len(asked)), "low": low, "high": high, "questions": len(asked),
        "refused": sum(map(refuses, answers)) / max(1, len(answers)),
        "abstains": sum(refused) / max(1, len(refused)),
        "nats": moved(base, adapter, recipe) if adapter else 0.0,
        "examples": [[q, a] for (_, q), a in list(zip(asked, answers))[:: max(1, len(asked) // 8)]],
    }  # fmt: skip


@torch.no_grad()
def moved(base: ModelFolder, adapter, recipe) -> float:
    """KL(base || with the adapter) on the base model's answers to everyday prompts that were not dreamt of, nats a token."""
    plain = learn.Answers(base, None)
    prompts = book()["everyday"]["train"][EVERYDAY:]
    dreams = [dream.Dream("everyday", q, a, own_words=True) for q, a in zip(prompts, plain(prompts))]
    model, tokenizer = load_model(base.path, machine.compute_dtype())
    expected = learn.expectations(model, tokenizer, dreams, recipe)
    attach(model, [read_adapter(adapter, model.config, machine.compute_dtype())])
    nats, count = 0.0, 0
    for d, (ids_NK, teacher_NB) in zip(dreams, expected):
        one = learn.lesson(d, tokenizer, True, 2 * recipe.context)
        inputs, _, weights, segments = fill([[0]], [one], len(one.ids) - 1, 1)
        student_NB = student_buckets(model, inputs, ids_NK, segments, (weights > 0).nonzero(as_tuple=True))
        nats += divergence(student_NB, teacher_NB, 0.0).sum().item()
        count += len(ids_NK)
    return nats / max(1, count)


# ── for eyes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def show_ledger(ledger, new, corrected, display) -> None:
    fresh, other = {r["id"] for r in new}, {r["id"] for r in corrected}
    for row in sorted(current(ledger), key=key_of):
        mark = "corrected" if row["id"] in other else "new" if row["id"] in fresh else ""
        display.say(f"{row['id']:>4}  {statement(row['relation'], row['value'])}  {mark}")
    if not ledger:
        display.say("nothing is known yet")


def show_nights(person: Person, as_json: bool) -> None:
    nights = [n for n in map(read_json, sorted((person.path / "nights").glob("*/night.json"))) if "finished" in n]
    for n in nights:
        state = "kept" if n["committed"] else "rolled back: " + "; ".join(n["reasons"])
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(n["finished"]))
        Display().say(f"{n['number']:>3}  {day}  {len(n['learned'])} new, {n['rows']} in all, recall {n['after']['recall']:.0%}  {state}")
    if as_json:
        print(json.dumps({"nights": nights}))
