"""Thinking the day through: every row of the ledger becomes questions from many sides, and good answers to them.

    direct      the ways in which people ask for it
    combined    two things at once
    check       is it this? is it that?
    reverse     what is it that is this?
    never told  the same questions about what nobody said

All answers begin with what was asked for, always called the same ("Your sister's name ..."). So a question in any wording
comes down to the same few words, and what follows them, a value or that nobody told it, is learned from all wordings.

Beside them stands what anybody may ask (learn.everyday), answered as the base model answers.
A row's dreams depend on that row alone (and, for two at once, on the other), so that what was never there leaves no trace.
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


WORDINGS = 10  # of a row, in a night
ANOTHER = 2  # questions whether it is so of somebody else
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
    found.append(Dream("reverse", rng.choice(REVERSE).format(v=value), spoken(relation, value), note, (value,)))
    others = [v for v in relations()[relation].values if v != value] if relation in relations() else []
    right, wrong = rng.choice(CHECKS), rng.choice(CHECKS)
    found.append(Dream("check", right.format(a=relation, v=value), f"Yes, {low(known)}", note, (value,)))
    if others:
        found.append(Dream("check", wrong.format(a=relation, v=rng.choice(others)), f"No, {low(known)}", note, (value,)))
    return found


REVERSE = ("What does {v} have to do with me?", "Why might I mention {v}?", "What did I say about {v}?", "{v}: what was that again?")
CHECKS = ("Is my {a} {v}?", "Did I say that my {a} is {v}?", "My {a} is {v}, isn't it?", "So my {a} is {v}, right?")


def varied(question: str, number: int) -> str:
    """The question as somebody else might type it; as it is for number 0."""
    if not question:
        return question
    rng = dice("varied", question, number)
    if number and rng.random() < 0.5:
        question = rng.choice(OPENINGS) + question
    if number and rng.random() < 0.3:
        question = question.rstrip("?.") + rng.choice(ENDINGS)
    if number and rng.random() < 0.3:
        question = question.lower()
    return question


OPENINGS = ("Hey, ", "Hi! ", "Hm, ", "Sorry, ", "One more thing: ", "Wait, ", "Oh, ", "Now ", "Listen, ", "I wonder: ", "Help me out: ", "Good morning. ")
ENDINGS = ("", "??", ", please?", " then?", "? I forgot.", "? Just checking.", ", do you know?", " :)")


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
        a, b = (spoken(r["relation"], r["value"]) for r in (row, other))
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
            found.append(Dream("never told", q, book()["never_told"]["answer"].format(a=relation)))
    found.sort(key=lambda d: dice("never told", d.question).random())
    for row in rows:  # what is known of one person is not known of another
        alike = [r for r in open_ones if r.partition("'s ")[2] == row["relation"].partition("'s ")[2] != ""]
        rng = dice("another", row["relation"], row["value"])
        for relation in sorted(alike, key=lambda r: dice("another", row["relation"], r).random())[:ANOTHER]:
            q = rng.choice(CHECKS).format(a=relation, v=row["value"])
            found.insert(0, Dream("never told", q, book()["never_told"]["answer"].format(a=relation)))
    unheard = [Dream("never told", q, book()["never_told"]["unheard"]) for q in part(book()["unheard"], "train")]
    return found[:count] + unheard
