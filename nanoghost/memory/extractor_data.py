"""Training data of the fact extractor: synthetic user messages, each with the facts that it states.

The messages are composed of the phrasings of phrasings.toml and extractor_relations.toml: one to three facts in one
message, a fact in two messages ("My sister came." "Her name's Ines."), a fact as the answer to a question, and messages
without a fact.
"""

from dataclasses import dataclass
from random import Random

from nanoghost.memory.phrasings import (
    ExtractorRelation,
    Relation,
    extractor_relations,
    lowercase_first,
    messages_without_facts,
    phrasings,
    relations,
    select_split,
)

MAX_MESSAGE_CHARS = 1000  # of a message that the extractor reads
MAX_CONTEXT_CHARS = 160  # of the messages before it
# Beginnings of sentences that are written in lower case inside a longer sentence.
LOWERCASED_OPENINGS = (
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
)

RelationValue = tuple[str, str]
"""(relation, value) of a fact."""


@dataclass(frozen=True)
class UserMessage:
    """A user's message with its context."""

    text: str
    previous: str = ""
    """The user's message before it."""
    reply: str = ""
    """The assistant's reply to that."""

    def format(self) -> str:
        """The message with its context, as the extractor reads it."""
        parts = (
            ("Earlier", self.previous[-MAX_CONTEXT_CHARS:]),
            ("Reply", self.reply[:MAX_CONTEXT_CHARS]),
            ("Now", self.text[:MAX_MESSAGE_CHARS]),
        )
        return "\n".join(f"{label}: {' '.join(text.split())}" for label, text in parts if text)


def synthetic_message(rng: Random, split: str) -> tuple[UserMessage, list[RelationValue]]:
    """A user's message, and the up to three facts that it states."""
    small_talk = select_split(phrasings()["small_talk"], split)
    kind = rng.random()
    relation = rng.choice(list(relations().values()))
    value = rng.choice(relation.values)
    previous = rng.choice([rng.choice(small_talk), earlier_statement(rng, split)])
    reply = rng.choice(select_split(phrasings()["replies"], split))
    if kind < 0.12:  # a fact in two messages
        previous, text = rng.choice(select_split(relation.split_statements, split))
        return UserMessage(text.format(v=value), previous, reply), [(relation.relation, value)]
    if kind < 0.2:  # a fact as the answer to a question
        question = rng.choice(select_split(phrasings()["assistant_questions"], split)).format(a=relation.relation)
        text = rng.choice(select_split(phrasings()["short_answers"], split)).format(v=value)
        return UserMessage(text, previous, f"{reply} {question}".strip()), [(relation.relation, value)]
    if rng.random() < 0.3:
        previous, reply = "", ""
    if kind < 0.5:  # no fact
        return UserMessage(message_without_facts(rng, relation, small_talk, split), previous, reply), []
    if kind < 0.8:  # one to three facts in one message
        number_of_facts = 1
    elif kind < 0.95:
        number_of_facts = 2
    else:
        number_of_facts = 3
    sentences: dict[RelationValue, str] = {}
    while len(sentences) < number_of_facts:
        pair, text = fact_sentence(rng, split)
        if pair[0] not in [relation for relation, _ in sentences]:
            sentences[pair] = text
    return UserMessage(compose(rng, list(sentences.values()), small_talk), previous, reply), list(sentences)


def message_without_facts(rng: Random, relation: Relation, small_talk: tuple[str, ...], split: str) -> str:
    """Small talk, a question, the first half of a split statement, or a message that only sounds like a fact."""
    candidates = [
        rng.choice(small_talk),
        rng.choice(select_split(relation.questions, split)),
        select_split(relation.split_statements, split)[0][0],
    ]
    sounds_like_a_fact = messages_without_facts(split)
    if sounds_like_a_fact:
        candidates += [rng.choice(sounds_like_a_fact) for _ in range(2)]
    return rng.choice(candidates)


def fact_sentence(rng: Random, split: str) -> tuple[RelationValue, str]:
    """A fact, half of the time of a relation outside the schema, and a sentence that states it."""
    outside_schema = extractor_relations(split)
    relation: Relation | ExtractorRelation
    if outside_schema and rng.random() < 0.5:
        relation = rng.choice(outside_schema)
        statements, corrections = relation.statements, relation.corrections
    else:
        relation = rng.choice(list(relations().values()))
        statements = select_split(relation.statements, split)
        corrections = select_split(relation.corrections, split)
    value, value_before = rng.sample(relation.values, 2)
    sentence = rng.choice(corrections if rng.random() < 0.2 else statements)
    return (relation.relation, value), sentence.format(v=value, w=value_before)


def compose(rng: Random, sentences: list[str], small_talk: tuple[str, ...]) -> str:
    """One message of several sentences, often joined into one sentence, sometimes with small talk."""
    if len(sentences) > 1 and rng.random() < 0.6:
        conjunction = rng.choice((", and ", " and ", ", ", "; ", " - "))
        sentences = [conjunction.join(clause(text, i) for i, text in enumerate(sentences))]
    if rng.random() < 0.4:
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(small_talk))
    return " ".join(sentences)


def clause(sentence: str, position: int) -> str:
    """A sentence as a clause of a longer sentence."""
    sentence = sentence.rstrip(".")
    return lowercase_first(sentence) if position and sentence.startswith(LOWERCASED_OPENINGS) else sentence


def earlier_statement(rng: Random, split: str) -> str:
    """A statement for the message before, which is not to be extracted again."""
    relation = rng.choice(list(relations().values()))
    return rng.choice(select_split(relation.statements, split)).format(v=rng.choice(relation.values))
