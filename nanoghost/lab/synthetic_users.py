"""Synthetic users: invented people who chat with a model for some days, and the facts that are true in the end.

Facts are stated among small talk: in one message, in two ("My sister came." "Her name's Ines."), or as the answer to a
question. From the second day on the user also corrects earlier facts, sometimes without saying that they changed.
"""

import random
from dataclasses import dataclass

from nanoghost.memory.extractor_data import RelationValue
from nanoghost.memory.phrasings import Relation, phrasings, relations, select_split
from nanoghost.memory.store import Fact, LogEntry, current_facts, merge_facts

CORRECTIONS_PER_DAY = 2  # from the second day on


@dataclass(frozen=True)
class SyntheticMessage:
    """A message of the user with the reply to it."""

    text: str
    reply: str
    """The assistant's reply."""
    facts: tuple[RelationValue, ...] = ()
    """The facts that the message states."""


@dataclass(frozen=True)
class SyntheticUser:
    """The chats of an invented user."""

    days: list[list[SyntheticMessage]]
    """The messages of each day."""

    @property
    def messages(self) -> list[SyntheticMessage]:
        return [message for day in self.days for message in day]

    def chat_log(self) -> list[LogEntry]:
        """The chat log as in the folder of a person. Ids and times are 1, 2, 3 ..."""
        entries = []
        for message in self.messages:
            for role, text in (("user", message.text), ("assistant", message.reply)):
                entry_id = len(entries) + 1
                entries.append(LogEntry(entry_id, entry_id, role, text))
        return entries

    def fact_store(self, extracted: list[list[RelationValue]] | None = None, days: int | None = None) -> list[Fact]:
        """All facts after all days, or after the first `days`; corrected ones included.

        `extracted`: what the fact extractor found in each message, to be used instead of what the message states.
        """
        facts_of_messages = extracted or [list(message.facts) for message in self.messages]
        message_count = sum(map(len, self.days[:days]))
        entries = [LogEntry(i, i, "user", "") for i in range(1, message_count + 1)]
        return merge_facts([], list(zip(entries, facts_of_messages))).facts

    def current_facts(self, days: int | None = None) -> list[Fact]:
        """The facts that are true after all days, or after the first `days`, by relation."""
        return sorted(current_facts(self.fact_store(days=days)), key=lambda fact: fact.relation)


def synthesize_user(seed: int, split: str, nights: int, facts: int) -> SyntheticUser:
    """User number `seed` of a split, with a day before each night and `facts` facts a day, corrections included."""
    rng = random.Random(f"{split}-{seed}")
    unused = list(relations().values())
    rng.shuffle(unused)
    values: dict[str, str] = {}  # relation -> current value
    days = []
    for day in range(nights):
        corrected_names = rng.sample(sorted(values), CORRECTIONS_PER_DAY if day > 0 else 0)
        new_relations = [unused.pop() for _ in range(facts - len(corrected_names))]
        corrected_relations = [relations()[name] for name in corrected_names]
        exchanges = []
        for relation in new_relations + corrected_relations:
            old_value = values.get(relation.relation)
            value = rng.choice([candidate for candidate in relation.values if candidate != old_value])
            exchanges.append(state_fact(rng, relation, value, old_value, split))
            values[relation.relation] = value
        for text in rng.sample(select_split(phrasings()["small_talk"], split), facts // 2):
            exchanges.append([SyntheticMessage(text, draw_reply(rng, split))])
        rng.shuffle(exchanges)
        days.append([message for exchange in exchanges for message in exchange])
    return SyntheticUser(days)


def state_fact(
    rng: random.Random, relation: Relation, value: str, old_value: str | None, split: str
) -> list[SyntheticMessage]:
    """One or two messages that state a fact; with an `old_value`, one message that corrects it.

    Of new facts 15% are stated in two messages, 10% as an answer, the others in one message. Of corrections 80% say
    that something changed. 40% of the single messages also contain small talk.
    """
    facts = ((relation.relation, value),)
    form = rng.random()
    small_talk = rng.choice(select_split(phrasings()["small_talk"], split))
    if form < 0.15 and not old_value:
        first, second = rng.choice(select_split(relation.split_statements, split))
        return [
            SyntheticMessage(first, draw_reply(rng, split)),
            SyntheticMessage(second.format(v=value), draw_reply(rng, split), facts),
        ]
    if form < 0.25 and not old_value:
        question = rng.choice(select_split(phrasings()["assistant_questions"], split)).format(a=relation.relation)
        answer = rng.choice(select_split(phrasings()["short_answers"], split)).format(v=value)
        return [
            SyntheticMessage(small_talk, f"{draw_reply(rng, split)} {question}"),
            SyntheticMessage(answer, draw_reply(rng, split), facts),
        ]
    candidates = relation.corrections if old_value and form < 0.8 else relation.statements
    text = rng.choice(select_split(candidates, split)).format(v=value)
    if rng.random() < 0.4:
        text = " ".join(rng.sample([text, small_talk], 2))
    return [SyntheticMessage(text, draw_reply(rng, split), facts)]


def draw_reply(rng: random.Random, split: str) -> str:
    return rng.choice(select_split(phrasings()["replies"], split))
