"""Who the model is, and the small talk around it. All it says of itself comes from its own card."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanoghost.tasks.base import Problem, assistant, final_text, phrases, split_of, user, wording
from nanoghost.tasks.names import FIRST_NAMES


@dataclass(frozen=True)
class Intent:
    """One thing people want to know or say. {name}, {data} ... are facts; {person} is whoever introduces himself."""

    answers: tuple[str, ...]
    """Good answers. One that needs a fact the card doesn't tell is left out; so is an intent without answers."""
    keys: tuple[str, ...]
    """An answer is right if it contains one of these."""
    train: tuple[str, ...]
    test: tuple[str, ...]


INTENTS = {name: Intent(**intent) for name, intent in phrases("identity")["intents"].items()}
PLAYS = phrases("identity")["plays"]


def identity_facts(card: Mapping) -> dict[str, str]:
    """Read what a model may say of itself from its card (`name`, `maker`, `parameters`, `tokens`, `seconds`, `machine` as a
    text, `data` as a list of {name, licence}); what the card doesn't tell is left out."""
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
        facts["data"] = " and ".join(dict.fromkeys(source["name"] for source in card["data"]))
        licences = dict.fromkeys(source["license"] for source in card["data"] if source.get("license"))
        if licences:
            facts["licence"] = " and ".join(licences)
    return facts


def in_words(count: int) -> str:
    """A large number the way one says it: 4,213,000 is "4.2 million"."""
    for size, word in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + f" {word}"
    return str(count)


class Identity:
    """Questions about the model itself, greetings and thanks. Right means: the fact that was asked for is said."""

    name = "identity"

    def __init__(self, facts: Mapping[str, str]):
        self.facts = {"name": "Ghost", **facts}
        tellable = {name: self._tellable(intent) for name, intent in INTENTS.items()}
        self.intents = {name: intent for name, intent in tellable.items() if intent.answers}
        if "shakespeare" not in self.facts.get("data", "").lower():
            del self.intents["author"]

    def _tellable(self, intent: Intent) -> Intent:
        """The intent with the answers whose facts are known: of "who", only the one that tells most."""
        known = {*self.facts, "person", "play"}
        answers = [answer for answer in intent.answers if _slots(answer) <= known]
        if intent is INTENTS["who"]:
            answers = answers[:1]
        return Intent(tuple(answers), intent.keys, intent.train, intent.test)

    def problem(self, rng: random.Random, split: str) -> Problem:
        intent = rng.choice(list(self.intents.values()))
        slots = {
            "person": rng.choice([name for name in FIRST_NAMES if split_of(name) == split]),
            "play": rng.choice([title for title in PLAYS if split_of(title) == split]),
            **self.facts,
        }
        question = wording(rng, intent.train if split == "train" else intent.test, split).format(**slots)
        keys = "|".join(key.format(**slots) for key in intent.keys)
        return Problem(self.name, (user(question),), (assistant(rng.choice(intent.answers).format(**slots)),), keys)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        said = final_text(reply).lower()
        return float(any(key.lower() in said for key in problem.answer.split("|")))


def _slots(template: str) -> set[str]:
    return {piece.split("}")[0] for piece in template.split("{")[1:]}
