"""Thinking the day through: every row of the ledger becomes questions from many sides, and good answers to them.

    direct      the ways in which people ask for it
    combined    two things at once
    check       is it this? is it that?
    never told  the same questions about what nobody said

Beside them stands what anybody may ask (learn.everyday), answered as the base model answers.
A row's dreams depend on that row alone (and, for two at once, on the other), so that what was never there leaves no trace.
"""

from dataclasses import dataclass

from nanoghost.sleep.phrases import book, dice, noted, part, questions, relations, statement


@dataclass(frozen=True)
class Dream:
    """A question and, if it is known already, its answer; what the teacher may look at; what a true answer must contain."""

    kind: str
    question: str
    answer: str | None = None
    snippet: str = ""
    values: tuple[str, ...] = ()
    own_words: bool = False
    """Whether the teacher itself said the answer: only then its probabilities are learned from."""
    cut: bool = False
    """Whether the answer went on."""


WORDINGS = 10  # of a row, in a night
KEPT_BACK = 2  # of each relation's wordings, for the wake gate


def wordings(relation: str) -> tuple[list[str], list[str]]:
    """Ways of asking that are dreamt of, and those kept back for the wake gate."""
    every = questions(relation, "train")
    dice("wordings", relation).shuffle(every)
    return every[KEPT_BACK:][:WORDINGS], every[:KEPT_BACK]


def of_row(row: dict) -> list[Dream]:
    relation, value = row["relation"], row["value"]
    known, note = statement(relation, value), noted(relation, value)
    found = [Dream("direct", q, None, note, (value,)) for q in wordings(relation)[0]]
    rng = dice("check", relation, value)
    others = [v for v in relations()[relation].values if v != value] if relation in relations() else []
    right, wrong = rng.choice(CHECKS), rng.choice(CHECKS)
    found.append(Dream("check", right.format(a=relation, v=value), f"Yes, {low(known)}", note, (value,)))
    if others:
        found.append(Dream("check", wrong.format(a=relation, v=rng.choice(others)), f"No, {low(known)}", note, (value,)))
    return found


CHECKS = ("Is my {a} {v}?", "Did I say that my {a} is {v}?", "My {a} is {v}, isn't it?", "So my {a} is {v}, right?")


def low(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def of_pairs(rows: list[dict]) -> list[Dream]:
    """Each row with the one that its dice choose."""
    found = []
    for row in rows:
        others = [other for other in rows if other["relation"] != row["relation"]]
        if not others:
            break
        other = min(others, key=lambda o: dice("pair", row["relation"], o["relation"]).random())
        a, b = (statement(r["relation"], r["value"]) for r in (row, other))
        wording = dice("pair", row["relation"]).choice(book()["combined"]["train"])
        question = wording.format(a=row["relation"], b=other["relation"])
        notes = " ".join(noted(r["relation"], r["value"]) for r in (row, other))
        found.append(Dream("combined", question, f"{a} {b}", notes, (row["value"], other["value"])))
    return found


def never_told(rows: list[dict], count: int) -> list[Dream]:
    """Questions about what is in no row: up to `count` about what people often tell, and some about anything else."""
    told = {row["relation"].casefold() for row in rows}
    open_ones = [r for r in relations() if r.casefold() not in told]
    found = []
    for relation in open_ones:
        ways = wordings(relation)[0]
        for q in ways[: max(1, -(-count // max(1, len(open_ones))))]:
            found.append(Dream("never told", q, dice("never", q).choice(book()["never_told"]["answers"]).format(a=relation)))
    found.sort(key=lambda d: dice("never told", d.question).random())
    unheard = [Dream("never told", q, dice("never", q).choice(book()["never_told"]["unheard"])) for q in part(book()["unheard"], "train")]
    return found[:count] + unheard
