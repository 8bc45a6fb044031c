"""Sums with a calculator: the model need not calculate, only write the right call and read the result.

These are plain; everyday_sums.py has those that people ask.
"""

import random
from collections.abc import Sequence

from nanoghost.tasks.base import Problem, Task, split_of
from nanoghost.tasks.messages import assistant, final_text, last_number, tool_call_messages, user
from nanoghost.tasks.wording import choose_template, load_phrases, replace_words
from nanoghost.tools.calculator import calculate

OPERATORS_IN_QUESTIONS = {"+": ("+", "+", "plus"), "-": ("-", "−", "minus"), "*": ("×", "*", "x", "times")}

PHRASES = load_phrases("arithmetic")
ANY, NAMED = PHRASES["any"], PHRASES["named"]


def answer_text(expression: str, result: str) -> str:
    """The answer to a sum with its result, or to one that has none."""
    expression = expression.strip()
    if result == "error: division by zero":
        return "Nothing can be divided by zero."
    if result.startswith("error: "):
        return "I cannot work that out."
    return f"{expression} = {result}." if expression[0] in "0123456789(-√$" else f"That is {result}."


def solve_with_calculator(expression: str, call_id: str = "call_1") -> tuple[tuple[dict, ...], str]:
    """(the messages that call the calculator and answer, the result). Ids of calls differ within a conversation.

    An expression that is copied from a question begins with the blank before it, and thus has the same tokens.
    """
    result = calculate(expression)
    call = tool_call_messages("calculator", "expression", expression, result, call_id)
    return (*call, assistant(answer_text(expression, result))), result


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
    weight = 0.04

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
        if "{sum}" in template:
            expression = " " * template.partition("{sum}")[0].endswith(" ") + sum_text
        solution, result = solve_with_calculator(expression)
        return Problem(self.name, (user(question),), solution, result)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        calls = [call for message in reply for call in message.get("tool_calls") or ()]
        calculator_called = any(call["function"]["name"] == "calculator" for call in calls)
        return float(calculator_called and last_number(final_text(reply)) == problem.answer)


def random_number(rng: random.Random) -> int:
    digits = rng.randint(1, 4)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)
