"""From the journal to the ledger: what a person tells of themselves, one line each as "relation: value".

A small model does not do this by being asked, so it is taught to: an adapter called scribe, trained once for a base model
on messages that are put together from people.toml. It reads a message with the one before it and the reply to that ("Her
name is Ines." says little alone). What it writes is checked: a value must stand in the message itself.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from nanoghost import hardware
from nanoghost.engine.generate import open_engine
from nanoghost.formats.model_folder import load_model
from nanoghost.home import ModelFolder, home
from nanoghost.memory import train_adapter
from nanoghost.memory.phrases import book, dice, idle, low, part, relations, things
from nanoghost.memory.store import Person, current, key_of
from nanoghost.tokenizer.chat_format import render
from nanoghost.train.packing import Lesson
from nanoghost.train.run import base_card

ASK = "Write down what the user tells now about their own life, one line each, as: what it is: value. If it is nothing, write: nothing"
NOTHING = "nothing"
MOST = 48  # tokens of an answer
LONGEST = 1000  # letters of a message that are read
GLIMPSE = 160  # letters of what was said before it
LESSONS = 3000
OPENINGS = (
    "My ",
    "The ",
    "We ",
    "Our ",
    "She ",
    "She's",
    "He ",
    "He's",
    "It ",
    "It's",
    "On ",
    "Every ",
)  # written small inside a sentence
RECIPE = train_adapter.Recipe(rank=16, context=384)


@dataclass(frozen=True)
class Heard:
    """A user's message, and what was said before it."""

    text: str
    before: str = ""
    reply: str = ""

    @property
    def shown(self) -> str:
        pieces = [("Earlier", self.before[-GLIMPSE:]), ("Reply", self.reply[:GLIMPSE]), ("Now", self.text[:LONGEST])]
        return "\n".join(f"{name}: {' '.join(text.split())}" for name, text in pieces if text)


def heard(journal: list[dict], since: int) -> list[tuple[dict, Heard]]:
    """The user's entries after number `since`, each with what stands before it."""
    found, before, reply = [], "", ""
    for entry in journal:
        if entry["speaker"] != "user":
            reply = entry["text"]
            continue
        if entry["id"] > since:
            found.append((entry, Heard(entry["text"], before, reply)))
        before, reply = entry["text"], ""
    return found


def unread(person: Person) -> list[tuple[dict, Heard]]:
    """What a person said since the last night, but for what they wrote into the ledger themselves."""
    noted = {source for row in person.ledger for source in row["sources"]}
    return [(entry, message) for entry, message in heard(person.journal, person.read_until) if entry["id"] not in noted]


# ── lessons ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def message(rng, split: str) -> tuple[Heard, list[tuple[str, str]]]:
    """What a user says, and what it tells: (relation, value) of up to three things."""
    talk, kind = part(book()["small_talk"], split), rng.random()
    relation = rng.choice(list(relations().values()))
    value = rng.choice(relation.values)
    before, reply = rng.choice([rng.choice(talk), aside(rng, split)]), rng.choice(part(book()["replies"], split))
    if kind < 0.12:  # told in two messages
        before, text = rng.choice(part(relation.apart, split))
        return Heard(text.format(v=value), before, reply), [(relation.relation, value)]
    if kind < 0.2:  # an answer
        ask = rng.choice(part(book()["asked_back"], split)).format(a=relation.relation)
        text = rng.choice(part(book()["answered_back"], split)).format(v=value)
        return Heard(text, before, f"{reply} {ask}".strip()), [(relation.relation, value)]
    if rng.random() < 0.3:
        before, reply = "", ""
    if kind < 0.5:
        texts = [rng.choice(talk), rng.choice(part(relation.asked, split)), part(relation.apart, split)[0][0]]
        text = rng.choice(texts + [rng.choice(idle(split)) for _ in range(2) if idle(split)])
        return Heard(text, before, reply), []
    found = {}
    while len(found) < (1 if kind < 0.8 else 2 if kind < 0.95 else 3):
        told, text = sentence(rng, split)
        if told[0] not in (relation for relation, _ in found):
            found[told] = text
    pieces = list(found.values())
    if len(pieces) > 1 and rng.random() < 0.6:  # in one breath
        pieces = [
            rng.choice((", and ", " and ", ", ", "; ", " - ")).join(clause(text, i) for i, text in enumerate(pieces))
        ]
    if rng.random() < 0.4:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(talk))
    return Heard(" ".join(pieces), before, reply), list(found)


def sentence(rng, split: str) -> tuple[tuple[str, str], str]:
    """((relation, value), a sentence that tells it)."""
    thing = (
        rng.choice(things(split)) if things(split) and rng.random() < 0.5 else rng.choice(list(relations().values()))
    )
    said, changed = ((ways if isinstance(ways, tuple) else part(ways, split)) for ways in (thing.said, thing.changed))
    value, before = rng.sample(thing.values, 2)
    return (thing.relation, value), rng.choice(changed if rng.random() < 0.2 else said).format(v=value, w=before)


def clause(text: str, place: int) -> str:
    """A sentence as it stands at a place among others in one longer sentence."""
    text = text.rstrip(".")
    return low(text) if place and text.startswith(OPENINGS) else text


def aside(rng, split: str) -> str:
    """Something told before, which is not to be noted again."""
    relation = rng.choice(list(relations().values()))
    return rng.choice(part(relation.said, split)).format(v=rng.choice(relation.values))


def conversation(heard: Heard, found: list[tuple[str, str]] | None = None) -> list[dict]:
    messages = [{"role": "system", "content": ASK}, {"role": "user", "content": heard.shown}]
    if found is None:
        return messages
    lines = "\n".join(f"{relation}: {value}" for relation, value in found)
    return [*messages, {"role": "assistant", "content": lines or NOTHING}]


def scribe(base: ModelFolder, stopping, display) -> Path:
    """The folder of the adapter of that base that takes notes, trained if there is none yet."""
    rng = dice("scribe")
    conversations = [conversation(*message(rng, "train")) for _ in range(LESSONS)]
    key = json.dumps([base.card["finished"], conversations, asdict(RECIPE)])
    folder = home() / "data" / f"scribe-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not (folder / "adapter" / "adapter_model.safetensors").exists():
        display.say(
            f"{base.name} learns to take notes, which it does once (some minutes; Ctrl-C and the same command go on) ..."
        )
        model, tokenizer = load_model(base.path, hardware.compute_dtype(), hardware.device())
        lessons = [Lesson(*render(messages, tokenizer)) for messages in conversations]
        said = [train_adapter.certain(x) for x in lessons]
        train_adapter.fit(
            model,
            base.name,
            base_card(base.card),
            lessons,
            said,
            [1.0] * len(lessons),
            folder,
            RECIPE,
            stopping,
            display,
        )
    return folder / "adapter"


# ── notes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def extract(base: ModelFolder, scribe: Path, messages: list[Heard]) -> list[tuple[list, list]]:
    """What each message tells, (relation, value), each value standing in it; and the lines in which none does."""
    if not messages:
        return []
    engine = open_engine(base, seats=16, room=1024, adapter=scribe)
    written = train_adapter.said(engine, [conversation(one) for one in messages], MOST)
    return [parsed(lines, one.text) for lines, one in zip(written, messages)]


def parsed(written: str, text: str) -> tuple[list[tuple[str, str]], list[str]]:
    """(the notes, lines that are none)."""
    found, refused = [], []
    for line in written.splitlines():
        relation, colon, value = line.partition(":")
        relation, value = relation.strip(), value.strip().rstrip(".")
        if colon and value and value.casefold() in text.casefold() and 0 < len(relation.split()) <= 6:
            found.append((relation, value))
        elif line.strip() and line.strip() != NOTHING:
            refused.append(line.strip())
    return list(dict.fromkeys(found)), refused


def merge(
    ledger: list[dict], told: list[tuple[dict, list[tuple[str, str]]]]
) -> tuple[list[dict], list[dict], list[dict]]:
    """(the new ledger, new rows, those among them that replace another value); `told` are (journal entry, what it tells)."""
    rows, new, corrected = list(ledger), [], []
    for entry, found in told:
        for relation, value in found:
            row = {"id": 1 + max((r["id"] for r in rows), default=0), "subject": "user", "relation": relation, "value": value,
                   "time": entry["time"], "sources": [entry["id"]], "supersedes": None}  # fmt: skip
            before = next((r for r in current(rows) if key_of(r) == key_of(row)), None)
            if before and before["value"].casefold() == value.casefold():
                rows = [r | {"sources": [*r["sources"], entry["id"]]} if r is before else r for r in rows]
                continue
            if before:
                row["supersedes"] = before["id"]
                corrected.append(row)
            new.append(row)
            rows.append(row)
    return rows, new, corrected
