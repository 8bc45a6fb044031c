"""Letters of words. Tokens hide them, so lessons write words in parts, one letter a token."""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import (
    Problem,
    assistant,
    estranged,
    final_text,
    last_number,
    parts,
    phrases,
    split_of,
    user,
    wording,
)
from nanoghost.tasks.names import FIRST_NAMES, PLACES

SPELL, COUNT = phrases("spelling")["spell"], phrases("spelling")["count"]


class _Words:
    """Draws words of a split; now and then a name, so that a capital letter alone says nothing about the task."""

    def __init__(self, words: Sequence[str]):
        usable = sorted({word for word in words if re.fullmatch(r"[a-z]{2,10}", word)})
        self.words = {split: [word for word in usable if split_of(word) == split] for split in ("train", "test")}
        names = sorted({*PLACES, *FIRST_NAMES})
        self.names = {split: [name for name in names if split_of(name) == split] for split in ("train", "test")}

    def draw(self, rng: random.Random, split: str) -> str:
        return rng.choice((self.names if rng.random() < 0.1 else self.words)[split])


def quoted(rng: random.Random, word: str) -> str:
    """Mostly in quotation marks: without a space before it a word is split into shorter, better known tokens."""
    return rng.choices((f'"{word}"', f"'{word}'", word), weights=(5, 3, 2))[0]


class Spelling(_Words):
    """How do you spell "thou"? t-h-o-u"""

    name = "spelling"

    def problem(self, rng: random.Random, split: str) -> Problem:
        word = self.draw(rng, split)
        template = wording(rng, SPELL[split], split)
        question = template.format(word=quoted(rng, word))
        answer = "-".join(word)
        return Problem(self.name, (user(question),), (assistant(parts(list(answer))),), answer)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        spelled = re.findall(r"\b[a-z](?:-[a-z])+\b", final_text(reply).lower())
        return float(spelled[-1:] == [problem.answer.lower()])


class Counting(_Words):
    """How many s in "possess"? p-o-s1-s2-e-s3-s4, so 4.

    The letters that count carry their number: each step only needs the next letter and the number before, which is
    easier for a small model than to spell first and count afterwards.
    """

    name = "counting"

    def problem(self, rng: random.Random, split: str) -> Problem:
        word = self.draw(rng, split)
        letter = self.letter(rng, word.lower())
        template = wording(rng, COUNT[split], split)
        if split == "train" and rng.random() < 0.3:
            template = estranged(rng, template, rng.random())  # a letter and a word tell what is asked
        question = template.format(word=quoted(rng, word), letter=f'"{letter}"' if rng.random() < 0.2 else letter)

        pieces, count = [], 0
        for place, here in enumerate(word):
            pieces += ["-", here] if place else [here]
            if here.lower() == letter:
                count += 1
                pieces.append(str(count))
        pieces.append(f", so {count}.")
        return Problem(self.name, (user(question),), (assistant(parts(pieces)),), str(count))

    def letter(self, rng: random.Random, word: str) -> str:
        """Any letter of the word, or one it has most of, or any letter at all: else nearly every answer were 1."""
        most = max(word.count(letter) for letter in word)
        repeated = [letter for letter in word if word.count(letter) == most]
        [choices] = rng.choices((word, repeated, "abcdefghiklmnoprstuwy"), weights=(3, 5, 2))
        return rng.choice(choices)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(last_number(final_text(reply)) == problem.answer)
