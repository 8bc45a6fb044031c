"""What people tell of themselves, and how they say it, ask for it and correct it; small talk and everyday questions.

Wordings are written down in people.toml in lists called train, val and test. The product learns from train, is tuned on val
(where there is none, on a quarter of train, which is then kept back), and test belongs to `lab sleep`.
"""

import hashlib
import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanoghost.tools.retrieval import Index


@dataclass(frozen=True)
class Relation:
    """One thing that may be known of a person."""

    relation: str
    """As in "your {relation}"."""
    values: tuple[str, ...]
    answer: str
    said: dict[str, tuple[str, ...]]
    changed: dict[str, tuple[str, ...]]
    apart: dict[str, tuple[tuple[str, str], ...]]
    asked: dict[str, tuple[str, ...]]


@cache
def book() -> dict:
    return tomllib.loads(Path(__file__).with_name("people.toml").read_text())


@dataclass(frozen=True)
class Thing:
    """Anything else that people tell: it teaches to take notes, and that more may be asked for than was told."""

    relation: str
    values: tuple[str, ...]
    said: tuple[str, ...]
    changed: tuple[str, ...]


@cache
def things(split: str) -> list[Thing]:
    """Those of notes.toml; val has other things than train, test has none."""
    entries = tomllib.loads(Path(__file__).with_name("notes.toml").read_text()).get(split, [])
    return [Thing(e["relation"], *(tuple(e[name]) for name in ("values", "said", "changed"))) for e in entries]


@cache
def idle(split: str) -> list[str]:
    """Messages that tell nothing lasting about the person, though they sound like it."""
    return tomllib.loads(Path(__file__).with_name("notes.toml").read_text())["nothing"].get(split, [])


@cache
def relations() -> dict[str, Relation]:
    """By what stands in a ledger's `relation`."""
    found = {}
    for entry in book()["relations"].values():
        found[entry["relation"]] = made(entry, entry["relation"], lambda text: text)
    for entry in book().get("attributes", {}).values():
        for who in book()["relatives"]:
            name = f"{who}'s {entry['attribute']}"
            found.setdefault(name, made(entry, name, lambda text, who=who: text.replace("{who}", who)))
    return found


def made(entry: dict, name: str, fill) -> Relation:
    texts = {k: {split: tuple(map(fill, v)) for split, v in entry[k].items()} for k in ("said", "changed", "asked")}
    texts["apart"] = {split: tuple(tuple(map(fill, pair)) for pair in v) for split, v in entry["apart"].items()}
    return Relation(name, tuple(entry["values"]), fill(entry["answer"]), **texts)


def part(lists: dict[str, tuple], split: str) -> tuple:
    """Phrasings of a split: train, val or test."""
    if "val" in lists:
        return lists[split]
    back = max(1, len(lists["train"]) // 4)
    return {"train": lists["train"][:-back], "val": lists["train"][-back:], "test": lists["test"]}[split]


def dice(*key) -> random.Random:
    """Random numbers that belong to a thing, whatever else there is."""
    return random.Random(hashlib.sha256(repr(key).encode()).hexdigest())


def questions(relation: str, split: str) -> list[str]:
    """Ways of asking for it, those of its own first."""
    every = [*own_wordings(relation, split), *(wording.format(a=relation) for wording in book()["generic"][split])]
    return list({bare(q): q for q in reversed(every)}.values())[::-1]


def own_wordings(relation: str, split: str) -> tuple[str, ...]:
    """Ways of asking for it and for nothing else."""
    return relations()[relation].asked[split] if relation in relations() else ()


def bare(text: str) -> str:
    """Its letters and digits alone: what capitals and marks make different is the same."""
    return "".join(c for c in text.casefold() if c.isalnum())


def low(sentence: str) -> str:
    """As it is written inside another sentence."""
    return sentence[0].lower() + sentence[1:]


def statement(relation: str, value: str) -> str:
    """What a good assistant says of it."""
    known = relations().get(relation)
    return known.answer.format(v=value) if known else f"Your {relation} is {value}."


def about(rows: list[dict], question: str, most: int) -> list[dict]:
    """The rows of a ledger that have to do with a question, best first."""
    index = Index([f"{row['relation']} {statement(row['relation'], row['value'])}" for row in rows])
    return [rows[i] for i in index.search(question, most)]


def spoken(relation: str, value: str) -> str:
    """The same in the same few words whatever it is."""
    return f"Your {relation} is {value}."


def noted(relation: str, value: str) -> str:
    """The same as a note about the user: a small model answers from such notes twice as often."""
    text = statement(relation, value)
    for spoken, written in (
        ("You are ", "The user is "),
        ("You're ", "The user is "),
        ("You ", "The user "),
        ("Your ", "The user's "),
    ):
        text = re.sub(rf"\b{spoken}", written, text)
    return text
