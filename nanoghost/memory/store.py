"""People who talk to a model: what was said, what is known of them, and what their nights made of it.

    $NANOGHOST_HOME/people/NAME/       readable by its owner alone
    journal.jsonl    what was said, append-only: id, time, speaker (user or assistant), text
    ledger.jsonl     what is known: id, subject, relation, value, time, sources (ids of the journal), supersedes (id)
    adapter/         the correction of the base model that knows it (PEFT's form)
    nights/          a folder for each night: what was learned, and its report
    read.json        up to which entry of the journal notes were taken

People share nothing: no file, no adapter, no cache.
"""

import fcntl
import json
import re
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.home import ModelFolder, append_line, home, read_json, read_lines, write_atomic


class Person:
    def __init__(self, name: str):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise UserError(f"'{name}' is not a person's name here: use letters, digits, '.', '_' and '-'")
        self.name = name
        self.path = home() / "people" / name

    def create(self) -> "Person":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        return self

    @property
    def exists(self) -> bool:
        return self.path.exists()

    # ── the journal ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def journal(self) -> list[dict]:
        return read_lines(self.path / "journal.jsonl")

    def say(self, speaker: str, text: str, when: float | None = None) -> dict:
        """Write down what `speaker` ("user" or "assistant") said."""
        with self.journal_lock():
            used = [
                *(entry["id"] for entry in self.journal[-1:]),
                *(source for row in self.ledger for source in row["sources"]),
            ]
            number = 1 + max(used, default=0)  # a number that was forgotten is not given again
            entry = {
                "id": number,
                "time": round(time.time() if when is None else when, 3),
                "speaker": speaker,
                "text": text,
            }
            append_line(self.path / "journal.jsonl", entry)
            return entry

    def hear(self, text: str) -> dict:
        """Write down what the person said; who wants another answer to the same within the hour has said it once."""
        last = next((entry for entry in reversed(self.journal) if entry["speaker"] == "user"), None)
        again = last and last["text"] == text and time.time() - last["time"] < 3600
        return last if again else self.say("user", text)

    @contextmanager
    def journal_lock(self):
        """One at a time in the journal: a server, a chat and a correction may write it. A night, which lasts, keeps nobody out."""
        with open(self.path / ".journal.lock", "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    # ── the ledger ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def ledger(self) -> list[dict]:
        """Its rows, oldest first. Rows written by hand need a relation and a value."""
        path, rows = self.path / "ledger.jsonl", []
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise UserError(f"{path}, line {number}: {e}") from None
            if not isinstance(row, dict) or not all(
                isinstance(row.get(k), str) and row[k].strip() for k in ("relation", "value")
            ):
                raise UserError(f'{path}, line {number}: a row needs "relation" and "value", each a text')
            rows.append(EMPTY | {"id": 1 + max((r["id"] for r in rows), default=0)} | row)
        return rows

    def write_ledger(self, rows: list[dict]) -> None:
        write_lines(self.path / "ledger.jsonl", rows)

    @property
    def read_until(self) -> int:
        """Number of the last entry of the journal that a night took notes of."""
        path = self.path / "read.json"
        return read_json(path) if path.exists() else 0

    def row(self, number: int) -> dict:
        for row in self.ledger:
            if row["id"] == number:
                return row
        raise UserError(f"{self.name}'s ledger has no row {number}: `nanoghost memory --person {self.name}` lists them")

    def forget(self, number: int) -> tuple[dict, int]:
        """Remove a row of the ledger, older values of the same thing, every line of the journal that told or names one of
        them, the nights' records and the adapter; returns the row, and how many lines of the journal went.

        The next night makes another adapter, which never saw it.
        """
        found = self.row(number)
        gone = [row for row in self.ledger if key_of(row) == key_of(found)]
        sources = {source for row in gone for source in row["sources"]}
        names = re.compile("|".join(rf"(?<!\w){re.escape(row['value'])}(?!\w)" for row in gone), re.IGNORECASE)
        for path in (self.path / "adapter", self.path / ".adapter.old", *(self.path / "nights").glob("*")):
            shutil.rmtree(path, ignore_errors=True)  # they know it, they quote it
        with self.journal_lock():
            journal = self.journal
            kept = [e for e in journal if e["id"] not in sources and not names.search(e["text"])]
            write_lines(self.path / "journal.jsonl", kept)
        self.write_ledger([row for row in self.ledger if row not in gone])
        return found, len(journal) - len(kept)

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that the last good night made."""
        path = self.path / "adapter"
        return path if (path / "adapter_model.safetensors").exists() else None

    def adapter_for(self, model: ModelFolder) -> Path | None:
        """That adapter, if it was made for this model."""
        made_for = self.made_from["base"] if self.adapter else None
        return self.adapter if made_for == [model.name, model.exists and model.card["finished"]] else None

    @property
    def made_from(self) -> dict:
        """Of the adapter: "base" (name, when it was finished) and "rows" ([relation, value] of each)."""
        return read_json(self.adapter / "made_from.json")


EMPTY = {"id": 0, "subject": "user", "relation": "", "value": "", "time": 0, "sources": [], "supersedes": None}  # fmt: skip


def key_of(row: dict) -> tuple[str, str]:
    return row["subject"].casefold(), row["relation"].casefold()


def current(rows: list[dict]) -> list[dict]:
    """What holds now: of each (subject, relation) the newest row."""
    return list({key_of(row): row for row in rows}.values())


def write_lines(path: Path, values: list) -> None:
    write_atomic(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def open_person(name: str) -> Person:
    person = Person(name)
    if not person.exists:
        raise UserError(f"nobody called '{name}' has talked here yet: `nanoghost chat --person {name}` begins")
    return person
