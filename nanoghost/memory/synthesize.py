"""Thinking the day through: every row of the ledger becomes questions from many sides, and good answers to them.

    direct      the ways in which people ask for it
    combined    two things at once
    check       is it this? is it that?
    never told  the same questions about what nobody said

Answers to a question begin with what it asks for, always called the same ("Your sister's name ..."). So a question in any wording
comes down to the same few words, and what follows them, a value or that nobody told it, is learned from all wordings.

Beside them stands what anybody may ask (learn.everyday), answered as the base model answers.
Dreams depend on the rows that are there and on nothing else, so that what was never there leaves no trace.
"""

from dataclasses import dataclass
from itertools import zip_longest

from nanoghost.memory.phrases import book, dice, low, noted, own_wordings, part, questions, relations, spoken, statement


@dataclass(frozen=True)
class Dream:
    """A question and, if it is known already, its answer; what the teacher may look at; what a true answer must contain."""

    kind: str
    question: str
    answer: str | None = None
    snippet: str = ""
    values: tuple[str, ...] = ()
    opening: str = ""
    """How the answer begins."""
    own_words: bool = False
    """Whether the teacher itself said the answer: only then its probabilities are learned from."""
    cut: bool = False
    """Whether the answer went on."""


DIRECT = 1400  # questions in a night that ask for one row, shared out among the rows:
LEAST, MOST = 36, 100  # of a row
PARTNERS = 3  # of a row, for questions about two things at once
NEAR = 2  # times as many questions about what is known of somebody else


def wordings(relation: str) -> tuple[list[str], list[str]]:
    """Ways of asking that are dreamt of, and the two kept back for the wake gate."""
    every, own = questions(relation, "train"), own_wordings(relation, "train")
    dice("wordings", relation).shuffle(every)
    kinds = [q for q in every if q in own], [q for q in every if q not in own]
    every = [q for pair in zip_longest(*kinds) for q in pair if q]  # of its own and of any thing, in turn
    return every[2:][:MOST], every[:2]


def of_rows(rows: list[dict]) -> list[Dream]:
    each = min(MOST, max(LEAST, DIRECT // max(1, len(rows))))
    return [d for row in rows for d in of_row(row, each)]


def of_row(row: dict, count: int) -> list[Dream]:
    relation, value = row["relation"], row["value"]
    known, note = statement(relation, value), noted(relation, value)
    found = [Dream("direct", q, None, note, (value,), f"Your {relation} is") for q in wordings(relation)[0][:count]]
    rng = dice("check", relation, value)
    others = [v for v in relations()[relation].values if v != value] if relation in relations() else []
    for ask in CHECKS:
        found.append(Dream("check", ask.format(a=relation, v=value), f"Yes, {low(known)}", note, (value,)))
        if others:
            found.append(
                Dream("check", ask.format(a=relation, v=rng.choice(others)), f"No, {low(known)}", note, (value,))
            )
    return found


CHECKS = ("Is my {a} {v}?", "Did I say that my {a} is {v}?", "My {a} is {v}, isn't it?", "So my {a} is {v}, right?")


SUMS = (
    "What is {} {} {}?",
    "{} {} {} =",
    "Calculate {} {} {}.",
    "How much is {} {} {}?",
    "Give me only the result: {} {} {}",
)


def a_sum(rng) -> str:
    return rng.choice(SUMS).format(rng.randrange(1, 100), rng.choice("+-*"), rng.randrange(1, 20))


def of_pairs(rows: list[dict]) -> list[Dream]:
    """Each row with those that its dice choose, in two ways each."""
    found = []
    for row in rows:
        others = [other for other in rows if other["relation"] != row["relation"]]
        others.sort(key=lambda o: dice("pair", row["relation"], o["relation"]).random())
        for other in others[:PARTNERS]:
            ways = dice("pair", row["relation"], other["relation"]).sample(book()["combined"]["train"], 2)
            answer = f"{spoken(row['relation'], row['value'])} {spoken(other['relation'], other['value'])}"
            notes = " ".join(noted(r["relation"], r["value"]) for r in (row, other))
            for way in ways:
                question = way.format(a=row["relation"], b=other["relation"])
                found.append(Dream("combined", question, answer, notes, (row["value"], other["value"])))
    return found


def never_told(rows: list[dict], count: int) -> list[Dream]:
    """Questions about what is in no row: about `count` about what people often tell, and some about anything else.

    Most are about what is known of somebody else: "your uncle's job", where a row has "your aunt's job".
    """
    told = {row["relation"].casefold() for row in rows}
    kinds = {kind_of(relation) for relation in told} - {""}
    weights = {r: NEAR if kind_of(r.casefold()) in kinds else 1 for r in relations() if r.casefold() not in told}
    found = []
    for relation, weight in weights.items():
        some = max(1, round(count * weight / sum(weights.values())))
        for q in dice("never told", relation).sample(wordings(relation)[0], some):
            found.append(Dream("never told", q, book()["never_told"]["answer"].format(a=relation)))
    found.sort(key=lambda d: dice("never told", d.question).random())
    unheard = [Dream("never told", q, book()["never_told"]["unheard"]) for q in part(book()["unheard"], "train")]
    return found + unheard


def kind_of(relation: str) -> str:
    """What it is that somebody has: "uncle's job" -> "job"; nothing where nobody else can have it."""
    return relation.partition("'s ")[2]
