"""What the user has told in this conversation, asked for in the same or a later message.

The copy head reads the value from the conversation; the task teaches which one is asked for, and to say so when it was
not told. What can be told stands in the tables [[told]] of phrases/people/*.toml.
"""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, Task, TaskContext, split_of
from nanoghost.tasks.identity import INTENTS
from nanoghost.tasks.messages import assistant, final_text, user
from nanoghost.tasks.names import FIRST_NAMES, PLACES
from nanoghost.tasks.refusal import is_refusal
from nanoghost.tasks.wording import draw_line, families, made_up_word, people_phrases, split_families

ACKNOWLEDGEMENTS = ("I will keep that in mind.", "Thank you for telling me.", "Good, I will remember it.")


def say(rng: random.Random, fact: dict, value: str, split: str) -> str:
    return draw_from(rng, fact, "say", split).replace("{value}", value)


def correct(rng: random.Random, fact: dict, old: str, value: str, split: str) -> str:
    return draw_from(rng, fact, "correct", split).replace("{old}", old).replace("{value}", value)


def draw_kind(rng: random.Random, table: dict) -> dict:
    """The table for one of its `kinds`: "your {kind}'s name" becomes "your cat's name"."""
    kind = rng.choice(table.get("kinds", ("",)))
    texts = {key: table[key].replace("{kind}", kind) for key in ("what", "topic", "answer")}
    return table | texts | {"kind": kind}


def draw_from(rng: random.Random, fact: dict, key: str, split: str) -> str:
    """One of the lines under say, ask or correct."""
    return draw_line(rng, split_families(fact[key], split), split).replace("{kind}", fact["kind"])


def exchange(rng: random.Random, fact: dict, value: str, text: str) -> list[dict]:
    """A message that tells a fact, and the model's reply."""
    is_name = fact["topic"] == "your name"
    return [user(text), assistant(f"Hello, {value}!" if is_name else rng.choice(ACKNOWLEDGEMENTS))]


class Recall(Task):
    """my cat is called Tom. (...) whats my cats name. Correct: the answer has the value, or refuses without one."""

    name = "recall"
    label = "what was told in the conversation"
    weight = 0.22

    def __init__(self, words: Sequence[str]):
        self.tables = people_phrases()["told"]
        self.words = [word for word in words if 5 <= len(word) <= 12] or [*FIRST_NAMES]

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, Task]) -> Task:
        return cls(context.words)

    def problem(self, rng: random.Random, split: str) -> Problem:
        fact, *others = self.draw_facts(rng)
        value = self.draw_value(rng, fact, split)
        question = draw_from(rng, fact, "ask", split)
        kind = rng.random()
        if kind < 0.12:  # not told, though other things were
            messages = self.told_messages(rng, others[: rng.randint(0, 2)], split)
            answer = f"I don't know {fact['topic']}: you have not told me."
            return Problem(self.name, (*messages, user(question)), (assistant(answer),), "")
        answer = fact["answer"].replace("{value}", value)
        solution = (assistant(answer),)
        if kind < 0.26:  # told and asked in one message
            first = say(rng, fact, value, split)
            if rng.random() < 0.25 and fact["correct"]:
                first = correct(rng, fact, self.draw_value(rng, fact, split), value, split)
            mark = first[-1] in ".!?"
            text = first + rng.choice((" ", " ") if mark else (". ", ", ", "\n", " - ", " ")) + question
            return Problem(self.name, (user(text),), solution, value)
        messages = self.told_messages(rng, others[:1], split) if rng.random() < 0.3 else []
        if kind < 0.36 and fact.get("correct"):
            old = self.draw_value(rng, fact, split)
            messages += exchange(rng, fact, old, say(rng, fact, old, split))
            messages += exchange(rng, fact, value, correct(rng, fact, old, value, split))
        else:
            messages += exchange(rng, fact, value, say(rng, fact, value, split))
        if rng.random() < 0.3:
            messages += self.told_messages(rng, others[1:], split)
        if rng.random() < 0.2:
            name = rng.choice(("okay", "thanks", "laugh", "how_are_you"))
            remark = draw_line(rng, families("talk", name, split), split)
            messages += [user(remark), assistant(rng.choice(INTENTS[name].answers))]
        return Problem(self.name, (*messages, user(question)), solution, value)

    def draw_facts(self, rng: random.Random) -> list[dict]:
        """Three facts about different things. Each table is equally likely, however many kinds it has."""
        while True:
            facts = [draw_kind(rng, table) for table in rng.sample(self.tables, 3)]
            if len({fact["topic"] for fact in facts}) == 3:
                return facts

    def draw_value(self, rng: random.Random, fact: dict, split: str) -> str:
        """A value of the list, a number, or, in 2 of 5 train problems, any other word: the question must find it."""
        if fact["number"] or not fact["values"]:
            return str(rng.choice((rng.randint(2, 99), rng.randint(2, 9999), rng.randint(1940, 2020))))
        values = [value for value in fact["values"] if split_of(value) == split] or fact["values"]
        value = rng.choice(values)
        if split == "train" and rng.random() < 0.4:
            value = self.draw_other_value(rng)
        return value.lower() if rng.random() < 0.4 else value

    def draw_other_value(self, rng: random.Random) -> str:
        """A name, a word of the plays or a made-up one; 1 in 4 has a second word."""
        words = [rng.choice((made_up_word(rng), rng.choice(FIRST_NAMES), rng.choice(PLACES), rng.choice(self.words)))]
        if rng.random() < 0.25:
            words.append(rng.choice(self.words))
        return " ".join(word[0].upper() + word[1:] for word in words)

    def told_messages(self, rng: random.Random, facts: Sequence[dict], split: str) -> list[dict]:
        """Messages that tell other things."""
        messages = []
        for fact in facts:
            value = self.draw_value(rng, fact, split)
            messages += exchange(rng, fact, value, say(rng, fact, value, split))
        return messages

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        text = final_text(reply)
        if not problem.answer:
            return float(is_refusal(text))
        return float(re.search(rf"(?<!\w){re.escape(problem.answer)}(?!\w)", text, re.IGNORECASE) is not None)
