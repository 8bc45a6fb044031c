"""`nanoghost memory --person NAME`: what is known of somebody, and their say in it.

    nothing else         the ledger as it holds now
    --search WORDS       what has to do with them
    --add WHAT VALUE     write a row by hand, --correct N VALUE: put another value in the place of row N's
    --forget N           remove row N with what was said of it and all that was made from it, then sleep again without it
    --export FILE.zip    everything of this person in one archive
    --delete             everything of this person is removed

The ledger is a file of JSON lines (people/NAME/ledger.jsonl) that may be read and edited by hand as well; the next night learns
what stands there then.
"""

import json
import shutil
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nanoghost import hardware
from nanoghost.commands.models import confirmed
from nanoghost.errors import UserError
from nanoghost.home import Stopping, writing
from nanoghost.memory import consolidate, extract
from nanoghost.memory.phrases import about, statement
from nanoghost.memory.store import Person, current, key_of, open_person
from nanoghost.progress import Display


@dataclass(frozen=True)
class MemorySettings:
    person: str
    """Whose memory."""
    search: str | None = None
    """Show only what has to do with these words."""
    add: tuple[str, str] | None = None
    """What it is ("dog's name") and its value."""
    correct: tuple[int, str] | None = None
    """Number of a row, and the value that is true."""
    forget: int | None = None
    """Number of a row to remove, with what was said of it; sleeps again without it."""
    export: Path | None = None
    """Zip file to write, with all that is kept of this person."""
    delete: bool = False
    """Remove all that is kept of this person."""
    yes: bool = False
    """Do not ask before --delete."""
    model: str | None = None
    """The base model to sleep with after --forget; default: the one that made the adapter that is there, or smollm2."""
    json: bool = False
    """Print what is known as JSON on standard output."""


def command(settings: MemorySettings) -> None:
    asked = [name for name in ("search", "add", "correct", "forget", "export", "delete") if getattr(settings, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two things: choose one")
    if not all(str(part).strip() for part in settings.add or settings.correct or ()):
        raise UserError("what it is and its value are both needed")
    person = Person(settings.person).create() if settings.add else open_person(settings.person)
    if settings.export:
        export(person, settings.export)
    elif settings.delete:
        delete(person, settings.yes)
    elif settings.forget is not None:
        forget(person, settings)
    else:
        if settings.add or settings.correct:
            with writing(person):
                write(person, settings)
        show(person, settings)


def write(person: Person, settings: MemorySettings) -> None:
    relation, value = settings.add or (None, settings.correct[1])
    if settings.correct:
        relation = person.row(settings.correct[0])["relation"]
    said = person.say("user", f"My {relation} is {value}.")
    person.write_ledger(extract.merge(person.ledger, [(said, [(relation.strip(), value.strip())])])[0])
    Display().say(
        f"written down: {statement(relation.strip(), value.strip())} The next night learns it: `nanoghost sleep --person {person.name}`"
    )


def forget(person: Person, settings: MemorySettings) -> None:
    hardware.prepare()
    base = consolidate.base_of(person, settings.model)  # before anything is removed
    with writing(person), Stopping() as stopping:
        gone, entries = person.forget(settings.forget)
        display = Display()
        display.say(
            f"removed: your {gone['relation']}, and {entries} lines of the journal; the adapter that knew it is gone"
        )
        consolidate.night(
            person, base, consolidate.SleepSettings(person.name, base.name), display, stopping, forgotten=1
        )


def show(person: Person, settings: MemorySettings) -> None:
    rows = sorted(current(person.ledger), key=key_of)
    if settings.search:
        rows = about(rows, settings.search, len(rows))
    if settings.json:
        print(json.dumps({"rows": rows}, ensure_ascii=False))
        return
    for row in rows:
        day = (
            time.strftime("%Y-%m-%d", time.localtime(row["time"])) if row["time"] else ""
        )  # a row of one's own may have none
        print(f"{row['id']:>4}  {day:10}  {statement(row['relation'], row['value'])}")
    if not rows:
        Display().say("nothing is known" + (" about that" if settings.search else " yet"))
    if waiting := len(extract.unread(person)):
        Display().say(
            f"messages that no night has read yet: {waiting} (`nanoghost sleep --person {person.name}` reads them)"
        )


def export(person: Person, path: Path) -> None:
    if path.suffix != ".zip":
        raise UserError(f"--export writes a zip file: call it something.zip, not '{path}'")
    if path.exists():
        raise UserError(f"{path} is there already")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.absolute().parent}")
    with writing(person):
        made = person.path / ".export.zip"
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(p for p in person.path.rglob("*") if p.is_file() and not p.name.startswith(".")):
                archive.write(file, file.relative_to(person.path.parent))
        shutil.move(made, path)
    path.chmod(0o600)
    Display().say(f"everything of {person.name} is in {path}")


def delete(person: Person, yes: bool) -> None:
    if not yes and not confirmed(f"all that is kept of '{person.name}'"):
        return
    with writing(person):
        shutil.rmtree(person.path)
    Display().say(f"nothing of {person.name} is kept any more")
