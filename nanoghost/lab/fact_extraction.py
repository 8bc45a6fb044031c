"""`nanoghost lab notes`: how good the notes are that a model takes of what people say, message by message.

Messages are put together from wordings that the note-taker was not taught (sleep/extract.py): what relations it was taught
in other words, things that it never had to note before, several in one message, and what is not to be noted.
"""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.home import Stopping, open_model
from nanoghost.memory import extract
from nanoghost.memory.phrases import dice, relations
from nanoghost.progress import Display


@dataclass(frozen=True)
class LabNotesSettings:
    model: Annotated[str, tyro.conf.Positional] = "smollm2"
    """The base model."""
    messages: int = 1000
    """How many are read."""
    json: bool = False
    """Print the figures as JSON on standard output."""


def command(settings: LabNotesSettings) -> None:
    hardware.prepare()
    base, display = open_model(settings.model), Display()
    with Stopping() as stopping:
        scribe = extract.scribe(base, stopping, display)
    rng = dice("lab notes")
    heard, told = zip(*(extract.message(rng, "val") for _ in range(settings.messages)))
    noted = [found for found, _ in extract.extract(base, scribe, list(heard))]
    groups = {}
    for message, true, mine in zip(heard, told, noted):
        groups.setdefault(kind_of(true), []).append((message.text, true, mine))
    rows = [{"messages": kind, "count": len(group)} | figures(group) for kind, group in groups.items()]
    rows.sort(key=lambda row: row["messages"])
    table = Table(*rows[0].keys())
    for row in rows:
        table.add_row(*(f"{x:.0%}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(stderr=True).print(table)
    if settings.json:
        print(
            json.dumps(
                {
                    "rows": rows,
                    "examples": [list(x) for group in groups.values() for x in group if same(x[1]) != same(x[2])][:200],
                }
            )
        )


def kind_of(true: list[tuple[str, str]]) -> str:
    if len(true) != 1:
        return "several things" if true else "nothing"
    return "one thing" if true[0][0] in relations() else "one thing of a new kind"


def same(pairs) -> set[tuple[str, str]]:
    return {(relation.casefold(), value.casefold()) for relation, value in pairs}


def figures(group: list[tuple]) -> dict:
    """Of what is told, how much is noted, and how much of it with the right value under another name; of notes, how many are true."""
    true, mine = [same(t) for _, t, _ in group], [same(m) for *_, m in group]
    said, count = sum(map(len, true)), sum(map(len, mine))
    both = sum(len(a & b) for a, b in zip(true, mine))
    values = sum(len({v for _, v in a} & {v for _, v in b}) for a, b in zip(true, mine))
    return {"noted": both / said if said else None, "value noted": values / said if said else None,
            "notes that are true": both / count if count else None, "quiet messages left alone": None if said else sum(not m for m in mine) / len(mine)}  # fmt: skip
