"""`nanoghost sleep --person NAME`: run a night (night.py), or list the finished ones."""

import json
import time
from dataclasses import dataclass

from nanoghost import hardware
from nanoghost.errors import StopFlag
from nanoghost.home import write_lock
from nanoghost.memory.night import base_model, run_night
from nanoghost.memory.night_record import finished_nights
from nanoghost.memory.store import Person, open_person
from nanoghost.progress import Display, JsonFlag


@dataclass(frozen=True)
class SleepSettings(JsonFlag):
    person: str
    """Name of the person."""
    model: str | None = None
    """Base model that this person talks to; default: that of the last night, or smollm2."""
    dry_run: bool = False
    """Extract and show the facts, store and learn nothing. The first time trains the fact extractor (10 minutes)."""
    log: bool = False
    """List the finished nights."""


def command(settings: SleepSettings) -> None:
    hardware.prepare()
    person = open_person(settings.person)
    if settings.log:
        list_nights(person, settings.json)
        return
    base = base_model(person, settings.model)
    with write_lock(person), StopFlag() as stop_flag:
        record = run_night(person, base, Display(), stop_flag, dry_run=settings.dry_run)
    if settings.json and record:
        print(json.dumps(record.summary()))


def list_nights(person: Person, as_json: bool) -> None:
    records = finished_nights(person)
    for record in records:
        finished = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.finished))
        Display().print(
            f"{record.number:>3}  {finished}  {len(record.new_facts)} new facts, {record.facts} in all,"
            f" recall {record.after.recall:.0%}  {record.status}"
        )
    if as_json:
        print(json.dumps({"nights": [record.to_json() for record in records]}))
