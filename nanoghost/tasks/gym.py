"""Two tasks of reasoning-gym with its questions, and its list of words for the spelling tasks.

No tools, no partial credit: an answer is exactly right or wrong.

The solutions do not show the best way to answer. Sums are shown both as a direct answer and as worked steps, and
nothing tells the model which is better; words are shown backward at once, in few long tokens. RL discovers better ways
(train/rl.py).

Source: https://github.com/open-thought/reasoning-gym (Apache-2.0).
"""

import random
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

from nanoghost.tasks.arithmetic import content_key
from nanoghost.tasks.base import Problem, Task, split_of
from nanoghost.tasks.messages import assistant, final_text, user


@cache
def gym_dataset(name: str, **settings: int):
    import reasoning_gym  # takes two seconds

    return reasoning_gym.create_dataset(name, seed=0, size=1, **settings)


class ReasoningGymTask(Task):
    """A dataset of reasoning-gym. It is endless: entry i is computed from (seed, i) alone."""

    settings: ClassVar[dict[str, int]]
    rl_default = True

    @abstractmethod
    def content_and_solution(self, entry: dict, rng: random.Random) -> tuple[str, dict]:
        """The content that decides the split, and the assistant's message of a good answer."""

    def problem(self, rng: random.Random, split: str) -> Problem:
        dataset = gym_dataset(self.name, **self.settings)
        while True:
            entry = dataset[rng.randrange(2**31)]
            content, solution = self.content_and_solution(entry, rng)
            if split_of(content) == split:
                return Problem(self.name, (user(entry["question"]),), (solution,), entry["answer"], tools=())

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(len(reply) == 1 and final_text(reply) == problem.answer)


class ChainSum(ReasoningGymTask):
    """State the final answer to the following arithmetic problem: 47 - 19 =

    Direct: 28. In steps, one column at a time: 17-9=8, 4-1-1=2, so 28. Only the text after "so" is scored.
    """

    name = "chain_sum"
    label = "chain_sum, without a calculator"
    weight = 0.12
    settings = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}

    def content_and_solution(self, entry: dict, rng: random.Random) -> tuple[str, dict]:
        a, operation, b = entry["metadata"]["expression"].split()
        a, b = int(a), int(b)
        direct = rng.random() < (0.6 if operation == "+" else 0.3)  # people add more often directly than they subtract
        return content_key(a, operation, b), assistant(entry["answer"] if direct else worked_steps(a, operation, b))

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        return float(len(reply) == 1 and final_text(reply).rpartition("so ")[2] == problem.answer)


def worked_steps(a: int, operation: str, b: int) -> str:
    """Addition or subtraction of two-digit numbers in columns, units first, with carry or borrow."""
    if operation == "-" and a < b:
        return f"{b}-{a}: {worked_steps(b, operation, a).replace('so ', 'so -')}"
    (tens_a, units_a), (tens_b, units_b) = divmod(a, 10), divmod(b, 10)
    if operation == "+":
        carry = "+1" if units_a + units_b > 9 else ""
        tens = (a + b) // 10
        return f"{units_a}+{units_b}={units_a + units_b}, {tens_a}+{tens_b}{carry}={tens}, so {a + b}"
    ten, borrow = ("1", "-1") if units_a < units_b else ("", "")
    units, tens = (units_a - units_b) % 10, (a - b) // 10
    return f"{ten}{units_a}-{units_b}={units}, {tens_a}-{tens_b}{borrow}={tens}, so {a - b}"


class SpellBackward(ReasoningGymTask):
    """Spell this word backward (example: sun -> nus): ghost

    The solutions show the whole answer in long tokens. RL discovers that one letter at a time is easier.
    """

    name = "spell_backward"
    label = "spell_backward"
    weight = 0.01
    settings = {"min_word_len": 3, "max_word_len": 6}

    def content_and_solution(self, entry: dict, rng: random.Random) -> tuple[str, dict]:
        return entry["metadata"]["word"], assistant(entry["answer"])


def word_list() -> list[str]:
    """The words of 3 to 10 letters that reasoning-gym draws from."""
    return list(gym_dataset("spell_backward", min_word_len=3, max_word_len=10).words)
