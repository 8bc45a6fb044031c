"""Sums with a calculator: the model need not reckon, only write down the right call and read off the result."""

import json
import random
from collections.abc import Sequence

from nanoghost.tasks.base import (
    Problem,
    assistant,
    estranged,
    final_text,
    last_number,
    phrases,
    split_of,
    user,
    wording,
)
from nanoghost.tools.calculator import calculate

WRITTEN = {"+": ("+", "+", "plus"), "-": ("-", "−", "minus"), "*": ("×", "*", "x", "times")}
SHOWN = {"+": "+", "-": "-", "*": "×"}

ANY, NAMED, ANSWERS = (phrases("sums")[key] for key in ("any", "named", "answers"))


def content_key(a: int, operation: str, b: int) -> str:
    """What the split is decided by: 3 + 4 and 4 + 3 are one content, here and in the gym."""
    first, second = (a, b) if operation == "-" else sorted((a, b))
    return f"{first} {operation} {second}"


class Sums:
    """Two numbers of 1 to 4 digits, + - ×. Right: the calculator was called and the last number is the result."""

    name = "sums"

    def problem(self, rng: random.Random, split: str) -> Problem:
        while True:
            a, b = (_number(rng) for _ in range(2))
            operation = rng.choice("+-*")
            if split_of(content_key(a, operation, b)) == split:
                break
        space = " " if rng.random() < 0.7 else ""
        sign = rng.choice(WRITTEN[operation])
        written = f"{a} {sign} {b}" if sign.isalpha() else f"{a}{space}{sign}{space}{b}"
        template = wording(rng, ANY[split] + NAMED[operation][split], split)
        if split == "train" and "{sum}" in template and rng.random() < 0.5:
            template = estranged(rng, template, rng.random())  # the sign tells what is wanted
        question = template.format(sum=written, a=a, b=b)

        expression = f"{a}{operation}{b}"
        result = calculate(expression)
        answer = rng.choice(ANSWERS).format(sum=f"{a} {SHOWN[operation]} {b}", result=result)
        function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
        call = assistant("") | {"tool_calls": [{"id": "call_1", "type": "function", "function": function}]}
        told = {"role": "tool", "tool_call_id": "call_1", "content": result}
        return Problem(self.name, (user(question),), (call, told, assistant(answer)), result)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        calls = [call for message in reply for call in message.get("tool_calls") or ()]
        called = any(call["function"]["name"] == "calculator" for call in calls)
        return float(called and last_number(final_text(reply)) == problem.answer)


def _number(rng: random.Random) -> int:
    digits = rng.randint(1, 4)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)
