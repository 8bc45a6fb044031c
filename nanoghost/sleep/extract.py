"""From the journal to the ledger: what a person tells of themselves, one line each as "relation: value".

A small model does not do this by being asked, so it is taught to: an adapter called scribe, trained once for a base model
on messages that are put together from people.toml. What it writes is checked: a value must stand in the message.
"""

import json

from nanoghost.engine.generate import open_engine
from nanoghost.people import current, key_of
from nanoghost.runs import ModelFolder, home, write_atomic
from nanoghost.sleep.learn import said
from nanoghost.sleep.phrases import book, dice, questions, relations
from nanoghost.train import sft

ASK = "Write down what the user tells about their own life, one line each, as: what it is: value. If it is nothing, write: nothing"
NOTHING = "nothing"
MOST = 48  # tokens of an answer
LONGEST = 2000  # letters of a message that are read


def message(rng, split: str, known: list) -> tuple[str, list[tuple[str, str]]]:
    """A user's message and what it tells, (relation, value) of at most two of the `known` relations."""
    talk = book()["small_talk"][split]
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(talk), []
    if kind < 0.4:
        return rng.choice(questions(rng.choice(known).relation, split)), []
    told = rng.sample(known, 1 if kind < 0.85 else 2)
    pieces, found = [], []
    for relation in told:
        value = rng.choice(relation.values)
        ways = relation.changed if rng.random() < 0.2 else relation.said
        pieces.append(rng.choice(ways[split]).format(v=value))
        found.append((relation.relation, value))
    if rng.random() < 0.4:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(talk))
    return " ".join(pieces), found


def conversation(text: str, found: list[tuple[str, str]] | None = None) -> list[dict]:
    messages = [{"role": "system", "content": ASK}, {"role": "user", "content": text}]
    if found is None:
        return messages
    lines = "\n".join(f"{relation}: {value}" for relation, value in found)
    return [*messages, {"role": "assistant", "content": lines or NOTHING}]


def lessons(count: int) -> list[list[dict]]:
    rng, known = dice("scribe"), list(relations().values())
    return [conversation(*message(rng, "train", known)) for _ in range(count)]


def scribe(base: str, display, minutes: float = 6.0) -> ModelFolder:
    """The adapter of that base that extracts, trained if there is none yet."""
    folder = ModelFolder(f"{base}@scribe")
    if not folder.finished:
        display.say(f"{base} learns to take notes, once (about {minutes:.0f} minutes) ...")
        path = home() / "data" / "scribe" / "lessons.jsonl"
        write_atomic(path, "".join(json.dumps({"messages": m}) + "\n" for m in lessons(6000)))
        sft.main(
            sft.SftSettings(base, "scribe", data=str(path), minutes=minutes, lora=16, context=256, learning_rate=2.0), display
        )
    return folder


def extract(folder: ModelFolder, texts: list[str]) -> list[list[tuple[str, str]]]:
    """What each text tells: (relation, value), each value standing in its text."""
    if not texts:
        return []
    engine = open_engine(folder, seats=16, room=1024)
    written = said(engine, [conversation(text[:LONGEST]) for text in texts], MOST)
    return [parsed(lines, text) for lines, text in zip(written, texts)]


def parsed(written: str, text: str) -> list[tuple[str, str]]:
    found = []
    for line in written.splitlines():
        relation, colon, value = line.partition(":")
        relation, value = relation.strip(), value.strip().rstrip(".")
        if colon and value and value.casefold() in text.casefold() and 0 < len(relation.split()) <= 6:
            found.append((relation, value))
    return list(dict.fromkeys(found))


def merge(ledger: list[dict], told: list[tuple[dict, list[tuple[str, str]]]]) -> tuple[list[dict], list[dict], list[dict]]:
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
