"""`nanoghost memory --person NAME`: show and change what is stored about a person.

    without an option    list the current facts
    --search WORDS       list the facts that match these words
    --add RELATION VALUE, --correct ID VALUE
                         store a fact, or replace a value; the next night learns it
    --forget ID          delete a fact and everything derived from it, and replace the adapter by a night without it;
                         messages that may mention it in another form are shown first, and at the end what is left
    --export FILE.zip    write everything stored about this person into an archive
    --delete             delete everything stored about this person

The fact store is a file of JSON lines (people/NAME/facts.jsonl) that may also be edited by hand; the next night
learns what it contains then.
"""

import json
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanoghost import hardware
from nanoghost.commands.models import confirm_removal
from nanoghost.errors import StopFlag, UserError
from nanoghost.home import ModelFolder, write_lock
from nanoghost.memory.extract import unprocessed_messages
from nanoghost.memory.night import base_model, run_night
from nanoghost.memory.phrasings import statement
from nanoghost.memory.store import Fact, LogEntry, Person, current_facts, merge_facts, open_person, search_facts
from nanoghost.progress import Display, JsonFlag

ACTIONS = ("search", "add", "correct", "forget", "export", "delete")


@dataclass(frozen=True)
class MemorySettings(JsonFlag):
    person: str
    """Name of the person."""
    search: str | None = None
    """List only the facts that match these words."""
    add: tuple[str, str] | None = None
    """Relation ("dog's name") and value of a fact to store."""
    correct: tuple[int, str] | None = None
    """Id of a fact, and its correct value."""
    forget: int | None = None
    """Id of a fact to delete, with the messages that mention it; then a night without it replaces the adapter."""
    mentions: Literal["delete", "keep"] | None = None
    """With --forget: what happens to messages that may mention the value in another form; default: asks."""
    export: Path | None = None
    """Zip file to write, with everything stored about this person."""
    delete: bool = False
    """Delete everything stored about this person."""
    yes: bool = False
    """Do not ask for confirmation before --delete."""
    model: str | None = None
    """Base model of the night after --forget; default: that of the last night."""


def command(settings: MemorySettings) -> None:
    check_settings(settings)
    person = Person(settings.person).create() if settings.add else open_person(settings.person)
    if settings.export:
        export(person, settings.export)
    elif settings.delete:
        delete(person, settings.yes)
    elif settings.forget is not None:
        forget(person, settings.forget, settings.mentions, settings.model)
    else:
        if settings.add:
            store_fact(person, *settings.add)
        elif settings.correct:
            fact_id, value = settings.correct
            store_fact(person, person.find_fact(fact_id).relation, value)
        show(person, settings.search, settings.json)


def check_settings(settings: MemorySettings) -> None:
    actions = [name for name in ACTIONS if getattr(settings, name)]
    if len(actions) > 1:
        raise UserError(f"--{actions[0]} and --{actions[1]} exclude each other")
    for flag in ("mentions", "model"):
        if getattr(settings, flag) and settings.forget is None:
            raise UserError(f"--{flag} needs --forget")
    if settings.add and not all(part.strip() for part in settings.add):
        raise UserError("--add needs a non-empty relation and a non-empty value")
    if settings.correct and not settings.correct[1].strip():
        raise UserError("--correct needs a non-empty value")


def store_fact(person: Person, relation: str, value: str) -> None:
    """Store a fact as if the person had written it in a chat; it supersedes an older value."""
    relation, value = (text.encode(errors="replace").decode().strip() for text in (relation, value))
    with write_lock(person):
        entry = person.log_message("user", f"My {relation} is {value}.")
        person.write_facts(merge_facts(person.read_facts(), [(entry, [(relation, value)])]).facts)
    Display().print(
        f"stored: {statement(relation, value)} The next night learns it: `nanoghost sleep --person {person.name}`"
    )


def forget(person: Person, fact_id: int, mentions: str | None, model: str | None) -> None:
    """Delete a fact, show what still mentions it, then run a night without it if there was an adapter."""
    hardware.prepare()
    inputs = person.adapter_inputs
    has_base = model or (inputs and ModelFolder(inputs.base).is_finished)
    base = base_model(person, model) if has_base else None  # before the adapter, which names it, is deleted
    history = person.fact_history(fact_id)
    possible = person.traces(history).possible
    if possible and not mentions:
        mentions = "delete" if confirm_possible_mentions(possible, history[-1]) else "keep"
    with write_lock(person), StopFlag() as stop_flag:
        fact, deleted_entries = person.delete_fact(fact_id, mentions == "delete")
        show_what_is_left(person, history)
        display = Display()
        adapter = ", and the adapter that was trained on it" if inputs else ""
        display.print(f"deleted: your {fact.relation}, {deleted_entries} messages of the chat log{adapter}")
        if base:
            run_night(person, base, display, stop_flag, deleted_facts=1)


def confirm_possible_mentions(entries: list[LogEntry], fact: Fact) -> bool:
    """Show messages that may mention a fact, and ask the user whether to delete them, too."""
    show_lines(f'messages that may mention "{fact.value}" in another form:', map(describe_message, entries))
    if not sys.stdin.isatty():
        raise UserError(f"messages may mention your {one_line(fact.relation)}: add --mentions delete or keep")
    print("delete these messages, too? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def show_what_is_left(person: Person, history: list[Fact]) -> None:
    """List what still mentions, or may mention, facts that were deleted."""
    left = person.traces(history)
    lines = [describe_message(entry) for entry in left.certain + left.possible]
    lines += [f"fact {fact.id}: {statement(fact.relation, fact.value)}" for fact in left.facts]
    lines += [f"file {path}" for path in left.files]
    if lines:
        show_lines("still there, and may mention it:", lines)
    Display().print(
        "not searched: archives of --export, conversations that the chat page stored in a browser, and open chats"
    )


def describe_message(entry: LogEntry) -> str:
    return f"message {entry.id} ({entry.role}): {entry.text}"


def show_lines(title: str, lines: Iterable[str]) -> None:
    """Print to standard error."""
    print(title, file=sys.stderr)
    for line in lines:
        print(f"  {one_line(line)}", file=sys.stderr)


def one_line(text: str) -> str:
    """The text in one line, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "", " ".join(text.split()))


def show(person: Person, query: str | None, as_json: bool) -> None:
    """List the current facts, or those that match a query, and say how many messages wait for the next night."""
    facts = sorted(current_facts(person.read_facts()), key=lambda fact: fact.key)
    if query:
        facts = search_facts(facts, query, len(facts))
    if as_json:
        print(json.dumps({"facts": [fact.to_json() for fact in facts]}, ensure_ascii=False))
        return
    for fact in facts:
        day = time.strftime("%Y-%m-%d", time.localtime(fact.time)) if fact.time else ""
        print(f"{fact.id:>4}  {day:10}  {one_line(statement(fact.relation, fact.value))}")
    if not facts:
        Display().print("no facts match" if query else "no facts are stored yet")
    waiting = len(unprocessed_messages(person))
    if waiting:
        Display().print(
            f"messages that no night has processed yet: {waiting} (run `nanoghost sleep --person {person.name}`)"
        )


def export(person: Person, path: Path) -> None:
    """Write the person's folder, without hidden files, into a zip file that only its owner may read."""
    if path.suffix != ".zip":
        raise UserError(f"--export writes a zip file: '{path}' does not end in .zip")
    if path.exists():
        raise UserError(f"{path} exists already")
    if not path.absolute().parent.is_dir():
        raise UserError(f"the folder {path.absolute().parent} does not exist")
    with write_lock(person):
        unfinished = person.path / ".export.zip"
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(person.path.rglob("*")):
                if file.is_file() and not file.name.startswith("."):
                    archive.write(file, file.relative_to(person.path.parent))
        shutil.move(unfinished, path)
    path.chmod(0o600)
    Display().print(f"everything stored about {person.name} is in {path}")


def delete(person: Person, yes: bool) -> None:
    if not yes and not confirm_removal(f"everything stored about '{person.name}'"):
        return
    with write_lock(person):
        shutil.rmtree(person.path)
    Display().print(f"everything stored about {person.name} was deleted")
