"""Two tasks of reasoning-gym, in its own words: no tool, no partial credit: the answer is right to the letter or it is wrong.

The lessons do not show the best way to answer. Sums are shown both at once and in steps, and no lesson says which works;
words are shown backward at once, in few long tokens. Better ways are found by trying (train/rl.py).

Source: https://github.com/open-thought/reasoning-gym (Apache-2.0).
"""

import random
from collections.abc import Sequence
from functools import cache

from nanoghost.tasks.arithmetic import content_key
from nanoghost.tasks.base import Problem, assistant, final_text, split_of, user


@cache
def _dataset(name: str, **settings: int):
    import reasoning_gym  # here, because it takes two seconds

    return reasoning_gym.create_dataset(name, seed=0, size=1, **settings)


class _Gym:
    """reasoning-gym makes entry i of a data set from (seed, i) alone, so any i may be asked for."""

    name: str
    settings: dict[str, int]

    def problem(self, rng: random.Random, split: str) -> Problem:
        dataset = _dataset(self.name, **self.settings)
        while True:
            entry = dataset[rng.randrange(2**31)]
            content, lesson = self.look(entry, rng)
            if split_of(content) == split:
                return Problem(self.name, (user(entry["question"]),), (lesson,), entry["answer"], tools=())

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(len(reply) == 1 and final_text(reply) == problem.answer)


class ChainSum(_Gym):
    """State the final answer to the following arithmetic problem: 47 - 19 =

    At once: 28. In steps, a column at a time: 17-9=8, 4-1-1=2, so 28. Only what follows "so" is scored.
    """

    name = "chain_sum"
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}

    def look(self, entry: dict, rng: random.Random) -> tuple[str, dict]:
        """(what decides the split, a lesson); people add at once more often than they subtract."""
        a, operation, b = entry["metadata"]["expression"].split()
        a, b = int(a), int(b)
        at_once = rng.random() < (0.6 if operation == "+" else 0.3)
        return content_key(a, operation, b), assistant(entry["answer"] if at_once else worked(a, operation, b))

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(len(reply) == 1 and final_text(reply).rpartition("so ")[2] == problem.answer)


def worked(a: int, operation: str, b: int) -> str:
    """Addition or subtraction of two-digit numbers in columns, units first, with what is carried or borrowed."""
    if operation == "-" and a < b:
        return f"{b}-{a}: {worked(b, operation, a).replace('so ', 'so -')}"
    (tens_a, units_a), (tens_b, units_b) = divmod(a, 10), divmod(b, 10)
    if operation == "+":
        units, carried = units_a + units_b, "+1" if units_a + units_b > 9 else ""
        tens = (a + b) // 10
        return f"{units_a}+{units_b}={units}, {tens_a}+{tens_b}{carried}={tens}, so {a + b}"
    borrowed = units_a < units_b
    units, tens = (units_a - units_b) % 10, (a - b) // 10
    return f"{'1' * borrowed}{units_a}-{units_b}={units}, {tens_a}-{tens_b}{'-1' * borrowed}={tens}, so {a - b}"


class SpellBackward(_Gym):
    """Spell this word backward (example: sun -> nus): ghost

    Lessons show the whole answer, in the longest tokens there are. That it is easy a letter at a time, is found in practice.
    """

    name = "spell_backward"
    settings = {"min_word_len": 3, "max_word_len": 6}

    def look(self, entry: dict, rng: random.Random) -> tuple[str, dict]:
        return entry["metadata"]["word"], assistant(entry["answer"])


def word_list() -> list[str]:
    """The words of 3 to 10 letters that reasoning-gym draws from."""
    return list(_dataset("spell_backward", min_word_len=3, max_word_len=10).words)
