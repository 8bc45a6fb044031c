"""The record of a night: nights/NNNN/night.json, written after each step, so that a stopped night can be resumed."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from nanoghost.home import read_json, write_json
from nanoghost.memory.acceptance import AcceptanceResult
from nanoghost.memory.extractor_data import RelationValue
from nanoghost.memory.phrasings import statement
from nanoghost.memory.store import LogEntry, MergedFacts, Person, current_facts
from nanoghost.memory.train_adapter import TrainingFigures


@dataclass(frozen=True)
class SynthesisFigures:
    """Figures of the synthetic questions and answers of a night."""

    examples: int
    replaced_answers: int
    """Answers of the teacher that were incorrect and were replaced."""
    duplicates: int
    """Examples that were dropped because they occurred before."""
    distinct_trigrams: float
    """Proportion of distinct word trigrams in the questions."""
    samples: list[list[str]]
    """Some of the questions with their answers."""


@dataclass
class NightRecord:
    number: int
    """Number of the night, from 1."""
    deleted_facts: int = 0
    """Facts that were deleted just before this night."""
    last_entry_id: int | None = None
    """The chat log up to this entry was processed; None: extraction has not run."""
    extracted: list[tuple[int, list[RelationValue]]] = field(default_factory=list)
    """(id of the chat-log entry, its facts)."""
    rejected_lines: list[str] = field(default_factory=list)
    """Lines of the fact extractor whose value does not occur in the message."""
    base: str = ""
    """Name of the base model."""
    recipe: dict = field(default_factory=dict)
    """Recipe of the adapter."""
    facts: int = 0
    """Number of current facts."""
    new_facts: list[str] = field(default_factory=list)
    """Facts that were added, as statements."""
    corrected_facts: list[str] = field(default_factory=list)
    """Facts that replaced an older value, as statements."""
    synthesis: SynthesisFigures | None = None
    training: TrainingFigures | None = None
    before: AcceptanceResult | None = None
    """Acceptance test of the old adapter."""
    after: AcceptanceResult | None = None
    """Acceptance test of the new adapter."""
    reasons: list[str] = field(default_factory=list)
    """Why the new adapter was rejected."""
    finished: float | None = None
    """Unix time of the end; None while the night is unfinished."""

    @property
    def accepted(self) -> bool:
        """Whether the new adapter replaced the old one."""
        return self.finished is not None and not self.reasons

    @property
    def status(self) -> str:
        return "accepted" if self.accepted else "rejected: " + "; ".join(self.reasons)

    def describe_facts(self, merged: MergedFacts) -> None:
        """Record what the facts of this night are."""
        corrections = merged.corrections
        self.facts = len(current_facts(merged.facts))
        self.new_facts = [statement(f.relation, f.value) for f in merged.added if f not in corrections]
        self.corrected_facts = [statement(f.relation, f.value) for f in corrections]

    def facts_by_entry(self, chat_log: list[LogEntry]) -> list[tuple[LogEntry, list[RelationValue]]]:
        """The extracted facts with their chat-log entries, entries that were deleted since left out."""
        entries = {entry.id: entry for entry in chat_log}
        return [(entries[entry_id], facts) for entry_id, facts in self.extracted if entry_id in entries]

    def summary(self) -> dict:
        """The figures that `nanoghost sleep --json` prints."""
        keys = ("number", "accepted", "reasons", "facts", "synthesis", "training", "before", "after")
        values = self.to_json()
        return {key: values[key] for key in keys}

    def to_json(self) -> dict:
        return asdict(self) | {"accepted": self.accepted}

    @classmethod
    def from_json(cls, values: dict) -> "NightRecord":
        values = dict(values)
        del values["accepted"]
        values["extracted"] = [
            (i, [(relation, value) for relation, value in pairs]) for i, pairs in values["extracted"]
        ]
        sections = {
            "synthesis": SynthesisFigures,
            "training": TrainingFigures,
            "before": AcceptanceResult,
            "after": AcceptanceResult,
        }
        for name, section in sections.items():
            if values[name] is not None:
                values[name] = section(**values[name])
        return cls(**values)

    def write(self, folder: Path) -> None:
        write_json(folder / "night.json", self.to_json())


def read_record(folder: Path) -> NightRecord | None:
    """The record in the folder of a night; None if there is none."""
    path = folder / "night.json"
    return NightRecord.from_json(read_json(path)) if path.exists() else None


def finished_nights(person: Person) -> list[NightRecord]:
    """The records of all finished nights, in order."""
    paths = sorted((person.path / "nights").glob("*/night.json"))
    records = [NightRecord.from_json(read_json(path)) for path in paths]
    return [record for record in records if record.finished is not None]
