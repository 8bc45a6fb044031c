"""Invented lives: what people say to a model day by day, and what is true of them in the end.

Facts stand among small talk, are told in one message, in two ("My sister came." "Her name's Ines."), or in answer to a question;
some are corrected on a later day, in words that say so or by simply saying something else.
"""

import random
from dataclasses import dataclass

from nanoghost.memory import extract
from nanoghost.memory.phrases import book, part, relations
from nanoghost.memory.store import current

CORRECTED = 2  # of a day's facts, from the second day on


@dataclass
class Life:
    """What one invented person said and heard, day by day."""

    days: list[list[tuple[str, str, list[tuple[str, str]]]]]
    """Of each message its text, the reply, and the (relation, value) pairs that it tells."""

    @property
    def messages(self):
        return [m for day in self.days for m in day]

    @property
    def journal(self) -> list[dict]:
        """As people.Person keeps it; ids and times count up."""
        said = [(who, text) for text, reply, _ in self.messages for who, text in (("user", text), ("assistant", reply))]
        return [{"id": i, "time": i, "speaker": who, "text": text} for i, (who, text) in enumerate(said, 1)]

    def ledger(self, told: list | None = None, days: int | None = None) -> list[dict]:
        """Rows after all days, or the first `days`; `told`: what was noted of each message, instead of what it tells."""
        told = told or [found for *_, found in self.messages]
        count = sum(map(len, self.days[:days]))
        return extract.merge([], [({"id": i, "time": i}, found) for i, found in enumerate(told[:count], 1)])[0]

    def facts(self, days: int | None = None) -> list[dict]:
        return sorted(current(self.ledger(days=days)), key=lambda row: row["relation"])


def live(seed: int, split: str, nights: int, facts: int) -> Life:
    """The life of person `seed` of a split: `facts` told on each day, from the second day on CORRECTED of them anew."""
    rng = random.Random(f"{split}-{seed}")
    every, held, days = list(relations().values()), {}, []
    rng.shuffle(every)
    for number in range(nights):
        corrected = rng.sample(sorted(held), CORRECTED if number else 0)
        fresh = [every.pop() for _ in range(facts - len(corrected))]
        turns = []
        for relation in [*fresh, *(relations()[name] for name in corrected)]:
            old = held.get(relation.relation)
            value = rng.choice([v for v in relation.values if v != old])
            turns.append(turn(rng, relation, value, old, split))
            held[relation.relation] = value
        turns += [[(text, reply(rng, split), [])] for text in rng.sample(part(book()["small_talk"], split), facts // 2)]
        rng.shuffle(turns)
        days.append([message for turn in turns for message in turn])
    return Life(days)


def turn(rng, relation, value: str, old: str | None, split: str) -> list[tuple]:
    """The messages that tell one fact."""
    told, kind = [(relation.relation, value)], rng.random()
    talk = rng.choice(part(book()["small_talk"], split))
    if kind < 0.15 and not old:
        first, second = rng.choice(part(relation.apart, split))
        return [(first, reply(rng, split), []), (second.format(v=value), reply(rng, split), told)]
    if kind < 0.25 and not old:
        asked = rng.choice(part(book()["asked_back"], split)).format(a=relation.relation)
        answer = rng.choice(part(book()["answered_back"], split)).format(v=value)
        return [(talk, f"{reply(rng, split)} {asked}", []), (answer, reply(rng, split), told)]
    ways = relation.changed if old and kind < 0.8 else relation.said
    text = rng.choice(part(ways, split)).format(v=value)
    if rng.random() < 0.4:
        text = " ".join(rng.sample([text, talk], 2))
    return [(text, reply(rng, split), told)]


def reply(rng, split: str) -> str:
    return rng.choice(part(book()["replies"], split))
