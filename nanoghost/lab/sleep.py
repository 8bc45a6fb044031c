"""`nanoghost lab sleep`: what is left of a day, without a word of it in the context, beside other ways of knowing it.

Invented people tell a model about themselves, among small talk, over some nights; some of it they correct on a later day.
Then they ask, in wordings that no night has used. An arm's answer is right if it has the value and none that it might
rather have been. The same questions and the same people in all arms:

    base       knows nothing                            the floor
    context    all facts in the system message
    ceiling    the one right fact in the system message
    lookup     the facts that share most words with the question, in the system message
    raw        trained on the journal itself, next token by next token
    pairs      trained on questions and answers alone: no teacher, nothing held
    ours       the whole night
    ours+lookup

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

from nanoghost import machine
from nanoghost.errors import UserError
from nanoghost.people import current, key_of
from nanoghost.progress import Display
from nanoghost.runs import ModelFolder, Stopping, home, open_model, read_json, write_json
from nanoghost.sleep import dream, extract, learn, night
from nanoghost.sleep.phrases import book, noted, questions, relations, statement
from nanoghost.train.stage import base_card

ARMS = ("base", "context", "ceiling", "lookup", "raw", "pairs", "ours", "ours+lookup")
TRAINED = {"raw": "raw", "pairs": "pairs", "ours": "ours", "ours+lookup": "ours"}  # and which adapter


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
    json: bool = False
    """Print the figures as JSON on standard output."""


@dataclass
class Life:
    """What one invented person said, day by day, and what is true in the end."""

    days: list[list[tuple[str, list[tuple[str, str]]]]]
    """Messages, each with the (relation, value) pairs that it tells."""

    def ledger(self, told=None) -> list[dict]:
        """Rows after all days; `told`: what was extracted from each message, instead of what it tells."""
        entries = [({"id": i, "time": i}, found) for i, (_, found) in enumerate(m for day in self.days for m in day)]
        if told is not None:
            entries = [(e, found) for (e, _), found in zip(entries, told)]
        return extract.merge([], entries)[0]


def live(seed: int, split: str, nights: int, facts: int) -> Life:
    rng = random.Random(f"{split}-{seed}")
    every = list(relations().values())
    rng.shuffle(every)
    held, days, wording = {}, [], "train" if split == "val" else "test"
    for number in range(nights):
        corrected = rng.sample(sorted(held), min(2, len(held)) if number else 0)
        fresh = [every.pop() for _ in range(facts - len(corrected))]
        messages = []
        for relation in [*fresh, *(relations()[name] for name in corrected)]:
            old = held.get(relation.relation)
            value = rng.choice([v for v in relation.values if v != old])
            text = rng.choice((relation.changed if old else relation.said)[wording]).format(v=value)
            if rng.random() < 0.4:
                both = [text, rng.choice(book()["small_talk"][wording])]
                rng.shuffle(both)
                text = " ".join(both)
            messages.append((text, [(relation.relation, value)]))
            held[relation.relation] = value
        messages += [(text, []) for text in rng.sample(book()["small_talk"][wording], facts // 2)]
        rng.shuffle(messages)
        days.append(messages)
    return Life(days)


def ask_ways(relation: str, split: str) -> list[str]:
    return dream.wordings(relation)[1] if split == "val" else questions(relation, "test")


# ── arms ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def words(text: str) -> set[str]:
    return {w.strip(".,?!'\"").removesuffix("'s") for w in text.casefold().split()} - {"my", "your", "is", "the", "what", "do", "you", "a"}


def looked_up(question: str, rows: list[dict], most: int = 1) -> str:
    """The statements that share most words with the question, none if none does."""
    scored = [(len(words(question) & words(f"{r['relation']} {statement(r['relation'], r['value'])}")), r) for r in rows]
    best = sorted((s for s in scored if s[0]), key=lambda s: -s[0])[:most]
    return " ".join(noted(r["relation"], r["value"]) for _, r in best)


def trained(arm: str, base: ModelFolder, rows: list[dict], life: Life, recipe: learn.Recipe, folder: Path, display) -> dict:
    """Train the adapter of an arm into folder/adapter, unless it is there; figures."""
    if (folder / "figures.json").exists():
        return read_json(folder / "figures.json")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    person = [{"relation": r["relation"], "value": r["value"]} for r in rows]
    if arm == "ours":
        dreams, thought = night.think(person, base, folder, recipe, display)
    elif arm == "pairs":
        dreams = [replace(d, answer=statement(r["relation"], r["value"]), snippet="") for r in rows for d in dream.of_row(r) if d.kind == "direct"]
        recipe = replace(recipe, share=0.0)
    else:
        dreams = [dream.Dream("raw", "", text) for day in life.days for text, _ in day]
        recipe = replace(recipe, share=0.0, passes=recipe.passes * 4)
    with Stopping() as stopping:
        figures = learn.train(base.path, base_card(base.card), dreams, folder, recipe, stopping, display)
    figures |= {"night_seconds": round(time.perf_counter() - start, 1), "megabytes": (folder / "adapter" / "adapter_model.safetensors").stat().st_size / 1e6}
    write_json(folder / "figures.json", figures)
    return figures


# ── questions and scores ────────────────────────────────────────────────────────────────────────────────────────────


def examine(arm: str, base: ModelFolder, adapter: Path | None, life: Life, split: str, known: list[dict], seed: int) -> dict:
    """Every ability of one arm for one person; shares of questions."""
    true = sorted(current(life.ledger()), key=key_of)
    rng = random.Random(f"asked-{split}-{seed}")
    facts = " ".join(noted(r["relation"], r["value"]) for r in known)

    def told(question: str, rows: list[dict]) -> str:
        if arm == "context":
            return facts
        if arm == "ceiling":
            return " ".join(noted(r["relation"], r["value"]) for r in rows)
        return looked_up(question, known, max(1, len(rows))) if arm.endswith("lookup") else ""

    ask = learn.Answers(base, adapter)

    def answers(asked: list[tuple[str, str]], most: int = 48) -> list[str]:
        return ask([q for _, q in asked], [snippet for snippet, _ in asked], most)

    single = [(row, q) for row in true for q in ask_ways(row["relation"], split)]
    said = answers([(told(q, [row]), q) for row, q in single])
    solved = [night.right(a, row["relation"], row["value"]) for a, (row, _) in zip(said, single)]
    refused = [night.refuses(a) for a in said]
    changed = [i for i, (row, _) in enumerate(single) if row["supersedes"]]
    first = {relation for _, found in life.days[0] for relation, _ in found}
    oldest = [i for i, (row, _) in enumerate(single) if row["relation"] in first and not row["supersedes"]]

    pairs = [rng.sample(true, 2) for _ in range(min(30, len(true)))]
    ways = book()["combined"]["train" if split == "val" else "test"]
    both = [(pair, rng.choice(ways).format(a=pair[0]["relation"], b=pair[1]["relation"])) for pair in pairs]
    together = answers([(told(q, pair), q) for pair, q in both], 64)
    combined = [all(learn.says(a, (r["value"],)) for r in pair) for a, (pair, _) in zip(together, both)]

    have = {r["relation"] for r in true}
    unknown = [rng.choice(ask_ways(r, split)) for r in rng.sample(sorted(set(relations()) - have), min(50, len(relations()) - len(have)))]
    abstained = [night.refuses(a) for a in answers([(told(q, []), q) for q in unknown])]

    everyday = book()["everyday"]["train"][night.EVERYDAY :] if split == "val" else book()["everyday"]["test"]
    plain, now = learn.Answers(base, None)(everyday), ask(everyday)
    values = [r["value"] for r in true if len(r["value"]) > 3]
    intruded = [any(learn.says(b, (v,)) and not learn.says(a, (v,)) for v in values) for a, b in zip(plain, now)]
    refused_there = [night.refuses(b) and not night.refuses(a) for a, b in zip(plain, now)]

    def share(flags, of=None):
        flags = [flags[i] for i in of] if of is not None else flags
        return round(sum(flags) / len(flags), 4) if flags else None

    return {
        "single": share(solved), "first_day": share(solved, oldest), "updated": share(solved, changed), "combined": share(combined),
        "abstains": share(abstained), "false_refusals": share(refused), "intrusions": sum(intruded), "refuses_everyday": sum(refused_there),
        "nats": round(night.moved(base, adapter, learn.Recipe()), 4) if adapter else 0.0,
        "examples": [[q, a] for (_, q), a in list(zip(single, said))[:: max(1, len(single) // 12)]] + [[q, a] for q, a in zip(unknown[:6], ask(unknown[:6]))],
    }  # fmt: skip


def command(settings: LabSleepSettings) -> None:
    machine.prepare()
    base, display = open_model(settings.model), Display()
    asked = settings.arms.split(",")
    if unknown := set(asked) - set(ARMS):
        raise UserError(f"--arms knows {', '.join(ARMS)}, not '{', '.join(sorted(unknown))}'")
    if settings.split not in ("val", "test") or settings.ledger not in ("perfect", "extracted"):
        raise UserError("--split is val or test, --ledger perfect or extracted")
    recipe, results = learn.Recipe(), {}
    for seed in map(int, settings.seeds.split(",")):
        life = live(seed, settings.split, settings.nights, settings.facts)
        told = None
        if settings.ledger == "extracted":
            texts = [text for day in life.days for text, _ in day]
            told = extract.extract(extract.scribe(base.name, display), texts)
        known = sorted(current(life.ledger(told)), key=key_of)
        place = home() / "lab" / "sleep" / f"{settings.split}-{seed}-{settings.nights}x{settings.facts}-{settings.ledger}"
        for arm in asked:
            path = place / f"{arm}.json"
            if not path.exists():
                adapter, figures = None, {}
                if arm in TRAINED:
                    folder = place / TRAINED[arm]
                    figures = trained(TRAINED[arm], base, known, life, replace(recipe, seed=seed), folder, display)
                    adapter = folder / "adapter"
                write_json(path, figures | examine(arm, base, adapter, life, settings.split, known, seed))
            results.setdefault(arm, []).append(read_json(path))
            display.say(f"seed {seed}, {arm}: single {results[arm][-1]['single']:.0%}")
    tell(results, settings)


COLUMNS = ("single", "first_day", "updated", "combined", "abstains", "false_refusals", "intrusions", "refuses_everyday", "nats", "night_seconds")


def tell(results: dict, settings) -> None:
    table = Table("arm", *COLUMNS)
    for arm, found in results.items():
        cells = []
        for column in COLUMNS:
            values = [f[column] for f in found if f.get(column) is not None]
            mean = statistics.mean(values) if values else None
            spread = f" ±{statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append("" if mean is None else f"{mean:.3g}{spread}")
        table.add_row(arm, *cells)
    Console(stderr=True).print(table)
    if settings.json:
        print(json.dumps({"arms": results}))
