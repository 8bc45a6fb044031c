"""Letters of words. Tokens hide them, so lessons write words in parts, one letter a token."""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, assistant, final_text, last_number, parts, split_of, user, wording
from nanoghost.tasks.names import FIRST_NAMES, PLACES

SPELL_TRAIN = (
    "How do you spell {word}?",
    "Spell {word}.",
    "Spell the word {word}.",
    "Can you spell {word}?",
    "How is {word} spelled?",
    "Please spell {word} for me.",
    "Spell {word} letter by letter.",
    "What are the letters of {word}?",
    "What letters are in {word}?",
    "How do I spell {word}?",
    "Write {word} letter by letter.",
    "Give me the letters of {word}.",
    "I want to spell {word}.",
    "How do you write {word}?",
    "Which letters make {word}?",
    "Spell out {word}.",
)
SPELL_TEST = (
    "How would you spell {word}?",
    "Could you spell the word {word}?",
    "What is the spelling of {word}?",
    "Show me how to spell {word}.",
    "Tell me the letters of {word}.",
    "How should I spell {word}?",
)
COUNT_TRAIN = (
    "How many {letter} in {word}?",
    "How many {letter}s in {word}?",
    "How many {letter}'s are in {word}?",
    "How many letters {letter} in {word}?",
    "How many times is {letter} in {word}?",
    "Count the {letter} in {word}.",
    "Count the letter {letter} in {word}.",
    "How often does {letter} appear in {word}?",
    "How many letters {letter} does {word} have?",
    "How many {letter} are there in {word}?",
    "How many {letter} does {word} have?",
    "In {word}, how many {letter} are there?",
    "How often is the letter {letter} in {word}?",
    "Count how many {letter} {word} has.",
    "What number of {letter} is in {word}?",
    "How many times do you see {letter} in {word}?",
)
COUNT_TEST = (
    "How many times does the letter {letter} appear in {word}?",
    "Can you count the letter {letter} in {word}?",
    "How many {letter} can you find in {word}?",
    "Tell me how many {letter} are in {word}.",
    "In the word {word}, how often is {letter} used?",
    "How often do you find {letter} in {word}?",
)


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
        template = wording(rng, SPELL_TRAIN if split == "train" else SPELL_TEST, split)
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
        template = wording(rng, COUNT_TRAIN if split == "train" else COUNT_TEST, split)
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
