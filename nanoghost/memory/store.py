"""People who talk to a model: their chat log, the facts stored about them, and the adapter trained on those facts.

    $NANOGHOST_HOME/people/NAME/   readable by its owner only
    chat_log.jsonl         every message, append-only: id, time, role (user or assistant), text
    facts.jsonl            the fact store: id, relation, value, subject, time, sources, supersedes
    adapter/               LoRA adapter (PEFT format) that knows the facts; inputs.json names what it was trained from
    nights/NNNN/           a folder for each night, that is, each run of `nanoghost sleep`: its record and its report
    line_history           lines typed in the terminal, for its arrow keys
    last_processed.json    id of the last message that the fact extractor has processed

People share nothing: no file, no adapter, no cache.
"""

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import (
    ModelFolder,
    append_json_line,
    exclusive_lock,
    home,
    json_line,
    line_history,
    read_json,
    read_json_lines,
    write_atomic,
    write_json,
)
from nanoghost.memory.mentions import Mentions
from nanoghost.memory.phrasings import statement
from nanoghost.tools.retrieval import TextIndex
from nanoghost.tools.text_forms import fold

PERSON_FILES = "chat_log.jsonl facts.jsonl last_processed.json .chat_log.lock .lock line_history".split()
PERSON_FOLDERS = ("adapter", ".adapter.old", "nights")
REPEAT_SECONDS = 3600  # the same message again within this time is a request for another answer, and is logged once


@dataclass(frozen=True)
class LogEntry:
    """A message in the chat log."""

    id: int
    time: float
    """Unix time."""
    role: str
    """user or assistant."""
    text: str


@dataclass(frozen=True)
class Fact:
    """Something known about a person: "your {relation} is {value}"."""

    id: int
    relation: str
    value: str
    subject: str = "user"
    """Whom the fact is about."""
    time: float = 0.0
    """Unix time of the message that stated it; 0 if unknown."""
    sources: tuple[int, ...] = ()
    """Ids of the chat-log entries that stated it."""
    supersedes: int | None = None
    """Id of the older fact whose value this one replaces."""

    @property
    def key(self) -> tuple[str, str]:
        """What the fact is about. Of several facts with the same key the newest holds."""
        return fold(self.subject), fold(self.relation)

    @classmethod
    def from_json(cls, values: dict, default_id: int) -> "Fact":
        """A fact written by hand needs only a relation and a value. Raises ValueError if it is not valid."""
        if not isinstance(values, dict):
            raise ValueError('a fact is an object with "relation" and "value"')
        for name in ("relation", "value"):
            if not isinstance(values.get(name), str) or not values[name].strip():
                raise ValueError(f'a fact needs "{name}", a text that is not empty')
            values = values | {name: values[name].encode(errors="replace").decode()}  # without lone surrogates
        keys = [field.name for field in fields(cls)]
        unknown_keys = sorted(set(values) - set(keys))
        if unknown_keys:
            raise ValueError(f'"{unknown_keys[0]}" is not a key of a fact; the keys are {", ".join(keys)}')
        fact = cls(**{"id": default_id} | values)
        has_valid_type = {
            "id": isinstance(fact.id, int),
            "subject": isinstance(fact.subject, str),
            "time": isinstance(fact.time, (int, float)),
            "sources": isinstance(fact.sources, (list, tuple)) and all(isinstance(i, int) for i in fact.sources),
            "supersedes": isinstance(fact.supersedes, int | None),
        }
        for name, is_valid in has_valid_type.items():
            if not is_valid:
                raise ValueError(f'"{name}" of a fact cannot be {values[name]!r:.40}')
        return replace(fact, sources=tuple(fact.sources))

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class AdapterInputs:
    """What an adapter was trained from: adapter/inputs.json. The same inputs give the same adapter, byte for byte."""

    base: str
    """Name of the base model."""
    base_finished: float
    """When the base model was finished: another model of the same name has another time."""
    facts: tuple[tuple[str, str], ...]
    """(relation, value) of each fact."""

    @classmethod
    def of(cls, base: ModelFolder, facts: list[Fact]) -> "AdapterInputs":
        return cls(base.name, base.card.finished, tuple((fact.relation, fact.value) for fact in facts))

    @classmethod
    def from_json(cls, values: dict) -> "AdapterInputs":
        facts = tuple((relation, value) for relation, value in values["facts"])
        return cls(values["base"], values["base_finished"], facts)

    @classmethod
    def read(cls, adapter: Path) -> "AdapterInputs | None":
        """Inputs of the adapter in that folder; None if they were not written."""
        path = adapter / "inputs.json"
        return cls.from_json(read_json(path)) if path.exists() else None

    def write(self, adapter: Path) -> None:
        write_json(adapter / "inputs.json", asdict(self))


@dataclass(frozen=True)
class Traces:
    """What says something of a fact."""

    certain: list[LogEntry]
    """Messages that stated it or mention its value."""
    possible: list[LogEntry]
    """Other messages that may mention its value (mentions.py)."""
    facts: list[Fact]
    """Other facts that mention or may mention it."""
    files: list[Path]
    """Files of other programs that mention or may mention it."""


class Person:
    """The folder of a person. Each call reads the files again, since a chat, a server and a night may write them."""

    def __init__(self, name: str):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UserError(
                f"'{name}' is not a valid name of a person: use letters from a to z, digits, '.', '_' and '-', a letter"
                " or digit first, at most 64 characters"
            )
        self.name = name
        self.path = home() / "people" / name

    def create(self) -> "Person":
        """Make the folder, unless it exists."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        return self

    @property
    def exists(self) -> bool:
        return self.path.exists()

    @property
    def line_history(self) -> Path:
        """File of the lines typed in earlier sessions of the terminal."""
        return self.path / "line_history"

    # -- chat log -----------------------------------------------------------------------------------------------------

    def read_chat_log(self) -> list[LogEntry]:
        path = self.path / "chat_log.jsonl"
        entries = []
        for number, values in enumerate(read_json_lines(path), 1):
            if not isinstance(values, dict) or values.keys() != {"id", "time", "role", "text"}:
                raise UserError(f"{path}, line {number}: not a message of a chat log; delete this line")
            entries.append(LogEntry(**values))
        return entries

    def log_message(self, role: str, text: str, timestamp: float | None = None) -> LogEntry:
        """Append a message of `role` (user or assistant) to the chat log."""
        with self.chat_log_lock():
            used_ids = [entry.id for entry in self.read_chat_log()[-1:]]
            for fact in self.read_facts():
                used_ids += fact.sources  # the entry may have been deleted; its id is not used again
            timestamp = round(time.time() if timestamp is None else timestamp, 3)
            entry = LogEntry(1 + max(used_ids, default=0), timestamp, role, text)
            append_json_line(self.path / "chat_log.jsonl", asdict(entry))
            return entry

    def log_user_message(self, text: str) -> LogEntry:
        """Append what the user wrote. A repeated message, which asks for another answer, is logged once."""
        user_entries = [entry for entry in self.read_chat_log() if entry.role == "user"]
        if user_entries:
            last = user_entries[-1]
            if last.text == text and time.time() - last.time < REPEAT_SECONDS:
                return last
        return self.log_message("user", text)

    def chat_log_lock(self):
        """Lock the chat log for a short time. A night, which takes minutes, does not hold it."""
        return exclusive_lock(self.path / ".chat_log.lock")

    @property
    def last_processed_id(self) -> int:
        """Id of the last chat-log entry that the fact extractor has processed; 0 if there is none."""
        path = self.path / "last_processed.json"
        return read_json(path) if path.exists() else 0

    def write_last_processed_id(self, entry_id: int) -> None:
        write_json(self.path / "last_processed.json", entry_id)

    # -- fact store ---------------------------------------------------------------------------------------------------

    def read_facts(self) -> list[Fact]:
        """All facts, the oldest first, superseded ones included. The file may be edited by hand."""
        path = self.path / "facts.jsonl"
        facts = []
        for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], 1):
            if not line.strip():
                continue
            try:
                facts.append(Fact.from_json(json.loads(line), next_fact_id(facts)))
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path}, line {number}: {e}; correct or delete this line") from None
        return facts

    def write_facts(self, facts: list[Fact]) -> None:
        write_json_lines(self.path / "facts.jsonl", [fact.to_json() for fact in facts])

    def find_fact(self, fact_id: int) -> Fact:
        for fact in self.read_facts():
            if fact.id == fact_id:
                return fact
        raise UserError(f"there is no fact {fact_id}: `nanoghost memory --person {self.name}` lists the facts")

    def fact_history(self, fact_id: int) -> list[Fact]:
        """A fact and the older values of it."""
        fact = self.find_fact(fact_id)
        return [other for other in self.read_facts() if other.key == fact.key]

    def traces(self, history: list[Fact]) -> "Traces":
        """What the files of this person say of these facts (their own lines in the fact store aside)."""
        mentions = Mentions.of(fact.value for fact in history)
        sources = {source for fact in history for source in fact.sources}
        certain, possible = [], []
        for entry in self.read_chat_log():
            if entry.id in sources or mentions.is_certain(entry.text):
                certain.append(entry)
            elif mentions.is_possible(entry.text):
                possible.append(entry)
        ids = {fact.id for fact in history}
        facts = [f for f in self.read_facts() if f.id not in ids and mentions.is_possible(f"{f.relation} {f.value}")]
        files = [path for path in self.foreign_files() if mentions.is_possible(path.read_text(errors="replace"))]
        return Traces(certain, possible, facts, files)

    def foreign_files(self) -> list[Path]:
        """Files that are not written for this person alone: backups of an editor, lines typed into other chats."""
        names = (*PERSON_FILES, *PERSON_FOLDERS)
        inside = [path for path in self.path.rglob("*") if path.relative_to(self.path).parts[0] not in names]
        return sorted(path for path in [*inside, line_history()] if path.is_file())

    def delete_fact(self, fact_id: int, with_possible: bool = False) -> tuple[Fact, int]:
        """Delete a fact and everything derived from it; returns the fact, and the number of deleted chat-log entries.

        Deletes older values of the same fact, all chat-log entries that stated or mention one of the values, the
        records of all nights, the adapter, and the lines typed in the terminal. The next night trains another adapter,
        which never saw the fact.
        `with_possible`: also the chat-log entries that may mention it.
        """
        fact = self.find_fact(fact_id)
        history = self.fact_history(fact_id)
        # The fact store comes last: after a crash in between, the fact is still listed and can be deleted again.
        derived = [self.path / "adapter", self.path / ".adapter.old", self.line_history, *self.path.glob("nights/*")]
        left_by_a_crash = [*self.path.glob(".*.tmp"), *self.path.glob(".export.zip")]
        for path in derived + left_by_a_crash:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with self.chat_log_lock():
            entries, traces = self.read_chat_log(), self.traces(history)
            deleted = {entry.id for entry in traces.certain + (traces.possible if with_possible else [])}
            remaining = [entry for entry in entries if entry.id not in deleted]
            write_json_lines(self.path / "chat_log.jsonl", [asdict(entry) for entry in remaining])
        self.write_facts([other for other in self.read_facts() if other not in history])
        return fact, len(entries) - len(remaining)

    # -- adapter ------------------------------------------------------------------------------------------------------

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter of the last accepted night."""
        path = self.path / "adapter"
        return path if (path / "adapter_model.safetensors").exists() else None

    @property
    def adapter_inputs(self) -> AdapterInputs | None:
        """What that adapter was trained from; None if there is no adapter."""
        return AdapterInputs.read(self.adapter) if self.adapter else None

    def adapter_for(self, model: ModelFolder) -> Path | None:
        """That adapter, if it was trained for this model."""
        inputs = self.adapter_inputs
        if not inputs or not model.exists:
            return None
        same_base = (inputs.base, inputs.base_finished) == (model.name, model.card.finished)
        return self.adapter if same_base else None


def open_person(name: str) -> Person:
    person = Person(name)
    if not person.exists:
        raise UserError(f"there is no person '{name}' yet: `nanoghost chat --person {name}` creates one")
    return person


# -- facts ------------------------------------------------------------------------------------------------------------


def next_fact_id(facts: list[Fact]) -> int:
    return 1 + max((fact.id for fact in facts), default=0)


def current_facts(facts: list[Fact]) -> list[Fact]:
    """The facts that hold now: the newest one for each (subject, relation)."""
    return list({fact.key: fact for fact in facts}.values())


def search_facts(facts: list[Fact], query: str, limit: int) -> list[Fact]:
    """Full-text search: up to `limit` facts that share a word with the query, the best match first."""
    index = TextIndex([f"{fact.relation} {statement(fact.relation, fact.value)}" for fact in facts])
    return [facts[i] for i in index.search(query, limit)]


@dataclass(frozen=True)
class MergedFacts:
    """A fact store after new facts were added."""

    facts: list[Fact]
    """The whole store, superseded facts included."""
    added: list[Fact]
    """Facts that were not in the store."""

    @property
    def corrections(self) -> list[Fact]:
        """Added facts that replace another value."""
        return [fact for fact in self.added if fact.supersedes is not None]


def merge_facts(stored: list[Fact], stated: list[tuple[LogEntry, list[tuple[str, str]]]]) -> MergedFacts:
    """Add what messages stated, (relation, value) pairs for each entry of the chat log, in order.

    A value that is stored already only gets another source; another value supersedes it.
    """
    facts = list(stored)
    added = []
    for entry, pairs in stated:
        for relation, value in pairs:
            fact = Fact(next_fact_id(facts), relation, value, time=entry.time, sources=(entry.id,))
            previous = next((f for f in current_facts(facts) if f.key == fact.key), None)
            if previous and fold(previous.value) == fold(value):
                restated = replace(previous, sources=(*previous.sources, entry.id))
                facts = [restated if f is previous else f for f in facts]
                added = [restated if f is previous else f for f in added]
                continue
            if previous:
                fact = replace(fact, supersedes=previous.id)
            facts.append(fact)
            added.append(fact)
    return MergedFacts(facts, added)


def write_json_lines(path: Path, values: list[dict]) -> None:
    write_atomic(path, b"".join(map(json_line, values)))
