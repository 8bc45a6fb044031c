"""Sums with a calculator: the model need not calculate, only write the right call and read the result."""

import random
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, Task, split_of
from nanoghost.tasks.messages import assistant, final_text, last_number, tool_call_messages, user
from nanoghost.tasks.wording import choose_template, load_phrases, replace_words
from nanoghost.tools.calculator import calculate

OPERATORS_IN_QUESTIONS = {"+": ("+", "+", "plus"), "-": ("-", "−", "minus"), "*": ("×", "*", "x", "times")}
OPERATORS_IN_ANSWERS = {"+": "+", "-": "-", "*": "×"}

PHRASES = load_phrases("arithmetic")
ANY, NAMED, ANSWERS = PHRASES["any"], PHRASES["named"], PHRASES["answers"]


def content_key(a: int, operation: str, b: int) -> str:
    """The content that decides the split: the same for 3 + 4 and 4 + 3, and the same in gym.py."""
    first, second = (a, b) if operation == "-" else sorted((a, b))
    return f"{first} {operation} {second}"


class Sums(Task):
    """Add, subtract or multiply two numbers of 1 to 4 digits.

    Correct: the calculator was called, and the last number is the result.
    """

    name = "sums"
    label = "sums with the calculator"
    weight = 0.215

    def problem(self, rng: random.Random, split: str) -> Problem:
        while True:
            a, b = random_number(rng), random_number(rng)
            operation = rng.choice("+-*")
            if split_of(content_key(a, operation, b)) == split:
                break
        space = " " if rng.random() < 0.7 else ""
        operator = rng.choice(OPERATORS_IN_QUESTIONS[operation])
        sum_text = f"{a} {operator} {b}" if operator.isalpha() else f"{a}{space}{operator}{space}{b}"
        template = choose_template(rng, ANY[split] + NAMED[operation][split], split)
        if split == "train" and "{sum}" in template and rng.random() < 0.5:
            template = replace_words(rng, template, rng.random())  # the operator says what is wanted
        question = template.format(sum=sum_text, a=a, b=b)

        expression = f"{a}{operation}{b}"
        result = calculate(expression)
        sum_text = f"{a} {OPERATORS_IN_ANSWERS[operation]} {b}"
        answer = rng.choice(ANSWERS).format(sum=sum_text, result=result)
        call = tool_call_messages("calculator", "expression", expression, result, "call_1")
        return Problem(self.name, (user(question),), (*call, assistant(answer)), result)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        calls = [call for message in reply for call in message.get("tool_calls") or ()]
        calculator_called = any(call["function"]["name"] == "calculator" for call in calls)
        return float(calculator_called and last_number(final_text(reply)) == problem.answer)


def random_number(rng: random.Random) -> int:
    digits = rng.randint(1, 4)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)
