"""`nanoghost lab extraction`: precision and recall of fact extraction, message by message.

The messages are synthetic (memory/extractor_data.py) and use phrasings that the extractor was not trained on: facts of
the schema, facts of relations that it has never seen, several facts in one message, and messages without facts.
"""

import itertools
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

MAX_ERRORS = 200  # messages with errors in the JSON output


@dataclass(frozen=True)
class LabExtractionSettings(JsonFlag):
    model: Annotated[str, tyro.conf.Positional] = "smollm2"
    """Base model."""
    messages: int = 1000
    """Number of messages."""


@dataclass(frozen=True)
class ExtractedMessage:
    """A message with the facts that it states and those that were extracted."""

    text: str
    expected: list[RelationValue]
    extracted: list[RelationValue]

    @property
    def kind(self) -> str:
        """Name of the group whose figures the message counts in."""
        if not self.expected:
            return "no fact"
        if len(self.expected) > 1:
            return "two or three facts"
        relation, _ = self.expected[0]
        return "one fact of the schema" if relation in relations() else "one fact outside the schema"


@dataclass(frozen=True)
class ExtractionFigures:
    """Figures of one kind of message. Fractions are None where they are not defined."""

    kind: str
    count: int
    """Number of messages."""
    recall: float | None
    """Fraction of the facts that were extracted with the right relation and value."""
    value_recall: float | None
    """Fraction of the facts whose value was extracted, under any relation."""
    precision: float | None
    """Fraction of the extracted facts that are right."""
    empty_messages_correct: float | None
    """Fraction of the messages without facts from which nothing was extracted."""


def command(settings: LabExtractionSettings) -> None:
    hardware.prepare()
    base = open_model(settings.model)
    with StopFlag() as stop_flag:
        extractor = open_fact_extractor(base, stop_flag, Display())
    rng = seeded_rng("lab extraction")
    samples = [synthetic_message(rng, "val") for _ in range(settings.messages)]
    results = extract_facts(base, extractor, [message for message, _ in samples])
    by_kind: dict[str, list[ExtractedMessage]] = {}
    for (message, expected), (extracted, _) in zip(samples, results):
        item = ExtractedMessage(message.text, expected, extracted)
        by_kind.setdefault(item.kind, []).append(item)
    figures = [measure(kind, group) for kind, group in sorted(by_kind.items())]
    print_table(figures)
    if settings.json:
        errors = []
        for item in itertools.chain.from_iterable(by_kind.values()):
            if casefold_facts(item.expected) != casefold_facts(item.extracted):
                errors.append([item.text, item.expected, item.extracted])
        print(json.dumps({"rows": [asdict(row) for row in figures], "errors": errors[:MAX_ERRORS]}))


def measure(kind: str, group: list[ExtractedMessage]) -> ExtractionFigures:
    """The figures of the messages of one kind; upper and lower case do not matter."""
    expected = [casefold_facts(item.expected) for item in group]
    extracted = [casefold_facts(item.extracted) for item in group]
    expected_count = sum(map(len, expected))
    extracted_count = sum(map(len, extracted))
    correct = sum(len(a & b) for a, b in zip(expected, extracted))
    correct_values = sum(len(values_of(a) & values_of(b)) for a, b in zip(expected, extracted))
    empty_results = sum(not facts for facts in extracted)
    return ExtractionFigures(
        kind=kind,
        count=len(group),
        recall=correct / expected_count if expected_count else None,
        value_recall=correct_values / expected_count if expected_count else None,
        precision=correct / extracted_count if extracted_count else None,
        empty_messages_correct=None if expected_count else empty_results / len(group),
    )


def casefold_facts(facts: Iterable[RelationValue]) -> set[RelationValue]:
    return {(relation.casefold(), value.casefold()) for relation, value in facts}


def values_of(facts: set[RelationValue]) -> set[str]:
    return {value for _, value in facts}


def print_table(figures: list[ExtractionFigures]) -> None:
    rows = [asdict(row) for row in figures]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.0%}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(stderr=True).print(table)
