"""To say "I don't know" when one can't know, and only then.

A model that has read nothing but plays can't know the weather, the news or where your keys are. It learns to say so
from many kinds of questions, each with its reason. Many stand close to questions it can answer: "What is my name?"
beside "What is your name?", "How many people live in Paris?" beside "How many letters a in Paris?". Two measures belong
together: how often it refuses what it can't know (`Refusal`), how often it doesn't refuse what it can (`Answerable`).
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanoghost.tasks.base import Problem, Task, assistant, final_text, phrases, split_of, user, wording
from nanoghost.tasks.names import FIRST_NAMES, PLACES, SURNAMES
from nanoghost.tasks.spelling import quoted

SLOTS: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "first": FIRST_NAMES,
    "last": SURNAMES,
    "number": tuple(str(n) for n in range(2, 60)),
    **phrases("refusal")["slots"],
}


@dataclass(frozen=True)
class Category:
    topic: str
    """What the model doesn't know, after "I don't know"."""
    reason: str
    train: tuple[str, ...]
    test: tuple[str, ...]


CATEGORIES = {name: Category(**category) for name, category in phrases("refusal")["categories"].items()}
ANSWERS = phrases("refusal")["answers"]


def is_refusal(text: str) -> bool:
    """Whether a text begins by saying that the speaker doesn't know."""
    return re.match(r"\W*i (?:don['’]t|do not|can['’]?t|cannot) (?:know|tell)\b", text, re.IGNORECASE) is not None


class Refusal:
    """Questions nobody could answer from where the model sits. Right means: it says that it doesn't know."""

    name = "refusal"

    def __init__(self, read: str = "old plays"):
        self.read = read
        """What the model has read, as it says of itself."""

    def problem(self, rng: random.Random, split: str) -> Problem:
        category = rng.choice(list(CATEGORIES.values()))
        template = wording(rng, category.train if split == "train" else category.test, split)
        question = fill(rng, template, split)
        if template.startswith("{"):
            question = question[0].upper() + question[1:]
        reason = category.reason.format(read=self.read)
        sentence = reason[0].upper() + reason[1:]
        answer = rng.choice(ANSWERS).format(topic=category.topic, reason=reason, sentence=sentence)
        return Problem(self.name, (user(question),), (assistant(answer),), "I don't know")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(is_refusal(final_text(reply)))


def fill(rng: random.Random, template: str, split: str) -> str:
    """Fill the slots of a template, also those inside fillers. Held-out fillers appear in test only; about half of
    the test's fillers are held out, the others are known."""
    while slot := re.search(r"{(\w+)}", template):
        known = [filler for filler in SLOTS[slot[1]] if split_of(filler) == "train"]
        held_out = [filler for filler in SLOTS[slot[1]] if split_of(filler) == "test"]
        use = held_out if split == "test" and held_out and rng.random() < 0.5 else known
        filler = rng.choice(use)
        if slot[1] == "word":
            filler = quoted(rng, filler)  # as in "How do you spell ...?"
        template = template[: slot.start()] + filler + template[slot.end() :]
    return template


class Answerable:
    """What the other tasks ask, only to see that it isn't refused: 1 minus the score is over-refusal."""

    name = "answerable"

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tasks

    def problem(self, rng: random.Random, split: str) -> Problem:
        problem = rng.choice(self.tasks).problem(rng, split)
        return Problem(self.name, problem.messages, problem.lesson, "")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        said = final_text(reply)
        return float(said != "" and not is_refusal(said))
