"""`nanoghost memory --person NAME`: show and change what is stored about a person.

    without an option    list the current facts
    --search WORDS       list the facts that match these words
    --add RELATION VALUE, --correct ID VALUE
                         store a fact, or replace a value; the next night learns it
    --forget ID          delete a fact and everything derived from it, then run a night without it
    --export FILE.zip    write everything stored about this person into an archive
    --delete             delete everything stored about this person

The fact store is a file of JSON lines (people/NAME/facts.jsonl) that may also be edited by hand; the next night
learns what it contains then.
"""

import json
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nanoghost import hardware
from nanoghost.commands.models import confirm_removal
from nanoghost.errors import StopFlag, UserError
from nanoghost.home import write_lock
from nanoghost.memory.extract import unprocessed_messages
from nanoghost.memory.night import base_model, run_night
from nanoghost.memory.phrasings import statement
from nanoghost.memory.store import Person, current_facts, merge_facts, open_person, search_facts
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
    """Id of a fact to delete, with the messages that stated it; then runs a night without it."""
    export: Path | None = None
    """Zip file to write, with everything stored about this person."""
    delete: bool = False
    """Delete everything stored about this person."""
    yes: bool = False
    """Do not ask for confirmation before --delete."""
    model: str | None = None
    """Base model of the night after --forget; default: that of the last night, or smollm2."""


def command(settings: MemorySettings) -> None:
    check_settings(settings)
    person = Person(settings.person).create() if settings.add else open_person(settings.person)
    if settings.export:
        export(person, settings.export)
    elif settings.delete:
        delete(person, settings.yes)
    elif settings.forget is not None:
        forget(person, settings.forget, settings.model)
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
    if settings.add and not all(part.strip() for part in settings.add):
        raise UserError("--add needs a non-empty relation and a non-empty value")
    if settings.correct and not settings.correct[1].strip():
        raise UserError("--correct needs a non-empty value")


def store_fact(person: Person, relation: str, value: str) -> None:
    """Store a fact as if the person had written it in a chat; it supersedes an older value."""
    with write_lock(person):
        entry = person.log_message("user", f"My {relation} is {value}.")
        relation, value = relation.strip(), value.strip()
        person.write_facts(merge_facts(person.read_facts(), [(entry, [(relation, value)])]).facts)
    Display().print(
        f"stored: {statement(relation, value)} The next night learns it: `nanoghost sleep --person {person.name}`"
    )


def forget(person: Person, fact_id: int, model: str | None) -> None:
    """Delete a fact, then run a night without it."""
    hardware.prepare()
    base = base_model(person, model)  # before the adapter, which names it, is deleted
    with write_lock(person), StopFlag() as stop_flag:
        fact, deleted_entries = person.delete_fact(fact_id)
        display = Display()
        display.print(
            f"deleted: your {fact.relation}, {deleted_entries} messages of the chat log,"
            " and the adapter that was trained on it"
        )
        run_night(person, base, display, stop_flag, deleted_facts=1)


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
        print(f"{fact.id:>4}  {day:10}  {statement(fact.relation, fact.value)}")
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
