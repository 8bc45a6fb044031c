"""Sums as people ask for them: in signs or words, in several languages, inside a sentence or a small story.

The call copies what the user wrote ("15% of 80", "nine plus six"), since the calculator reads words, too; only where an
operation is told ("take 5 from 9") or must be found ("how many are left"), the model writes the expression itself.
"""

import random
import re
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nanoghost.tasks.arithmetic import answer_text, solve_with_calculator
from nanoghost.tasks.base import Problem, Task, split_of
from nanoghost.tasks.messages import final_text, last_number, user
from nanoghost.tasks.wording import draw_line, families, made_up_word
from nanoghost.tools import calculator
from nanoghost.tools.calculator import calculate

SLOT = re.compile(r"{(\w+)}")


class EverydaySums(Task):
    """what's 15% of 80. Correct: the calculator was called, and the last number is the result."""

    name = "everyday_sums"
    label = "sums as people ask them"
    weight = 0.22

    def problem(self, rng: random.Random, split: str) -> Problem:
        kind = rng.random()
        while True:
            if kind < 0.55:
                question, expression = self.framed_expression(rng, split)
            elif kind < 0.62:
                question, expression = self.check(rng, split)
            else:
                question, expression = self.told_problem(rng, split)
            if len(expression) <= calculator.MAX_LENGTH and split_of(expression) == split:
                break
        solution, result = solve_with_calculator(expression, "call_everyday")
        return Problem(self.name, (user(question),), solution, result)

    def framed_expression(self, rng: random.Random, split: str) -> tuple[str, str]:
        """A whole expression in a sentence, or alone."""
        expression = draw_expression(rng)
        if rng.random() < 0.2:
            frame = rng.choice(("{sum}", "{sum}", "{sum}?", "{sum} =", "{sum}=?", "{sum} = ?", "{sum}="))
        else:
            frame = draw_line(rng, families("sum", None, split), split)
        before = frame.partition("{sum}")[0]
        return frame.replace("{sum}", expression), " " * before.endswith(" ") + expression

    def check(self, rng: random.Random, split: str) -> tuple[str, str]:
        """is 7*6 43?"""
        expression = draw_expression(rng)
        result = calculate(expression)
        if result.startswith("error"):
            result = "0"
        wrong = str(int(result) + rng.choice((-10, -2, -1, 1, 2, 10))) if result.isdigit() else result
        frame = draw_line(rng, families("check", None, split), split)
        if rng.random() < 0.3:
            frame = rng.choice(
                ("is {sum} {guess}", "is {sum} {guess}?", "{sum} = {guess}?", "{sum} is {guess}?", "{sum}={guess}")
            )
        before = frame.partition("{sum}")[0]
        question = frame.replace("{guess}", wrong if rng.random() < 0.6 else result).replace("{sum}", expression)
        return question, " " * before.endswith(" ") + expression

    def told_problem(self, rng: random.Random, split: str) -> tuple[str, str]:
        """A line of `problems` with numbers in it, some of them as words."""
        while True:
            line, formula = rng.choice(families("problems", None, split))
            line = draw_line(rng, (line,), split)
            if set(SLOT.findall(line)) == set(SLOT.findall(formula)):  # no alternative leaves a number out
                break
        if rng.random() < 0.5:
            line = re.sub(r"{(\w)} (?:dollars|bucks)", r"${\1}", line)
        values = draw_values(rng, formula)
        texts = {}
        for slot, value in values.items():
            in_words = slot != "d" and value <= 100 and rng.random() < 0.2
            texts[slot] = words_of(value) if in_words else f"{value:g}"
        return line.format(**texts), formula.format(**texts)

    def score(self, problem: Problem, reply: Sequence[dict]) -> float:
        calls = [call for message in reply for call in message.get("tool_calls") or ()]
        called = any(call["function"]["name"] == "calculator" for call in calls)
        if problem.answer.startswith("error: "):
            return float(called and final_text(reply) == answer_text("1", problem.answer))
        value = last_number(problem.answer)
        return float(called and value is not None and last_number(final_text(reply)) == value)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_whole(rng: random.Random, max_digits: int = 4) -> int:
    digits = rng.randint(1, max_digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def draw_values(rng: random.Random, formula: str) -> dict:
    """Values for the slots of a formula: differences are not negative, and quotients mostly come out even."""
    slots = dict.fromkeys(SLOT.findall(formula))
    for _ in range(200):
        largest = rng.choice((10, 20, 100, 1000))
        values = {}
        for slot in slots:
            if slot == "n":
                values[slot] = rng.randint(2, 12)
            elif slot == "d":
                values[slot] = rng.choice((rng.randint(1, 99) / 10, rng.randint(1, 9999) / 100, rng.randint(1, 19) / 2))
            elif slot == "p":
                values[slot] = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 75, rng.randint(1, 99)))
            elif slot == "s":
                values[slot] = rng.randint(1, 20) ** 2
            else:
                values[slot] = rng.randint(1, largest)
        result = calculate(formula.format(**values))
        if not result.startswith(("error", "-")) and ("/" not in formula or len(result) <= 6):
            break
    return values


def words_of(number: int) -> str:
    """An English number word for 0 to 999,999."""
    if number < 20:
        return calculator.ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return calculator.TENS[tens - 2] + (f"-{calculator.ONES[ones]}" if ones else "")
    scale, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    count, rest = divmod(number, scale)
    joint = " and " if rest and scale == 100 else " "
    return f"{words_of(count)} {name}" + (joint + words_of(rest) if rest else "")


@cache
def foreign_words() -> tuple[dict, dict]:
    """({language: number words from 0 to 100}, {language: {sign: word}}) as the calculator reads them."""
    path = Path(calculator.__file__).with_name("calculator_words.toml")
    words = tomllib.loads(path.read_text(encoding="utf-8"))
    return words["numbers"], words["languages"]


# ── expressions ──────────────────────────────────────────────────────────────────────────────────────────────────────

SIGNS = ("+", "+", "+", "-", "-", "-", "*", "*", "x", "×", "/", "÷", "−", "X", "·", ":")
OPERATOR_WORDS = ("plus", "minus", "times", "multiplied by", "divided by", "over", "plus", "minus", "times")


def join(rng: random.Random, *parts: str) -> str:
    """Parts of an expression with blanks between all or none of them."""
    return (" " if rng.random() < 0.5 else "").join(parts)


def draw_expression(rng: random.Random) -> str:
    """An expression as people write it. 1 in 60 divides by zero."""
    [form] = rng.choices(tuple(FORMS), weights=tuple(FORMS.values()))
    return form(rng)


def two_numbers(rng: random.Random) -> str:
    return join(rng, str(draw_whole(rng)), rng.choice(SIGNS), str(draw_whole(rng)))


def even_quotient(rng: random.Random) -> str:
    divisor, quotient = rng.randint(2, 30), rng.randint(1, 40)
    operator = rng.choice(("/", "/", "÷", " divided by ", " divided by ", " over ", ":"))
    if rng.random() >= 0.5:
        operator = f" {operator.strip()} "
    return f"{divisor * quotient}{operator}{divisor}"


def large_numbers(rng: random.Random) -> str:
    a, b = draw_whole(rng, 13), draw_whole(rng, 10)
    if rng.random() < 0.25:
        a, b = 10 ** rng.randint(3, 9), 10 ** rng.randint(2, 9)
    if rng.random() < 0.3:
        a, b = int(str(rng.randint(1, 9)) * rng.randint(2, 9)), int(str(rng.randint(1, 9)) * rng.randint(2, 9))
    if rng.random() < 0.2:
        return join(rng, f"{a:,}", rng.choice("+-*"), f"{b:,}")
    return join(rng, str(a), rng.choice(SIGNS[:12]), str(b))


def operator_word(rng: random.Random) -> str:
    operator = rng.choice(OPERATOR_WORDS)
    a, b = draw_whole(rng), draw_whole(rng)
    if operator in ("divided by", "over"):
        b = rng.randint(2, 20)
        a = b * rng.randint(1, 60)
    return f"{a} {operator} {b}"


def number_words(rng: random.Random) -> str:
    a, b = (rng.choice((rng.randint(0, 20), rng.randint(0, 100), rng.randint(0, 999))) for _ in range(2))
    operator = rng.choice(OPERATOR_WORDS[:4])
    left, right = words_of(a), words_of(b)
    if rng.random() < 0.3:
        left, right = rng.choice(((str(a), right), (left, str(b)), (left.replace("-", " "), right.replace("-", " "))))
    return f"{left} {operator} {right}"


def foreign(rng: random.Random) -> str:
    numbers, languages = foreign_words()
    language = rng.choice(tuple(languages))
    operator = rng.choice(tuple(languages[language].values()))
    if rng.random() < 0.5:
        return f"{draw_whole(rng, 3)} {operator} {draw_whole(rng, 3)}"
    return f"{rng.choice(numbers[language])} {operator} {rng.choice(numbers[language])}"


def chain(rng: random.Random) -> str:
    words = rng.random() < 0.2
    parts = [str(draw_whole(rng, 3))]
    same = rng.choice("+-*")
    for _ in range(rng.choice((2, 2, 3))):
        operator = same if rng.random() < 0.4 else rng.choice("+-*/")
        if words:
            operator = rng.choice(("plus", "minus", "times"))
        parts += [operator, parts[0] if rng.random() < 0.2 else str(draw_whole(rng, 3))]
    return " ".join(parts) if words else join(rng, *parts)


def brackets(rng: random.Random) -> str:
    a, b, c, d = (str(draw_whole(rng, 2)) for _ in range(4))
    first, second, third = (rng.choice("+-*") for _ in range(3))
    return rng.choice(
        (
            f"({join(rng, a, first, b)}){second}{c}",
            f"({join(rng, a, first, b)}) {second} {c}",
            f"{a} {second} ({join(rng, b, first, c)})",
            f"{a}{second}({join(rng, b, first, c)})",
            f"({a} {first} {b}) {second} ({c} {third} {d})",
            f"({a}{first}{b}){second}({c}{third}{d})",
            f"(({a}{first}{b}){second}{c}){third}{d}",
        )
    )


def decimal(rng: random.Random) -> str:
    return f"{draw_whole(rng, 3)}.{rng.randint(1, 99):02d}" if rng.random() < 0.5 else f"{rng.randint(1, 999) / 10:g}"


def decimals(rng: random.Random) -> str:
    a = decimal(rng)
    b = decimal(rng) if rng.random() < 0.7 else str(draw_whole(rng, 2))
    if rng.random() < 0.1:
        a, b = a.replace(".", ","), b.replace(".", ",")
    if rng.random() < 0.25:
        return f"{a} {rng.choice(OPERATOR_WORDS)} {b}"
    if rng.random() < 0.15:
        return f"${a} {rng.choice('+-')} ${b}"
    return join(rng, a, rng.choice("++--*/×x"), b)


def percentages(rng: random.Random) -> str:
    p = rng.choice((5, 10, 15, 20, 25, 30, 50, 75, rng.randint(1, 99)))
    a = draw_whole(rng)
    sign = rng.choice(("%", "%", "%", " percent", " per cent", " %"))
    if rng.random() < 0.2:
        return f"{a} {rng.choice(('+', '-', 'plus', 'minus'))} {p}%"
    return f"{p}{sign} of {a}"


def powers(rng: random.Random) -> str:
    base, exponent = rng.randint(2, 20), rng.randint(2, 10)
    form = rng.choice(
        ("{}^{}", "{}^{}", "{} ^ {}", "{}**{}", "{} to the power of {}", "{} to the power {}", "^2", "^3")
    )
    if form == "^2":
        return f"{draw_whole(rng, 2)}{rng.choice((' squared', ' squared', '²', '^2'))}"
    if form == "^3":
        return f"{base}{rng.choice((' cubed', '³', '^3'))}"
    return form.format(base, exponent)


def roots(rng: random.Random) -> str:
    n = rng.choice((rng.randint(1, 30) ** 2, rng.randint(1, 30) ** 2, draw_whole(rng, 3)))
    form = rng.choice(("square root of {}", "the square root of {}", "sqrt({})", "sqrt {}", "√{}", "root of {}"))
    return form.format(n)


def fractions(rng: random.Random) -> str:
    n = rng.choice((2 * rng.randint(1, 500), draw_whole(rng, 4)))
    words = "half of", "half of", "double", "twice", "a third of", "a quarter of", "three quarters of", "triple"
    return f"{rng.choice(words)} {n}" if rng.random() < 0.8 else f"{rng.randint(1, 9)}/{rng.randint(2, 9)} of {n}"


def negatives(rng: random.Random) -> str:
    a, b = draw_whole(rng, 3), draw_whole(rng, 3)
    form = rng.choice(("-{} + {}", "{} - -{}", "-{} * {}", "{} + -{}", "-{}-{}", "{} * -{}", "minus {} plus {}"))
    if rng.random() < 0.5:
        return f"{min(a, b)}{rng.choice(('-', ' - ', ' minus '))}{max(a, b)}"
    return form.format(a, b)


def by_zero(rng: random.Random) -> str:
    return f"{draw_whole(rng)}{rng.choice(('/', ' / ', ' divided by ', ' ÷ ', ' over '))}0"


def remainder(rng: random.Random) -> str:
    return f"{draw_whole(rng, 3)} {rng.choice(('mod', 'modulo', '%'))} {rng.randint(2, 30)}"


def unknown_word(rng: random.Random) -> str:
    """No sum: the calculator answers with an error."""
    word = rng.choice((made_up_word(rng), rng.choice(("x", "y", "banana", "cheese", "my age", "infinity", "n", "abc"))))
    return f"{word} {rng.choice(('plus', '+', '-', 'times', '*', '/'))} {draw_whole(rng, 2)}"


FORMS = {
    two_numbers: 26,
    even_quotient: 7,
    large_numbers: 13,
    operator_word: 11,
    number_words: 10,
    foreign: 6,
    chain: 7,
    brackets: 7,
    decimals: 8,
    percentages: 7,
    powers: 6,
    roots: 3,
    fractions: 4,
    negatives: 4,
    by_zero: 2,
    remainder: 1,
    unknown_word: 2,
}
"""How an expression is written, and how often."""
