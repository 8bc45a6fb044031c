"""Say "I don't know" to questions that the model cannot answer, and only to these.

A model that has read nothing but plays cannot know the weather, the news or where your keys are. It learns to say so
from many kinds of questions, each with its reason. Many are close to questions that it can answer: "What is my name?"
and "What is your name?", "How many people live in Paris?" and "How many letters a in Paris?". Two measures belong
together: the rate of correct refusals (`Refusal`), and the rate of answers to questions that it can answer
(`Answerable`), which is 1 minus the rate of false refusals.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nanoghost.tasks.base import Problem, Task, TaskContext, split_of
from nanoghost.tasks.messages import assistant, final_text, user
from nanoghost.tasks.names import FIRST_NAMES, PLACES, SURNAMES
from nanoghost.tasks.spelling import quote
from nanoghost.tasks.wording import choose_template, draw_line, families, load_phrases, people_phrases

PHRASES = load_phrases("refusal")
SLOTS: dict[str, tuple[str, ...]] = {
    "place": PLACES,
    "first": FIRST_NAMES,
    "last": SURNAMES,
    "number": tuple(str(n) for n in range(2, 60)),
    **PHRASES["slots"],
}


@dataclass(frozen=True)
class Category:
    topic: str
    """What the model does not know, after "I don't know"."""
    reason: str
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


CATEGORIES = {name: Category(**category) for name, category in PHRASES["categories"].items()}
PEOPLES_CATEGORIES = {
    "translate": "language",
    "act": "errand",
    "senses": "seeing",
    "user_facts": "user",
    "people": "stranger",
    "knowledge_foreign": "foreign",
}
"""The category of a list of [unknown] in phrases/people, where it has another name."""
ANSWERS = PHRASES["answers"]


def is_refusal(text: str) -> bool:
    """Whether a text begins with "I don't know" or a variant of it."""
    return re.match(r"\W*i (?:don['’]t|do not|can['’]?t|cannot) (?:know|tell)\b", text, re.IGNORECASE) is not None


class Refusal(Task):
    """Questions that no such model can answer. Correct: it says that it does not know."""

    name = "refusal"
    label = "unanswerable: says so"
    weight = 0.13

    def __init__(self, training_text: str = "old plays"):
        self.training_text = training_text
        """What the model says that it has read."""

    def problem(self, rng: random.Random, split: str) -> Problem:
        if rng.random() < (0.65 if split == "train" else 0.5):
            name = rng.choice(list(people_phrases()["unknown"]))
            category = CATEGORIES[PEOPLES_CATEGORIES.get(name, name)]
            template = question = draw_line(rng, families("unknown", name, split), split)
        else:
            category = rng.choice([category for category in CATEGORIES.values() if category.train])
            template = choose_template(rng, category.train if split == "train" else category.test, split)
            question = fill_slots(rng, template, split)
        if template.startswith("{"):
            question = capitalize_first(question)
        reason = category.reason.format(read=self.training_text)
        answer = rng.choice(ANSWERS).format(topic=category.topic, reason=reason, sentence=capitalize_first(reason))
        return Problem(self.name, (user(question),), (assistant(answer),), "I don't know")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(is_refusal(final_text(reply)))


def capitalize_first(text: str) -> str:
    return text[0].upper() + text[1:]


def fill_slots(rng: random.Random, template: str, split: str) -> str:
    """Fill the slots of a template, and the slots inside fillers.

    Held-out fillers appear in test questions only. There each slot gets one with probability 1/2.
    """
    while slot := re.search(r"{(\w+)}", template):
        name = slot[1]
        train_fillers = [filler for filler in SLOTS[name] if split_of(filler) == "train"]
        test_fillers = [filler for filler in SLOTS[name] if split_of(filler) == "test"]
        held_out = split == "test" and test_fillers and rng.random() < 0.5
        filler = rng.choice(test_fillers if held_out else train_fillers)
        if name == "word":
            filler = quote(rng, filler)  # as in "How do you spell ...?"
        template = template[: slot.start()] + filler + template[slot.end() :]
    return template


class Answerable(Task):
    """Questions of other tasks. Correct: the answer is not a refusal. 1 - score is the rate of false refusals."""

    name = "answerable"
    label = "answerable: answers"

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tasks

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, Task]) -> Task:
        names = ("identity", "sums", "spelling", "counting", "plays")  # the order decides which problems are drawn
        return cls([earlier_tasks[name] for name in names if name in earlier_tasks])

    def problem(self, rng: random.Random, split: str) -> Problem:
        problem = rng.choice(self.tasks).problem(rng, split)
        return Problem(self.name, problem.messages, problem.solution, "")

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        text = final_text(reply)
        return float(text != "" and not is_refusal(text))
