"""Two tasks of reasoning-gym, in its own words: no tool, no partial credit: the answer is right to the letter or it is wrong.

For each the lessons show two ways, as people have them: the answer at once, or step by step. One of them a small model
can do. No lesson says which: that is left to be found out by trying (train/rl.py).

Source: https://github.com/open-thought/reasoning-gym (Apache-2.0).
"""

import random
from collections.abc import Sequence
from functools import cache

from nanoghost.tasks.base import Problem, assistant, distinct_problems, final_text, letters, split_of, user
from nanoghost.tasks.sums import content_key


@cache
def _dataset(name: str, **settings: int):
    import reasoning_gym  # here, because it takes two seconds

    return reasoning_gym.create_dataset(name, seed=0, size=1, **settings)


class _Gym:
    """reasoning-gym makes entry i of a data set from (seed, i) alone, so any i may be asked for."""

    name: str
    settings: dict[str, int]

    def content(self, entry: dict) -> str:
        """What decides the split."""
        raise NotImplementedError

    def at_once(self, entry: dict) -> bool:
        """Whether this is one of the problems that people mostly answer without showing steps."""
        raise NotImplementedError

    def in_steps(self, entry: dict) -> dict:
        """The answer with its steps."""
        raise NotImplementedError

    def problem(self, rng: random.Random, split: str) -> Problem:
        dataset = _dataset(self.name, **self.settings)
        while True:
            entry = dataset[rng.randrange(2**31)]
            if split_of(self.content(entry)) == split:
                quick = rng.random() < (0.55 if self.at_once(entry) else 0.15)
                lesson = assistant(entry["answer"]) if quick else self.in_steps(entry)
                return Problem(self.name, (user(entry["question"]),), (lesson,), entry["answer"], tools=False)

    def test_problems(self, count: int) -> list[Problem]:
        """The same `count` different test problems every time."""
        return distinct_problems(self, count)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(len(reply) == 1 and final_text(reply) == problem.answer)


class ChainSum(_Gym):
    """State the final answer to the following arithmetic problem: 47 - 19 =

    At once: 28. In steps, a column at a time: 17-9=8, 4-1-1=2, so 28. Only what follows "so" is scored.
    """

    name = "chain_sum"
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}

    def content(self, entry: dict) -> str:
        a, operation, b = entry["metadata"]["expression"].split()
        return content_key(int(a), operation, int(b))

    def at_once(self, entry: dict) -> bool:
        return "+" in entry["metadata"]["expression"]

    def in_steps(self, entry: dict) -> dict:
        a, operation, b = entry["metadata"]["expression"].split()
        return assistant(worked(int(a), operation, int(b)))

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

    At once: in the longest tokens there are, of which each must be known backward. In steps: a letter a token.
    """

    name = "spell_backward"
    settings = {"min_word_len": 3, "max_word_len": 6}

    def content(self, entry: dict) -> str:
        return entry["metadata"]["word"]

    def at_once(self, entry: dict) -> bool:
        return len(entry["answer"]) <= 5

    def in_steps(self, entry: dict) -> dict:
        return assistant(letters(entry["answer"]))


def word_list() -> list[str]:
    """The words of 3 to 10 letters that reasoning-gym draws from."""
    return list(_dataset("spell_backward", min_word_len=3, max_word_len=10).words)
