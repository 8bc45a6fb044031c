"""`nanoghost lab sleep`: what is left of a day, without a word of it in the context, beside other ways of knowing it.

Invented people (life.py) talk to a model over some days; then they ask, in wordings that no night has used. An answer is right
if it has the value and none that it might rather have been. The same questions and the same people in all arms:

    base         knows nothing                            the floor
    context      all facts in the system message
    ceiling      the one right fact in the system message
    lookup       what the ledger says about the words of the question, in the system message
    raw          trained on the journal itself, next token by next token
    pairs        trained on questions and answers alone: none in the teacher's words, no never told, nothing held
    first-night  ours after the first night: asked about its facts alone
    ours         all nights; what is not about the person is answered by the base model (router.py)
    always       ours, but the adapter answers whatever is asked
    ours+lookup
    forgotten    ours, of which three facts were forgotten: asked about these alone

`--split val` asks in wordings that nights keep back, for tuning; test, which is sealed, in others, of other people.
"""

import json
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.commands.arguments import numbers
from nanoghost.engine.generate import open_engine
from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, Stopping, home, open_model, read_json, write_json
from nanoghost.lab.retention import general, share
from nanoghost.lab.synthetic_users import Life, live
from nanoghost.memory import consolidate, extract, synthesize, train_adapter
from nanoghost.memory.phrases import about, book, noted, part, questions, relations, statement
from nanoghost.memory.store import current, key_of
from nanoghost.progress import Display
from nanoghost.train.run import base_card

ARMS = (
    "base",
    "context",
    "ceiling",
    "lookup",
    "raw",
    "pairs",
    "first-night",
    "ours",
    "always",
    "ours+lookup",
    "forgotten",
)
TRAINED = {
    "raw": "raw",
    "pairs": "pairs",
    "first-night": "first",
    "ours": "ours",
    "always": "ours",
    "ours+lookup": "ours",
    "forgotten": "forgotten",
}
ALWAYS = ("raw", "pairs", "always")  # the adapter answers whatever is asked
FORGOTTEN = 3
READINGS = 16  # of the journal, in the arm that only reads it
LEAKS = 200  # questions about another person's facts, at least


@dataclass(frozen=True)
class LabSleepSettings:
    model: Annotated[str, tyro.conf.Positional] = "smollm2"
    """The base model."""
    nights: int = 1
    """How many days and nights; from the second on, two facts of a day correct older ones."""
    facts: int = 20
    """Facts told on each day."""
    seeds: str = "0,1,2"
    """A person each."""
    arms: str = ",".join(ARMS)
    """What is compared."""
    split: str = "val"
    """val or test."""
    ledger: str = "perfect"
    """perfect (the facts as told) or extracted (from what was said, as a night does it)."""
    general: bool = True
    """Measure general ability too: bits per byte, questions anybody may ask, reasoning-gym."""
    json: bool = False
    """Print the figures as JSON on standard output."""


# ── arms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def trained(
    arm: str, base: ModelFolder, rows: list[dict], life: Life, recipe: train_adapter.Recipe, folder: Path, display
) -> dict:
    """Train the adapter of an arm into folder/adapter, unless it is there; figures."""
    if (folder / "figures.json").exists():
        return read_json(folder / "figures.json")
    folder.mkdir(parents=True, exist_ok=True)
    start, known = time.perf_counter(), ([], [])
    if arm == "raw":
        dreams = [synthesize.Dream("raw", "", text) for text, _, _ in life.messages] * READINGS
    elif arm == "pairs":
        dreams = [
            replace(d, answer=statement(r["relation"], r["value"]), snippet="")
            for r in rows
            for d in synthesize.of_row(r, 44)
            if d.kind == "direct"
        ]
    else:
        known = consolidate.everyday(base, recipe)
        start = time.perf_counter()  # everyday dreams are the base model's, once
        dreams, thought = consolidate.think(rows, base, folder, recipe, display)
        display.say(f"{thought['dreams']} dreams, {thought['answers_replaced']} of the teacher's answers put right")
    with Stopping() as stopping:
        figures = train_adapter.train(base.path, base_card(base.card), dreams, known, folder, recipe, stopping, display)
    figures |= {
        "night_seconds": round(time.perf_counter() - start, 1),
        "megabytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6,
    }
    write_json(folder / "figures.json", figures)
    return figures


def snippets(arm: str, asked: list[tuple[str, list[dict]]], known: list[dict]) -> list[str]:
    """What an arm may look at for each (question, rows that answer it)."""

    def notes(rows):
        return " ".join(noted(r["relation"], r["value"]) for r in rows)

    if arm == "context":
        return [notes(known)] * len(asked)
    if arm == "ceiling":
        return [notes(rows) for _, rows in asked]
    if not arm.endswith("lookup"):
        return [""] * len(asked)
    return [notes(about(known, q, max(1, len(rows)))) for q, rows in asked]


# ── questions and scores ────────────────────────────────────────────────────────────────────────────────────────────


def ways_to_ask(relation: str, split: str) -> list[str]:
    return questions(relation, split)


def examine(
    arm: str,
    base: ModelFolder,
    adapter: Path | None,
    true: list[dict],
    asked_of: list[dict],
    known: list[dict],
    split: str,
    seed: int,
) -> dict:
    """Every ability of one arm for one person: of what is `true` and, in its ledger, `known`; shares of questions."""
    rng, ask = random.Random(f"asked-{split}-{seed}"), train_adapter.Answers(base, adapter, arm in ALWAYS)

    def answers(asked: list[tuple[str, list[dict]]], most: int = 48) -> list[str]:
        return ask([q for q, _ in asked], snippets(arm, asked, known), most)

    single = [(q, [row]) for row in asked_of for q in ways_to_ask(row["relation"], split)]
    said = answers(single)
    solved = [(row, consolidate.right(a, row["relation"], row["value"])) for a, (_, [row]) in zip(said, single)]
    found = {
        "single": share(ok for _, ok in solved),
        "updated": share(ok for row, ok in solved if row["supersedes"]),
        "time": share(ok for row, ok in solved if row["relation"].endswith(("birthday", "time", " day"))),
        "false_refusals": share(map(consolidate.refuses, said)),
        "by_row": {row["relation"]: [ok for r, ok in solved if r is row] for row in asked_of},
        "examples": [[q, a] for (q, _), a in list(zip(single, said))[:: max(1, len(single) // 12)]],
        "wrong": [[q, a, row["value"]] for (q, [row]), a, (_, ok) in zip(single, said, solved) if not ok][:30],
    }
    if arm in ("first-night", "forgotten"):
        return found

    ways = book()["combined"][split]
    pairs = [rng.sample(true, 2) for _ in range(min(30, len(true)))]
    both = [(rng.choice(ways).format(a=a["relation"], b=b["relation"]), [a, b]) for a, b in pairs]
    found["combined"] = share(
        train_adapter.says(a, [r["value"] for r in rows]) for a, (_, rows) in zip(answers(both, 64), both)
    )

    have = {r["relation"] for r in true}
    open_ones = sorted(set(relations()) - have)
    unknown = [(rng.choice(ways_to_ask(r, split)), []) for r in rng.sample(open_ones, min(60, len(open_ones)))]
    unheard = [(q, []) for q in part(book()["unheard"], split)]
    replies = answers(unknown + unheard)
    found["abstains"] = share(map(consolidate.refuses, replies[: len(unknown)]))
    found["abstains_unheard"] = share(map(consolidate.refuses, replies[len(unknown) :]))
    found["invented"] = [[q, a] for (q, _), a in zip(unknown + unheard, replies) if not consolidate.refuses(a)][:40]
    return found


def leaks(base: ModelFolder, people: list[tuple[Path, list[dict]]], split: str) -> dict:
    """Everybody is asked about the others' facts and their own, all in one batch, each row through its own adapter."""
    engine = open_engine(base, seats=32, room=256)
    folders = [str(folder) for folder, _ in people]
    for folder, _ in people:
        engine.runner.add_adapter(folder)
    rng, asked = random.Random("leaks"), []
    for number, (_, rows) in enumerate(people):
        others = [r for i, (_, theirs) in enumerate(people) if i != number for r in theirs]
        own = {r["relation"]: r["value"] for r in rows}
        strange = [r for r in others if own.get(r["relation"]) != r["value"]]
        for row in rng.choices(strange, k=-(-LEAKS // len(people))):
            asked.append((number, row, rng.choice(ways_to_ask(row["relation"], split))))
        asked += [(number, None, rng.choice(ways_to_ask(row["relation"], split))) for row in rows]
    rng.shuffle(asked)
    asked_of = [train_adapter.messages_of(synthesize.Dream("", q), False) for _, _, q in asked]
    answers = train_adapter.said(engine, asked_of, 48, [folders[number] for number, _, _ in asked])
    found = [(people[n][1], row, q, a) for (n, row, q), a in zip(asked, answers) if row]
    leaked = [
        [q, a, row["value"]]
        for own, row, q, a in found
        if train_adapter.says(a, (row["value"],)) and not any(r["value"] == row["value"] for r in own)
    ]
    return {"asked": len(found), "leaked": len(leaked), "examples": leaked}


def command(settings: LabSleepSettings) -> None:
    hardware.prepare()
    base, display = open_model(settings.model), Display()
    asked = settings.arms.split(",")
    if unknown := set(asked) - set(ARMS):
        raise UserError(f"--arms knows {', '.join(ARMS)}, not '{', '.join(sorted(unknown))}'")
    if settings.split not in ("val", "test") or settings.ledger not in ("perfect", "extracted"):
        raise UserError("--split is val or test, --ledger perfect or extracted")
    results, people = {}, []
    for seed in numbers("--seeds", settings.seeds, 0):
        life = live(seed, settings.split, settings.nights, settings.facts)
        place = (
            home() / "lab" / "sleep" / f"{settings.split}-{seed}-{settings.nights}x{settings.facts}-{settings.ledger}"
        )
        known, notes = noted_down(life, base, place, display) if settings.ledger == "extracted" else (life.facts(), {})
        for arm in asked:
            path = place / f"{arm}.json"
            if not path.exists():
                write_json(path, notes | one_arm(arm, base, life, known, place, settings, seed, display))
            results.setdefault(arm, []).append(read_json(path))
            display.say(f"seed {seed}, {arm}: single {results[arm][-1]['single']:.0%}")
        if "ours" in asked:
            people.append((place / "ours" / "adapter", known))
    leaked = leaks(base, people, settings.split) if len(people) > 1 else {}
    tell(results, leaked, settings)


def noted_down(life: Life, base: ModelFolder, place: Path, display) -> tuple[list[dict], dict]:
    """The ledger as a night would have it, and how far it is the true one."""
    path = place / "notes.json"
    if not path.exists():
        with Stopping() as stopping:
            scribe = extract.scribe(base, stopping, display)
        heard = [message for _, message in extract.heard(life.journal, 0)]
        write_json(path, [found for found, _ in extract.extract(base, scribe, heard)])
    told = [[tuple(pair) for pair in found] for found in read_json(path)]
    true = [{(r.casefold(), v.casefold()) for r, v in found} for *_, found in life.messages]
    mine = [{(r.casefold(), v.casefold()) for r, v in found} for found in told]
    both = sum(len(a & b) for a, b in zip(true, mine))
    notes = {"precision": both / max(1, sum(map(len, mine))), "recall": both / sum(map(len, true))}
    return sorted(current(life.ledger(told)), key=key_of), notes


def one_arm(
    arm: str, base: ModelFolder, life: Life, known: list[dict], place: Path, settings, seed: int, display
) -> dict:
    true, recipe = life.facts(), replace(train_adapter.Recipe(), seed=seed)
    asked_of, rows = true, known
    if arm == "first-night":
        rows = life.facts(days=1)
        later = {r["relation"] for r in true if r["supersedes"]}
        asked_of = [r for r in rows if r["relation"] not in later]
    if arm == "forgotten":
        asked_of = random.Random(f"forgotten-{seed}").sample(true, FORGOTTEN)
        rows = [r for r in known if r["relation"] not in {a["relation"] for a in asked_of}]
    adapter, figures = None, {}
    if arm in TRAINED:
        folder = place / TRAINED[arm]
        figures = trained(TRAINED[arm], base, rows, life, recipe, folder, display)
        adapter = folder / "adapter"
    figures |= examine(arm, base, adapter, true, asked_of, known, settings.split, seed)
    if settings.general and arm in ("base", "ours", *ALWAYS):
        figures |= general(base, adapter, arm in ALWAYS, true, settings.split)
    if arm == "ours" and (place / "first-consolidate.json").exists():
        first = read_json(place / "first-consolidate.json")["by_row"]
        now = [ok for relation in first for ok in figures["by_row"][relation]]
        before = [ok for oks in first.values() for ok in oks]
        figures["kept"] = round(sum(now) / max(1, sum(before)), 4)
    return figures


COLUMNS = (
    "single", "combined", "updated", "time", "kept", "abstains", "abstains_unheard", "false_refusals", "intrusions",
    "refuses_everyday", "behaviours", "gym", "bpb", "nats", "night_seconds", "megabytes", "precision", "recall",
)  # fmt: skip


def tell(results: dict, leaked: dict, settings) -> None:
    used = [c for c in COLUMNS if any(f.get(c) is not None for found in results.values() for f in found)]
    table = Table("", *results)
    for column in used:
        cells = []
        for found in results.values():
            values = [f[column] for f in found if f.get(column) is not None]
            mean = f"{statistics.mean(values):.3g}" if values else ""
            cells.append(mean + (f" ±{statistics.stdev(values):.2g}" if len(values) > 1 else ""))
        table.add_row(column.replace("_", " "), *cells)
    Console(stderr=True).print(table)
    if leaked:
        Console(stderr=True).print(f"others' facts told: {leaked['leaked']} of {leaked['asked']}")
    if settings.json:
        print(json.dumps({"arms": results, "leaks": leaked}))
