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

from nanoghost.sleep.phrases import book, dice, noted, part, questions, relations, spoken, statement


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


WORDINGS = 44  # of a row, in a night
PARTNERS = 3  # of a row, for questions about two things at once
NEAR = 2  # times as many questions about what is known of somebody else
KEPT_BACK = 2  # of each relation's wordings, for the wake gate


def wordings(relation: str) -> tuple[list[str], list[str]]:
    """Ways of asking that are dreamt of, and those kept back for the wake gate."""
    every = questions(relation, "train")
    dice("wordings", relation).shuffle(every)
    return every[KEPT_BACK:][:WORDINGS], every[:KEPT_BACK]


def of_row(row: dict) -> list[Dream]:
    relation, value = row["relation"], row["value"]
    known, note = statement(relation, value), noted(relation, value)
    found = [Dream("direct", q, None, note, (value,), f"Your {relation} is") for q in wordings(relation)[0]]
    rng = dice("check", relation, value)
    others = [v for v in relations()[relation].values if v != value] if relation in relations() else []
    for ask in CHECKS:
        found.append(Dream("check", ask.format(a=relation, v=value), f"Yes, {low(known)}", note, (value,)))
        if others:
            found.append(Dream("check", ask.format(a=relation, v=rng.choice(others)), f"No, {low(known)}", note, (value,)))
    return found


CHECKS = ("Is my {a} {v}?", "Did I say that my {a} is {v}?", "My {a} is {v}, isn't it?", "So my {a} is {v}, right?")


def low(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


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
        for q in wordings(relation)[0][: max(1, round(count * weight / sum(weights.values())))]:
            found.append(Dream("never told", q, book()["never_told"]["answer"].format(a=relation)))
    found.sort(key=lambda d: dice("never told", d.question).random())
    unheard = [Dream("never told", q, book()["never_told"]["unheard"]) for q in part(book()["unheard"], "train")]
    return found + unheard


def kind_of(relation: str) -> str:
    """What it is that somebody has: "uncle's job" -> "job"; nothing where nobody else can have it."""
    return relation.partition("'s ")[2]
