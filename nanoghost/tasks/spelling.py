"""Letters of words. Tokens hide them, so the solutions write words in parts of one letter a token."""

import random
import re
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, Task, TaskContext, split_of
from nanoghost.tasks.messages import assistant, final_text, last_number, make_text_parts, user
from nanoghost.tasks.names import FIRST_NAMES, PLACES
from nanoghost.tasks.wording import choose_template, draw_line, families, load_phrases, replace_words

SPELL, COUNT = load_phrases("spelling")["spell"], load_phrases("spelling")["count"]
COMMON_LETTERS = "abcdefghiklmnoprstuwy"  # all but j, q, v, x and z


class WordTask(Task):
    """Draws words of a split, and sometimes a name, so that a capital letter alone says nothing about the task."""

    def __init__(self, words: Sequence[str]):
        long_words = sorted({word for word in words if re.fullmatch(r"[a-z]{11,20}", word)})
        words = sorted({word for word in words if re.fullmatch(r"[a-z]{2,10}", word)})
        names = sorted({*PLACES, *FIRST_NAMES})
        self.words = {split: [word for word in words if split_of(word) == split] for split in ("train", "test")}
        self.long_words = {
            split: [word for word in long_words if split_of(word) == split] for split in ("train", "test")
        }
        self.names = {split: [name for name in names if split_of(name) == split] for split in ("train", "test")}

    @classmethod
    def build(cls, context: TaskContext, earlier_tasks: dict[str, Task]) -> Task:
        return cls(context.words)

    def draw_word(self, rng: random.Random, split: str) -> str:
        words = (self.names if rng.random() < 0.1 else self.words)[split]
        if split == "train" and rng.random() < 0.5:
            return max(rng.sample(words, 2), key=len)  # long words are harder
        return rng.choice(words)

    def draw_long_word(self, rng: random.Random, split: str) -> str:
        """More than ten letters; half of them are two or three words run together."""
        if rng.random() < 0.5 and self.long_words[split]:
            return rng.choice(self.long_words[split])
        return "".join(self.draw_word(rng, split).lower() for _ in range(rng.randint(2, 3)))


def quote(rng: random.Random, word: str) -> str:
    """The word, mostly in quotation marks: without a space before it, a word has shorter and more common tokens."""
    return rng.choices((f'"{word}"', f"'{word}'", word), weights=(5, 3, 2))[0]


def quote_rarely(rng: random.Random, word: str) -> str:
    """The word as people type it: mostly bare."""
    return rng.choices((f'"{word}"', f"'{word}'", word), weights=(1, 1, 6))[0]


class Spelling(WordTask):
    """How do you spell "thou"? t-h-o-u"""

    name = "spelling"
    label = "spelling a word"
    weight = 0.12

    def problem(self, rng: random.Random, split: str) -> Problem:
        word = self.draw_word(rng, split)
        if split == "train" and rng.random() < 0.1:
            word = self.draw_long_word(rng, split)
        template = choose_template(rng, SPELL[split], split)
        quoted = quote(rng, word)
        if split == "train" and rng.random() < 0.6:
            template, quoted = draw_line(rng, families("spell", None, split), split), quote_rarely(rng, word)
        question = template.format(word=quoted)
        answer = "-".join(word)
        return Problem(self.name, (user(question),), (assistant(make_text_parts(list(answer))),), answer)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        spelled_words = re.findall(r"\b[a-z](?:-[a-z])+\b", final_text(reply).lower())
        return float(spelled_words[-1:] == [problem.answer.lower()])


class Counting(WordTask):
    """How many s in "possess"? p-o-s1-s2-e-s3-s4, so 4.

    The letters that count carry their number: each step needs only the next letter and the previous number, which is
    easier for a small model than to spell first and count afterwards.
    """

    name = "counting"
    label = "counting letters"
    weight = 0.13

    def problem(self, rng: random.Random, split: str) -> Problem:
        word = self.draw_word(rng, split)
        letter = self.draw_letter(rng, word.lower())
        template = choose_template(rng, COUNT[split], split)
        quoted = quote(rng, word)
        if split == "train" and rng.random() < 0.5:
            template, quoted = draw_line(rng, families("count_letter", None, split), split), quote_rarely(rng, word)
        if split == "train" and rng.random() < 0.3:
            template = replace_words(rng, template, rng.random())  # a letter and a word say what is wanted
        question = template.format(word=quoted, letter=f'"{letter}"' if rng.random() < 0.2 else letter)

        parts, count = [], 0
        for i, character in enumerate(word):
            if i > 0:
                parts.append("-")
            parts.append(character)
            if character.lower() == letter:
                count += 1
                parts.append(str(count))
        parts.append(f", so {count}.")
        return Problem(self.name, (user(question),), (assistant(make_text_parts(parts)),), str(count))

    def draw_letter(self, rng: random.Random, word: str) -> str:
        """A letter of the word, one of its most frequent ones, or any letter: otherwise most answers would be 1."""
        max_count = max(word.count(letter) for letter in word)
        most_frequent = [letter for letter in word if word.count(letter) == max_count]
        [choices] = rng.choices((word, most_frequent, COMMON_LETTERS), weights=(3, 5, 2))
        return rng.choice(choices)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(last_number(final_text(reply)) == problem.answer)
