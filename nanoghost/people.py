"""People who talk to a model: what was said, what is known of them, and what their nights made of it.

    $NANOGHOST_HOME/people/NAME/       readable by its owner alone
    journal.jsonl    what was said, append-only: id, time, speaker (user or assistant), text
    ledger.jsonl     what is known: id, subject, relation, value, time, sources (ids of the journal), supersedes (id)
    adapter/         the correction of the base model that knows it (PEFT's form)
    nights/          a folder for each night: what was learned, and its report

People share nothing: no file, no adapter, no cache.
"""

import json
import re
import shutil
import time
from pathlib import Path

from nanoghost.errors import UserError
from nanoghost.runs import ModelFolder, append_line, home, read_json, read_lines, write_atomic


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
        journal = self.path / "journal.jsonl"
        number = 1 + max((entry["id"] for entry in read_lines(journal)[-1:]), default=0)
        entry = {"id": number, "time": round(time.time() if when is None else when, 3), "speaker": speaker, "text": text}
        append_line(journal, entry)
        return entry

    # ── the ledger ────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def ledger(self) -> list[dict]:
        return read_lines(self.path / "ledger.jsonl")

    def write_ledger(self, rows: list[dict]) -> None:
        write_lines(self.path / "ledger.jsonl", rows)

    def forget(self, number: int) -> dict:
        """Remove a row of the ledger, older values of the same thing, what was said of them, the nights' records and the adapter.

        The next night makes another adapter, which never saw it.
        """
        rows = {row["id"]: row for row in self.ledger}
        if number not in rows:
            raise UserError(f"{self.name}'s ledger has no row {number}: `nanoghost sleep --person {self.name} --dry-run` lists them")
        key = key_of(rows[number])
        gone = [row for row in rows.values() if key_of(row) == key]
        sources = {source for row in gone for source in row["sources"]}
        write_lines(self.path / "journal.jsonl", [e for e in self.journal if e["id"] not in sources])
        for path in (self.path / "adapter", *(self.path / "nights").glob("*")):  # they know it, they quote it
            shutil.rmtree(path, ignore_errors=True)
        self.write_ledger([row for row in rows.values() if row not in gone])
        return rows[number]

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that the last good night made."""
        path = self.path / "adapter"
        return path if (path / "adapter_model.safetensors").exists() else None

    def adapter_for(self, model: ModelFolder) -> Path | None:
        """That adapter, if it was made for this model."""
        if not self.adapter or read_json(self.adapter / "adapter_config.json")["base_model_name_or_path"] != model.name:
            return None
        return self.adapter


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
