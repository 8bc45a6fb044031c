"""More about letters: how many a word has, its first, last or third one, backward, the alphabet, and counting.

As in spelling.py, answers write words in parts of one letter a token.
"""

import random
import re
import string
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, split_of
from nanoghost.tasks.messages import assistant, final_text, make_text_parts, user
from nanoghost.tasks.spelling import WordTask, quote_rarely
from nanoghost.tasks.wording import draw_line, families, made_up_word

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
KINDS = {
    "length": 5,
    "first_letter": 2,
    "last_letter": 2,
    "nth_letter": 4,
    "backward": 5,
    "letter_after": 3,
    "letter_before": 2,
    "alphabet_nth": 3,
    "count_up": 4,
    "count_down": 3,
    "join": 5,
    "count_words": 2,
}
"""Lists of lines in phrases/people, and how often each is drawn."""


def ordinal(rng: random.Random, n: int) -> str:
    """third or 3rd"""
    ending = "th" if 10 < n < 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return ORDINALS[n - 1] if n <= 10 and rng.random() < 0.5 else f"{n}{ending}"


class Letters(WordTask):
    """whats the 3rd letter of giraffe. g1-i2-r3, so r. Correct: the answer ends with the letter, word or number."""

    name = "letters"
    label = "letters of words and of the alphabet"
    weight = 0.18

    def problem(self, rng: random.Random, split: str) -> Problem:
        [kind] = rng.choices(tuple(KINDS), weights=tuple(KINDS.values()))
        slots, parts, answer = getattr(self, kind)(rng, split)
        line = draw_line(rng, families(kind, None, split), split)
        for slot, value in slots.items():
            line = line.replace("{" + slot + "}", value)
        return Problem(self.name, (user(line),), (assistant(make_text_parts(parts)),), answer)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(re.search(rf"(?<!\w){re.escape(problem.answer)}\W*$", final_text(reply), re.I) is not None)

    # ── one method for each kind: (slots of the question, parts of the answer, what the answer ends with) ─────────────

    def length(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        word = self.draw_any_word(rng, split)
        return {"word": quote_rarely(rng, word)}, [*numbered(word), f", so {len(word)}."], str(len(word))

    def first_letter(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        word = self.draw_any_word(rng, split)
        return {"word": quote_rarely(rng, word)}, ["The first letter is ", word[0], "."], word[0]

    def last_letter(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        word = self.draw_any_word(rng, split)
        return {"word": quote_rarely(rng, word)}, ["The last letter is ", word[-1], "."], word[-1]

    def nth_letter(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        word = self.draw_any_word(rng, split)
        n = rng.randint(1, min(len(word), 10))
        slots = {"word": quote_rarely(rng, word), "nth": ordinal(rng, n)}
        return slots, [*numbered(word[:n]), ", so ", word[n - 1], "."], word[n - 1]

    def backward(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        word = self.draw_any_word(rng, split)
        answer = "-".join(reversed(word))
        return {"word": quote_rarely(rng, word)}, list(answer), answer

    def letter_after(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        i = rng.randrange(25)
        slots = {"letter": rng.choice((str.lower, str.upper))(string.ascii_lowercase[i])}
        after = string.ascii_lowercase[i + 1]
        return slots, ["After ", string.ascii_lowercase[i], " comes ", after, "."], after

    def letter_before(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        i = rng.randrange(1, 26)
        slots = {"letter": rng.choice((str.lower, str.upper))(string.ascii_lowercase[i])}
        before = string.ascii_lowercase[i - 1]
        return slots, ["Before ", string.ascii_lowercase[i], " comes ", before, "."], before

    def alphabet_nth(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        n = rng.randint(1, 26)
        letter = string.ascii_lowercase[n - 1]
        return {"nth": ordinal(rng, n)}, [f"Letter {n} of the alphabet is ", letter, "."], letter

    def count_up(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        n = rng.randint(2, 25)
        answer = ", ".join(map(str, range(1, n + 1)))
        return {"n": str(n)}, [answer + "."], answer

    def count_down(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        n = rng.randint(2, 25)
        answer = ", ".join(map(str, range(n, 0, -1)))
        return {"n": str(n)}, [answer + "."], answer

    def join(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        word = self.draw_word(rng, split).lower()
        separator = rng.choice(("-", "-", " ", ", ", "."))
        spelled = separator.join(word)
        return {"spelled": spelled.upper() if rng.random() < 0.2 else spelled}, ["It spells ", *word, "."], word

    def count_words(self, rng: random.Random, split: str) -> tuple[dict, list[str], str]:
        words = [self.draw_word(rng, split) for _ in range(rng.randint(2, 8))]
        parts = [part for n, word in enumerate(words, 1) for part in (f" {word}", f" {n}")]
        parts[0] = words[0]
        return {"sentence": " ".join(words)}, [*parts, f", so {len(words)}."], str(len(words))

    def draw_any_word(self, rng: random.Random, split: str) -> str:
        """A word; 1 in 10 is long, and 1 in 20 is made up."""
        kind = rng.random()
        if kind < 0.1:
            return self.draw_long_word(rng, split)
        while kind < 0.15:
            word = made_up_word(rng)
            if split_of(word) == split:
                return word
        return self.draw_word(rng, split)


def numbered(word: str) -> list[str]:
    """Parts of "c1-a2-t3"."""
    parts = [part for n, letter in enumerate(word, 1) for part in ("-", letter, str(n))]
    return parts[1:]
