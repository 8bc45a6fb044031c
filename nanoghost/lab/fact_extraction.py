"""`nanoghost lab extraction`: precision and recall of fact extraction, message by message.

The messages are synthetic (memory/extractor_data.py) and use phrasings that the extractor was not trained on: facts of
the schema, facts of relations that it has never seen, several facts in one message, and messages without facts.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from nanoghost import hardware
from nanoghost.errors import StopFlag
from nanoghost.home import open_model
from nanoghost.memory.extract import extract_facts, open_fact_extractor
from nanoghost.memory.extractor_data import RelationValue, synthetic_message
from nanoghost.memory.phrasings import relations, seeded_rng
from nanoghost.progress import Display, JsonFlag

MAX_ERRORS = 200  # wrongly processed messages in the JSON output


@dataclass(frozen=True)
class LabExtractionSettings(JsonFlag):
    model: Annotated[str, tyro.conf.Positional] = "smollm2"
    """Base model."""
    messages: int = 1000
    """Number of messages."""


@dataclass(frozen=True)
class ExtractedMessage:
    text: str
    expected: list[RelationValue]
    extracted: list[RelationValue]

    @property
    def kind(self) -> str:
        if not self.expected:
            return "no fact"
        if len(self.expected) > 1:
            return "two or three facts"
        relation, _ = self.expected[0]
        return "one fact of the schema" if relation in relations() else "one fact outside the schema"


@dataclass(frozen=True)
class ExtractionFigures:
    """Figures of one kind of message; None where a figure is not defined."""

    kind: str
    count: int
    recall: float | None
    """Facts that were extracted with the right relation and value."""
    value_recall: float | None
    """Facts whose value was extracted, under any relation."""
    precision: float | None
    """Extracted facts that are right."""
    empty_messages_correct: float | None
    """Messages without facts from which nothing was extracted."""


def command(settings: LabExtractionSettings) -> None:
    hardware.prepare()
    base = open_model(settings.model)
    with StopFlag() as stop_flag:
        extractor = open_fact_extractor(base, stop_flag, Display())
    rng = seeded_rng("lab extraction")
    messages, expected = zip(*(synthetic_message(rng, "val") for _ in range(settings.messages)))
    results = extract_facts(base, extractor, list(messages))
    by_kind: dict[str, list[ExtractedMessage]] = {}
    for message, facts, (extracted, _) in zip(messages, expected, results):
        item = ExtractedMessage(message.text, facts, extracted)
        by_kind.setdefault(item.kind, []).append(item)
    figures = [measure(kind, group) for kind, group in sorted(by_kind.items())]
    print_table(figures)
    if settings.json:
        errors = [
            [item.text, item.expected, item.extracted]
            for group in by_kind.values()
            for item in group
            if ignore_case(item.expected) != ignore_case(item.extracted)
        ]
        print(json.dumps({"rows": [asdict(row) for row in figures], "errors": errors[:MAX_ERRORS]}))


def measure(kind: str, group: list[ExtractedMessage]) -> ExtractionFigures:
    expected = [ignore_case(item.expected) for item in group]
    extracted = [ignore_case(item.extracted) for item in group]
    expected_count = sum(map(len, expected))
    extracted_count = sum(map(len, extracted))
    correct = sum(len(a & b) for a, b in zip(expected, extracted))
    values_found = sum(len(values_of(a) & values_of(b)) for a, b in zip(expected, extracted))
    empty = sum(not facts for facts in extracted)
    return ExtractionFigures(
        kind=kind,
        count=len(group),
        recall=correct / expected_count if expected_count else None,
        value_recall=values_found / expected_count if expected_count else None,
        precision=correct / extracted_count if extracted_count else None,
        empty_messages_correct=None if expected_count else empty / len(group),
    )


def ignore_case(pairs: Iterable[RelationValue]) -> set[RelationValue]:
    return {(relation.casefold(), value.casefold()) for relation, value in pairs}


def values_of(pairs: set[RelationValue]) -> set[str]:
    return {value for _, value in pairs}


def print_table(figures: list[ExtractionFigures]) -> None:
    rows = [asdict(row) for row in figures]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{x:.0%}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(stderr=True).print(table)
