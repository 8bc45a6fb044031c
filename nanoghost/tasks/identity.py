"""Questions about the model itself, and small talk. The facts in the answers come from the model's own card."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoghost.tasks.base import Problem, Task, TaskContext, split_of
from nanoghost.tasks.messages import assistant, final_text, user
from nanoghost.tasks.names import FIRST_NAMES
from nanoghost.tasks.wording import choose_template, draw_line, families, load_phrases, people_phrases


@dataclass(frozen=True)
class Intent:
    """One thing that people want to know or say. {name}, {data} ... are facts; {person} is the name of the user."""

    answers: tuple[str, ...]
    """Good answers. Those that need an unknown fact are left out, and so is an intent without answers."""
    keys: tuple[str, ...]
    """An answer is correct if it contains one of these."""
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


PEOPLES_INTENTS = {"cannot": "limits", "gibberish": "unclear", "symbols": "unclear", "scripts": "other_script"}
"""The intent of a list of [about], [talk] or [nonsense] in phrases/people, where it has another name."""
INTENTS = {name: Intent(**intent) for name, intent in load_phrases("identity")["intents"].items()}
PLAYS = load_phrases("identity")["plays"]


def identity_facts(card: Mapping) -> dict[str, str]:
    """What a model may say about itself, from values of its card; missing values are left out.

    `name`, `maker`, `parameters`, `tokens`, `seconds`, `machine` (a text), `data` (a list of {name, license}).
    """
    facts = {}
    if "name" in card:
        facts["name"] = card["name"].removesuffix("-base").removesuffix("-sft").capitalize()
    if "maker" in card:
        facts["maker"] = card["maker"]
    for key in ("parameters", "tokens"):
        if key in card:
            facts[key] = in_words(card[key])
    if "seconds" in card:
        minutes = max(1, round(card["seconds"] / 60))
        facts["minutes"] = f"about {minutes} minute{'s' if minutes > 1 else ''}"
    if "machine" in card:
        facts["machine"] = str(card["machine"])
    if card.get("data"):
        names = dict.fromkeys(source["name"] for source in card["data"])
        facts["data"] = " and ".join(names)
        licenses = dict.fromkeys(source["license"] for source in card["data"] if source.get("license"))
        if licenses:
            facts["license"] = " and ".join(licenses)
    return facts


def in_words(count: int) -> str:
    """A large number as people say it: 4,213,000 is "4.2 million"."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {word}"
    return str(count)


class Identity(Task):
    """Questions about the model itself, greetings and thanks. Correct: the answer contains the fact in question."""

    name = "identity"
    label = "questions about itself"
    weight = 0.13

    def __init__(self, facts: Mapping[str, str]):
        self.facts = {"name": "Ghost", **facts}
        self.intents = {}
        for name, intent in INTENTS.items():
            answers = self.possible_answers(name, intent)
            if answers:
                self.intents[name] = Intent(answers, intent.keys, intent.train, intent.test)
        self.peoples_lists = []
        """(table, list, intent) of the lines in phrases/people."""
        for table in ("about", "talk", "nonsense"):
            for name in people_phrases()[table]:
                self.peoples_lists.append((table, name, PEOPLES_INTENTS.get(name, name)))
        if "shakespeare" not in self.facts.get("data", "").lower():
            del self.intents["author"]  # who wrote the training text
        self.peoples_lists = [entry for entry in self.peoples_lists if entry[2] in self.intents]

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, Task]) -> Task:
        return cls(context.facts)

    def possible_answers(self, name: str, intent: Intent) -> tuple[str, ...]:
        """The answers whose facts are known; of "who", only the first one, which has the most facts."""
        available = {*self.facts, "person", "play"}
        answers = tuple(answer for answer in intent.answers if slots_of(answer) <= available)
        return answers[:1] if name == "who" else answers

    def problem(self, rng: random.Random, split: str) -> Problem:
        values = {
            "person": rng.choice([name for name in FIRST_NAMES if split_of(name) == split]),
            "play": rng.choice([title for title in PLAYS if split_of(title) == split]),
            **self.facts,
        }
        if rng.random() < (0.7 if split == "train" else 0.5):
            table, name, intent_name = rng.choice(self.peoples_lists)
            intent = self.intents[intent_name]
            template = draw_line(rng, families(table, name, split), split)
        else:
            intent = rng.choice([intent for intent in self.intents.values() if intent.train])
            template = choose_template(rng, intent.train if split == "train" else intent.test, split)
        question = template.format(**values) if "{" in template else template
        keys = "|".join(key.format(**values) for key in intent.keys)
        answer = rng.choice(intent.answers).format(**values)
        return Problem(self.name, (user(question),), (assistant(answer),), keys)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        text = final_text(reply).lower()
        return float(any(key.lower() in text for key in problem.answer.split("|")))


def slots_of(template: str) -> set[str]:
    return {piece.split("}")[0] for piece in template.split("{")[1:]}
