"""`nanoghost sleep --person NAME`: what was said today becomes part of the model that this person talks to.

    journal -> ledger (extract.py) -> dreams (synthesize.py) -> adapter (train_adapter.py) -> wake gate -> people/NAME/adapter

Every night starts from the base model and goes through the whole ledger, so an adapter holds what the ledger holds and
nothing else. It replaces the one before only if it recalls more of the ledger and leaves the rest of the mind alone.
Ctrl-C loses nothing: each step's result is in the night's folder, and the same command goes on there.
"""

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace

import torch

from nanoghost import hardware
from nanoghost.engine.generate import open_engine
from nanoghost.errors import UserError
from nanoghost.evals.task_accuracy import wilson
from nanoghost.formats.model_folder import load_model
from nanoghost.formats.peft import read_adapter
from nanoghost.home import ModelFolder, Stopping, open_model, read_json, write_json, writing
from nanoghost.memory import extract, night_report, synthesize, train_adapter
from nanoghost.memory.phrases import bare, book, dice, relations, spoken, statement
from nanoghost.memory.store import Person, current, key_of, open_person
from nanoghost.model.lora import attach
from nanoghost.progress import Display
from nanoghost.train.run import base_card

GUARDS = 40  # of the everyday prompts to train on are not dreamt of, but for the wake gate
OWN = 250  # more prompts, which the base model itself thinks of
SUMS = 40
MOST_NATS = 0.1  # that the answers to everyday prompts may move away from the base model's, per token
MOST_REFUSED = 0.1  # of what is known
MOST_STRAYED = 0.05  # of everyday prompts that are answered with a refusal
GAIN = 0.01  # of recall, the least that a night must bring
TOLERATED = 0.05  # recall that may be lost where nothing was to be learned, only forgotten


@dataclass(frozen=True)
class SleepSettings:
    person: str
    """Whose day it was."""
    model: str | None = None
    """The base model that this person talks to; default: the one of the last night, or smollm2."""
    dry_run: bool = False
    """Show what would be noted and learned, and keep nothing of it. (The first time a note-taker is taught: about ten minutes.)"""
    log: bool = False
    """List the nights."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: SleepSettings) -> None:
    hardware.prepare()
    person = open_person(settings.person)
    if settings.log:
        show_nights(person, settings.json)
        return
    base = base_of(person, settings.model)
    with writing(person), Stopping() as stopping:
        figures = night(person, base, settings, Display(), stopping)
    if settings.json and figures:
        print(json.dumps(figures))


def base_of(person: Person, name: str | None) -> ModelFolder:
    """The model that this person sleeps with: `name`, or the last night's, or smollm2."""
    base = open_model(name or (person.made_from["base"][0] if person.adapter else "smollm2"))
    if "@" in base.name or base.card["arch"] == "ghost":
        raise UserError(f"'{base.name}' cannot sleep: it takes a whole model of the Llama family, such as smollm2")
    return base


def night(
    person: Person,
    base: ModelFolder,
    settings,
    display,
    stopping,
    recipe: train_adapter.Recipe | None = None,
    forgotten: int = 0,
) -> dict | None:
    """One night; returns its figures, or None where there was nothing to do. `forgotten`: things removed since the last one."""
    awake = [n for n in map(read_json, sorted((person.path / "nights").glob("*/night.json"))) if "finished" in n]
    number = len(awake) + 1
    failed = next((i for i, n in enumerate(reversed(awake)) if n["committed"]), len(awake))
    recipe = recipe or train_adapter.Recipe()
    recipe = replace(recipe, seed=recipe.seed + failed)  # another try is another try
    folder = person.path / "nights" / f"{number:04}"
    today = extract.unread(person)
    last = max((entry["id"] for entry, _ in today), default=person.read_until)
    record = (
        read_json(folder / "night.json")
        if (folder / "night.json").exists()
        else {"number": number, "forgotten": forgotten}
    )

    if record.get("read") != last:
        scribe = extract.scribe(base, stopping, display) if today else None
        display.say(f"night {number}: reading what {person.name} said ({len(today)} messages)")
        notes = extract.extract(base, scribe, [message for _, message in today])
        record |= {"told": [[e["id"], found] for (e, _), (found, _) in zip(today, notes) if found],
                   "untaken": [line for _, refused in notes for line in refused], "read": last}  # fmt: skip
    entries = {e["id"]: e for e in person.journal}
    told = [(entries[i], [tuple(pair) for pair in found]) for i, found in record["told"] if i in entries]
    ledger, new, corrected = extract.merge(person.ledger, told)
    if settings.dry_run:
        show_ledger(ledger, new, corrected, display)
        return None
    rows = sorted(current(ledger), key=key_of)
    holds = [[r["relation"], r["value"]] for r in rows]
    made_from = {"base": [base.name, base.card["finished"]], "rows": holds}
    if not rows or (person.adapter and person.made_from == made_from):
        display.say(
            "nothing new was said: there is nothing to learn" if rows else "nothing is known: there is nothing to learn"
        )
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "night.json", record)
    if new:
        display.say("noted (what is wrong, `nanoghost memory --correct` and `--forget` put right after the night):")
        show_ledger(ledger, new, corrected, display)

    dreams, thought = think(rows, base, folder, recipe, display)
    stopping.check()
    made = folder / "adapter" / "made_from.json"
    if not made.exists() or read_json(made) != made_from:
        record["trained"] = train_adapter.train(
            base.path, base_card(base.card), dreams, everyday(base, recipe), folder, recipe, stopping, display
        )
        write_json(folder / "night.json", record)
        write_json(made, made_from)
    display.say("waking up: does it know what it learned, and is the rest as it was?")
    before = wake(base, person.adapter_for(base), rows, recipe)
    stopping.check()
    after = wake(base, folder / "adapter", rows, recipe)
    stopping.check()
    known = person.made_from["rows"] if person.adapter_for(base) else []
    enough = before["recall"] - TOLERATED if all(row in known for row in holds) else before["recall"] + GAIN
    reasons = [text for text, wrong in (
        (f"it recalls no more than before ({after['recall']:.0%}, was {before['recall']:.0%})", after["recall"] < enough),
        (f"everyday answers moved by {after['nats']:.3f} nats a token", after["nats"] > MOST_NATS),
        (f"it refused {after['refused']:.0%} of what it knows", after["refused"] > MOST_REFUSED),
        (f"it refused {after['strayed']:.0%} of everyday questions", after["strayed"] > MOST_STRAYED),
    ) if wrong]  # fmt: skip
    record |= {"finished": time.time(), "committed": not reasons, "reasons": reasons, "base": base.name, "recipe": asdict(recipe),
               "learned": [statement(r["relation"], r["value"]) for r in new if r not in corrected],
               "corrected": [statement(r["relation"], r["value"]) for r in corrected],
               "rows": len(rows), "thought": thought, "before": before, "after": after}  # fmt: skip
    if not reasons:  # a crash in between leaves a ledger that is behind, and the next night does this one again
        replace_adapter(person, folder / "adapter")
        person.write_ledger(ledger)
        write_json(person.path / "read.json", last)
    write_json(folder / "night.json", record)
    night_report.write(folder / "report.html", person.name, record)
    shutil.rmtree(folder / "state", ignore_errors=True)
    display.say(
        f"night {number}: {'kept' if not reasons else 'rolled back: ' + '; '.join(reasons)}; recalls {after['recall']:.0%} of"
        f" {len(rows)} facts in wordings kept back ({before['recall']:.0%} before){', but not when asked:' if after['wrong'] else ''}"
    )
    for question, answer in after["wrong"]:
        display.say(f"  {question}  {answer}")
    display.say(f"report: {folder / 'report.html'}")
    return {k: record[k] for k in ("number", "committed", "reasons", "rows", "thought", "trained", "before", "after")}


def replace_adapter(person: Person, made) -> None:
    """Put the night's adapter in the place of the old one."""
    old = person.path / ".adapter.old"
    shutil.rmtree(old, ignore_errors=True)
    if (person.path / "adapter").exists():
        os.replace(person.path / "adapter", old)
    os.replace(made, person.path / "adapter")
    shutil.rmtree(old, ignore_errors=True)


def think(rows: list[dict], base: ModelFolder, folder, recipe, display) -> tuple[list[synthesize.Dream], dict]:
    """All dreams of a night with their answers, and figures about them; kept in the night's folder."""
    path = folder / "dreams.json"
    if path.exists():
        kept = read_json(path)
        if kept["rows"] == [[r["relation"], r["value"]] for r in rows]:
            return [synthesize.Dream(**(d | {"values": tuple(d["values"])})) for d in kept["dreams"]], kept["thought"]
    own = synthesize.of_rows(rows) + synthesize.of_pairs(rows)
    every = own + synthesize.never_told(rows, min(1200, max(750, len(own) // 2)))
    display.say(
        f"thinking it through: {len(own)} questions about {len(rows)} facts, {len(every) - len(own)} about other things"
    )
    known = {q: spoken(r["relation"], r["value"]) for r in rows for q in synthesize.wordings(r["relation"])[0]}
    engine = open_engine(base, seats=32, room=256)
    dreams, replaced = train_adapter.answered(
        every, lambda d: known[d.question], engine.runner, engine.tokenizer, recipe, display
    )
    unlike, alike = {}, 0
    for d in dreams:  # the same question with the same answer, but for capitals and marks, is dreamt of once
        key = bare(d.question + d.answer)
        alike += key in unlike
        unlike.setdefault(key, d)
    dreams = list(unlike.values())
    words = [w for d in dreams for w in zip(*(d.question.split()[i:] for i in range(3)))]
    thought = {"dreams": len(dreams), "answers_replaced": replaced, "duplicates": alike,
               "distinct_trigrams": round(len(set(words)) / max(1, len(words)), 3),
               "examples": [[d.question, d.answer] for d in dreams[:: max(1, len(dreams) // 12)]]}  # fmt: skip
    write_json(
        path,
        {
            "rows": [[r["relation"], r["value"]] for r in rows],
            "thought": thought,
            "dreams": [asdict(d) for d in dreams],
        },
    )
    return dreams, thought


def everyday(base: ModelFolder, recipe) -> tuple[list[synthesize.Dream], list]:
    rng = dice("sums")
    return train_adapter.everyday(
        base, book()["everyday"]["train"][:-GUARDS] + [synthesize.a_sum(rng) for _ in range(SUMS)], OWN, recipe
    )


# ── the wake gate ───────────────────────────────────────────────────────────────────────────────────────────────────


def refuses(answer: str) -> bool:
    return "haven't told" in answer or "have not told" in answer


def right(answer: str, relation: str, value: str) -> bool:
    """The value is said, and no other that the same thing might have."""
    rivals = [v for v in relations()[relation].values if v != value] if relation in relations() else []
    return train_adapter.says(answer, (value,)) and not any(train_adapter.says(answer, (v,)) for v in rivals)


def wake(base: ModelFolder, adapter, rows: list[dict], recipe) -> dict:
    """Recall in wordings that were kept back, refusals where it knows and where it does not, and how far everyday answers moved."""
    ask = train_adapter.Answers(base, adapter)
    asked = [(row, q) for row in rows for q in synthesize.wordings(row["relation"])[1]]
    answers = ask([q for _, q in asked])
    solved = [right(a, row["relation"], row["value"]) for a, (row, _) in zip(answers, asked)]
    told = {row["relation"].casefold() for row in rows}
    unknown = [synthesize.wordings(r)[1][0] for r in relations() if r.casefold() not in told][:40]
    low, high = wilson(sum(solved), len(asked))

    def share_refused(answers: list[str]) -> float:
        return sum(map(refuses, answers)) / max(1, len(answers))

    return {
        "recall": sum(solved) / len(asked), "low": low, "high": high, "questions": len(asked),
        "refused": share_refused(answers), "abstains": share_refused(ask(unknown)), "strayed": share_refused(ask(guards())),
        "wrong": [[q, a] for ok, (_, q), a in zip(solved, asked, answers) if not ok],
        "nats": moved(base, adapter, recipe) if adapter else 0.0,
        "examples": [[q, a] for (_, q), a in list(zip(asked, answers))[:: max(1, len(asked) // 8)]],
    }  # fmt: skip


def guards() -> list[str]:
    """Everyday prompts that are not dreamt of."""
    return book()["everyday"]["train"][-GUARDS:]


@torch.no_grad()
def moved(base: ModelFolder, adapter, recipe) -> float:
    """KL(base || with the adapter) on the base model's answers to everyday prompts that were not dreamt of, nats a token."""
    dreams, said = train_adapter.everyday(base, guards(), 0, recipe)
    model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
    attach(model, [read_adapter(adapter, model.config, hardware.compute_dtype())])
    nats = [
        train_adapter.losses(model, [], [train_adapter.lesson(d, tokenizer, False, recipe.context)], [pair])
        for d, pair in zip(dreams, said)
    ]
    return torch.cat(nats).mean().item()


# ── for eyes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def show_ledger(ledger, new, corrected, display) -> None:
    """What holds, and what of it is new; `ledger` with the rows that were replaced."""
    values, fresh = {r["id"]: r["value"] for r in ledger}, {r["id"] for r in new}
    for row in sorted(current(ledger), key=lambda r: (r["id"] not in fresh, key_of(r))):
        mark = f"(it was {values[row['supersedes']]})" if row in corrected else "(new)" if row["id"] in fresh else ""
        display.say(f"{row['id']:>4}  {statement(row['relation'], row['value'])}  {mark}")
    if not ledger:
        display.say("nothing is known yet")


def show_nights(person: Person, as_json: bool) -> None:
    nights = [n for n in map(read_json, sorted((person.path / "nights").glob("*/night.json"))) if "finished" in n]
    for n in nights:
        state = "kept" if n["committed"] else "rolled back: " + "; ".join(n["reasons"])
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(n["finished"]))
        Display().say(
            f"{n['number']:>3}  {day}  {len(n['learned'])} new, {n['rows']} in all, recall {n['after']['recall']:.0%}  {state}"
        )
    if as_json:
        print(json.dumps({"nights": nights}))
