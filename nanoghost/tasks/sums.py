"""Sums with a calculator: the model need not reckon, only write down the right call and read off the result."""

import json
import random
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, assistant, final_text, last_number, split_of, user, wording
from nanoghost.tools.calculator import calculate

WRITTEN = {"+": ("+", "+", "plus"), "-": ("-", "−", "minus"), "*": ("×", "*", "x", "times")}
SHOWN = {"+": "+", "-": "-", "*": "×"}

# {sum} is "12 + 345" or "12 plus 345"; the same for every operation.
ANY_TRAIN = (
    "What is {sum}?",
    "What's {sum}?",
    "{sum}",
    "{sum} = ?",
    "{sum}?",
    "Calculate {sum}.",
    "Work out {sum}.",
    "How much is {sum}?",
    "What does {sum} make?",
    "What is the result of {sum}?",
    "Can you calculate {sum}?",
    "Please work out {sum} for me.",
    "What do I get for {sum}?",
    "Find {sum}.",
    "Solve {sum}.",
    "Give me the value of {sum}.",
    "I need to know {sum}.",
    "Do this sum: {sum}",
    "Use the calculator: {sum}",
    "My homework says {sum}. What is it?",
    "{sum} makes what?",
    "What number is {sum}?",
)
ANY_TEST = (
    "Could you tell me what {sum} comes to?",
    "Help me with {sum}, please.",
    "What is the answer to {sum}?",
    "Reckon {sum}.",
    "If I type {sum}, what do I see?",
    "Compute {sum}.",
    "What is the value of {sum}?",
)
# These name the operation themselves.
TRAIN = {
    "+": (
        "Add {a} and {b}.",
        "What is the sum of {a} and {b}?",
        "Add {b} to {a}.",
        "I have {a} apples and get {b} more. How many are there?",
        "What do {a} and {b} make together?",
        "There were {a} men and {b} came. How many are they now?",
        "How much are {a} and {b} in all?",
    ),
    "-": (
        "Take {b} from {a}.",
        "Subtract {b} from {a}.",
        "What is {a} less {b}?",
        "What is left if I take {b} from {a}?",
        "I had {a} coins and lost {b}. How many are left?",
        "Take {b} away from {a}.",
    ),
    "*": (
        "Multiply {a} by {b}.",
        "What is the product of {a} and {b}?",
        "Multiply {a} and {b}.",
        "What is {a} multiplied by {b}?",
        "There are {a} ships with {b} men each. How many men are there?",
        "I have {a} boxes of {b} eggs. How many eggs are there?",
    ),
}
TEST = {
    "+": ("What do you get when you add {a} and {b}?", "Find the sum of {a} and {b}."),
    "-": ("What remains when you subtract {b} from {a}?", "I take {b} from {a}. What is left?"),
    "*": ("Find the product of {a} and {b}.", "What do you get when you multiply {a} by {b}?"),
}

ANSWERS = ("{sum} = {result}.", "{sum} = {result}.", "That is {result}.", "The answer is {result}.")


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
        everything, named = (ANY_TRAIN, TRAIN) if split == "train" else (ANY_TEST, TEST)
        question = wording(rng, (*everything, *named[operation]), split).format(sum=written, a=a, b=b)

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
