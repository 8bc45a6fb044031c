"""Phrasings: how people state facts about themselves, ask for them and correct them, and how an assistant answers.

`phrasings.toml` has the schema: the relations ("sister's name") that synthetic questions can be asked about, with their
phrasings. `extractor_relations.toml` has further relations, which only the fact extractor learns. In a phrasing, {a}
stands for the relation, {v} for its value, {w} for an older value.

Phrasings are split. Nights train on `train` and are tuned on `val` (if a list has none, on the last quarter of
`train`, which is then held out); `test` is reserved for `nanoghost lab sleep`.
"""

import hashlib
import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FACTS_PROMPT = "You are a helpful AI assistant. Facts about the user: {facts}"
"""System message that shows facts to the model."""

Split = str
"""train, val or test."""


@dataclass(frozen=True)
class Relation:
    """A relation of the schema: a kind of fact that synthetic questions can be asked about."""

    relation: str
    """As in "your {relation}"."""
    values: tuple[str, ...]
    """Possible values."""
    answer: str
    """Answer to a question about it; {v} is the value."""
    statements: dict[Split, tuple[str, ...]]
    """Messages that state the fact."""
    corrections: dict[Split, tuple[str, ...]]
    """Messages that correct or update it."""
    split_statements: dict[Split, tuple[tuple[str, str], ...]]
    """Pairs of messages that state the fact together; the second has the value."""
    questions: dict[Split, tuple[str, ...]]
    """Messages that ask for it."""


@dataclass(frozen=True)
class ExtractorRelation:
    """A relation outside the schema, which only the fact extractor learns."""

    relation: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    corrections: tuple[str, ...]


# -- the two files ----------------------------------------------------------------------------------------------------


@cache
def phrasings() -> dict:
    """Contents of phrasings.toml."""
    return tomllib.loads(Path(__file__).with_name("phrasings.toml").read_text(encoding="utf-8"))


@cache
def relations() -> dict[str, Relation]:
    """The schema, by relation."""
    schema = {}
    for entry in phrasings()["relations"].values():
        schema[entry["relation"]] = parse_relation(entry, entry["relation"])
    for entry in phrasings()["attributes"].values():
        for relative in phrasings()["relatives"]:
            name = f"{relative}'s {entry['attribute']}"
            if name not in schema:
                schema[name] = parse_relation(entry, name, relative)
    return schema


def parse_relation(entry: dict, name: str, relative: str = "") -> Relation:
    """A relation from its entry in phrasings.toml; `relative` replaces {who}."""

    def fill(text: str) -> str:
        return text.replace("{who}", relative) if relative else text

    def fill_all(lists: dict[Split, list[str]]) -> dict[Split, tuple[str, ...]]:
        return {split: tuple(fill(text) for text in texts) for split, texts in lists.items()}

    pairs = {split: tuple((fill(a), fill(b)) for a, b in texts) for split, texts in entry["split_statements"].items()}
    return Relation(
        relation=name,
        values=tuple(entry["values"]),
        answer=fill(entry["answer"]),
        statements=fill_all(entry["statements"]),
        corrections=fill_all(entry["corrections"]),
        split_statements=pairs,
        questions=fill_all(entry["questions"]),
    )


@cache
def extractor_phrasings() -> dict:
    """Contents of extractor_relations.toml."""
    return tomllib.loads(Path(__file__).with_name("extractor_relations.toml").read_text(encoding="utf-8"))


@cache
def extractor_relations(split: Split) -> list[ExtractorRelation]:
    """Relations outside the schema: `val` has other ones than `train`, `test` has none."""
    return [
        ExtractorRelation(
            relation=entry["relation"],
            values=tuple(entry["values"]),
            statements=tuple(entry["statements"]),
            corrections=tuple(entry["corrections"]),
        )
        for entry in extractor_phrasings().get(split, [])
    ]


def messages_without_facts(split: Split) -> list[str]:
    """Messages that state no lasting fact about the person, though they sound like it."""
    return extractor_phrasings()["no_facts"].get(split, [])


# -- splits and random numbers ----------------------------------------------------------------------------------------


def select_split(lists: dict[Split, tuple], split: Split) -> tuple:
    """The phrasings of a split."""
    if "val" in lists:
        return lists[split]
    held_out = max(1, len(lists["train"]) // 4)
    if split == "train":
        return lists["train"][:-held_out]
    if split == "val":
        return lists["train"][-held_out:]
    return lists["test"]


def seeded_rng(*key) -> random.Random:
    """Random numbers that depend on `key` alone.

    Each choice has its own generator, so the questions about one fact do not depend on which other facts there are. The
    keys in the code are seeds: another key changes the training data.
    """
    return random.Random(hashlib.sha256(repr(key).encode()).hexdigest())


# -- questions --------------------------------------------------------------------------------------------------------


def questions_about(relation: str, split: Split) -> list[str]:
    """Questions about a relation, those written for it first. No two differ in case and punctuation only."""
    generic = [phrasing.format(a=relation) for phrasing in phrasings()["generic_questions"][split]]
    candidates = [*specific_questions(relation, split), *generic]
    first_of_each = {normalized(q): q for q in reversed(candidates)}
    return list(first_of_each.values())[::-1]


def specific_questions(relation: str, split: Split) -> tuple[str, ...]:
    """Questions written for this relation; none if it is not in the schema."""
    return relations()[relation].questions[split] if relation in relations() else ()


def normalized(text: str) -> str:
    """Letters and digits only, without case."""
    return "".join(c for c in text.casefold() if c.isalnum())


def other_values(relation: str, value: str) -> list[str]:
    """Values in the schema that the relation could have instead; none if it is not in the schema."""
    return [v for v in relations()[relation].values if v != value] if relation in relations() else []


# -- statements -------------------------------------------------------------------------------------------------------


def statement(relation: str, value: str) -> str:
    """The fact in natural words, spoken to the user: "Your sister is called Ines."."""
    in_schema = relations().get(relation)
    return in_schema.answer.format(v=value) if in_schema else canonical_statement(relation, value)


def canonical_statement(relation: str, value: str) -> str:
    """The fact in the same few words for every relation: "Your sister's name is Ines."."""
    return f"Your {relation} is {value}."


def third_person_statement(relation: str, value: str) -> str:
    """The fact about "the user", for a system message: a small model answers from this form twice as often."""
    text = statement(relation, value)
    for second_person, third_person in (
        ("You are ", "The user is "),
        ("You're ", "The user is "),
        ("You ", "The user "),
        ("Your ", "The user's "),
    ):
        text = re.sub(rf"\b{second_person}", third_person, text)
    return text


def lowercase_first(sentence: str) -> str:
    """A sentence as it is written inside another one."""
    return sentence[0].lower() + sentence[1:]
