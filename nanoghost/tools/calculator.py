"""A calculator for models: exact arithmetic from text as people write it, safe for any text that a model may write.

    12*(3+4)     2^10     sqrt(81)     15% of 80     80 - 20%     nine plus six     half of 50     treinta y uno por 2

Words become symbols first (calculator_words.toml), so that a model may copy what the user wrote.
"""

import re
import tomllib
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

MAX_LENGTH = 80
"""Maximum number of characters."""
MAX_DIGITS = 300
"""Powers of more digits are errors, which bounds the work."""

SYMBOLS = str.maketrans(
    {"×": "*", "⋅": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "²": "^2 ", "³": "^3 ", "√": "sqrt "}
)
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
ENGLISH = {word: i for i, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)} | SCALES
WORD = "|".join(sorted(ENGLISH, key=len, reverse=True))
ENGLISH_NUMBER = re.compile(
    rf"\b(?:a\s+(?=hundred|thousand|million))?(?:{WORD})"
    rf"(?:(?:(?:(?<=hundred)|(?<=thousand)|(?<=million))\s+and\s+|-|\s+)(?:{WORD}))*\b"
)
TOKEN = re.compile(r"\d+\.\d+|\.\d+|\d+\.?|sqrt|cbrt|mod|[-+*/^()%]")


class CalculatorError(Exception):
    """An expression without a value; its text says why."""


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text, or a text that begins with "error: ".

    Exact: decimals are fractions, so 0.1+0.2 is 0.3. Results that are not whole numbers are rounded to 10 digits; so
    are roots that are not fractions.
    """
    if len(expression) > MAX_LENGTH:
        return f"error: longer than {MAX_LENGTH} characters"
    try:
        value = Parser(tokens_of(symbols_of(expression))).value()
    except ZeroDivisionError:
        return "error: division by zero"
    except (CalculatorError, RecursionError) as error:
        return f"error: {error}" if isinstance(error, CalculatorError) else "error: too many brackets"
    return format_number(value)


def format_number(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    try:
        return f"{float(value):.10g}"
    except OverflowError:
        return "error: too large"


# ── from words to symbols ────────────────────────────────────────────────────────────────────────────────────────────


def symbols_of(text: str) -> str:
    """The expression in digits and symbols: "half of twenty-four" is "1/2* 24"."""
    text = without_accents(text.lower().translate(SYMBOLS))
    text = re.sub(r"[=?.,;:\s]+$", "", text).replace("**", "^")
    text = re.sub(r"[$€£¥]", "", text)
    text = re.sub(r"(?<![\d.])(\d{1,3}(?:,\d{3})+)(?![\d,])", lambda match: match[0].replace(",", ""), text)  # 1,000
    text = re.sub(r"(?<=\d),(?=\d)", ".", text)  # 3,5
    text = re.sub(r"(?<=[\d)])\s*:\s*(?=[\d(])", "/", text)
    pattern, meanings = phrases()
    text = pattern.sub(lambda match: f" {meanings[match[0]]} ", text)
    text = re.sub(rf"\bpoint((?:\s+(?:{'|'.join(ONES[:10])}))+)\b", decimals, text)
    text = ENGLISH_NUMBER.sub(lambda match: str(english_number(match[0])), text)
    text = re.sub(r"(?<=\d)\s+(?:point\s+|(?=\.\d))", ".", text).replace("..", ".")
    text = re.sub(r"(?<=[\d)])\s*x\s*(?=[\d(.-])", "*", text)
    return re.sub(r"(?<=\d)\s*(?!(?:sqrt|cbrt|mod)\b)[a-z]+(?![a-z\d])", "", text)  # units: 3 apples, 5km


def decimals(match: re.Match) -> str:
    """ "point two five" as ".25"."""
    return "." + "".join(str(ONES.index(word)) for word in match[1].split())


def without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(c for c in decomposed if not unicodedata.combining(c))


@cache
def phrases() -> tuple[re.Pattern, dict[str, str]]:
    """A pattern for the phrases of calculator_words.toml, the longest first, and what each stands for."""
    words = tomllib.loads(Path(__file__).with_name("calculator_words.toml").read_text(encoding="utf-8"))
    meanings = {without_accents(phrase): symbol for symbol, group in words["operators"].items() for phrase in group}
    for numbers in words["numbers"].values():
        for value, phrase in enumerate(numbers):
            phrase = without_accents(phrase)
            if phrase not in ENGLISH:
                meanings.setdefault(phrase, str(value))
    longest_first = sorted(meanings, key=len, reverse=True)
    return re.compile(r"(?<![a-z])(?:" + "|".join(map(re.escape, longest_first)) + r")(?![a-z])"), meanings


def english_number(words: str) -> int:
    """The value of "two hundred and five"."""
    total = below_thousand = 0
    for word in re.findall(WORD, words):
        value = ENGLISH[word]
        if value < 100:
            below_thousand += value
        elif value == 100:
            below_thousand = max(below_thousand, 1) * 100
        else:
            total += max(below_thousand, 1) * value
            below_thousand = 0
    return total + below_thousand


# ── from symbols to a value ──────────────────────────────────────────────────────────────────────────────────────────


def tokens_of(symbols: str) -> Iterator[str]:
    position = 0
    while position < len(symbols):
        if symbols[position].isspace():
            position += 1
        elif match := TOKEN.match(symbols, position):
            yield match[0]
            position = match.end()
        else:
            raise CalculatorError("only numbers and + - * / ^ % ( ) sqrt")


class Parser:
    """Precedence climbing: sums < products < signs < powers < percentages."""

    def __init__(self, tokens: Iterator[str]):
        self.tokens = list(tokens)
        self.position = 0

    def value(self) -> Fraction:
        value, _ = self.sum()
        if self.position < len(self.tokens):
            raise CalculatorError("not a sum")
        return value

    def next_is(self, *tokens: str) -> bool:
        return self.position < len(self.tokens) and self.tokens[self.position] in tokens

    def take(self) -> str:
        if self.position == len(self.tokens):
            raise CalculatorError("not a sum")
        self.position += 1
        return self.tokens[self.position - 1]

    def sum(self) -> tuple[Fraction, bool]:
        """(value, whether it is a percentage alone)"""
        value, is_percentage = self.product()
        while self.next_is("+", "-"):
            sign = 1 if self.take() == "+" else -1
            term, is_percentage = self.product()
            value += sign * (value * term if is_percentage else term)  # 80 - 20% is 64
            is_percentage = False
        return value, is_percentage

    def product(self) -> tuple[Fraction, bool]:
        value, is_percentage = self.signed()
        while self.next_is("*", "/", "mod") or self.is_remainder():
            operator = self.take()
            factor, _ = self.signed()
            is_percentage = False
            if operator == "*":
                value *= factor
            elif operator == "/":
                value /= factor
            else:
                value %= factor
        return value, is_percentage

    def is_remainder(self) -> bool:
        """Whether the next "%" stands before a number, as in 17 % 5. After a number, it is a percentage."""
        following = self.tokens[self.position + 1 : self.position + 2]
        return self.next_is("%") and bool(following) and following[0][0] in "0123456789.("

    def signed(self) -> tuple[Fraction, bool]:
        if self.next_is("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value, is_percentage = self.signed()
            return sign * value, is_percentage
        return self.power()

    def power(self) -> tuple[Fraction, bool]:
        base, is_percentage = self.postfix()
        if self.next_is("^"):
            self.take()
            exponent, _ = self.signed()  # from the right: 2^3^2 is 2^9
            return power(base, exponent), False
        return base, is_percentage

    def postfix(self) -> tuple[Fraction, bool]:
        value, is_percentage = self.atom(), False
        while self.next_is("%") and not self.is_remainder():
            self.take()
            value, is_percentage = value / 100, True
        return value, is_percentage

    def atom(self) -> Fraction:
        token = self.take()
        if token == "(":
            value, _ = self.sum()
            if self.take() != ")":
                raise CalculatorError("not a sum")
            return value
        if token in ("sqrt", "cbrt"):
            return power(self.atom(), Fraction(1, 2 if token == "sqrt" else 3))
        if token[0] not in "0123456789.":
            raise CalculatorError("not a sum")
        return Fraction(token.rstrip("."))  # the digits as written, not rounded to a float


def power(base: Fraction, exponent: Fraction) -> Fraction:
    """Exact for whole exponents and for roots that are fractions; else rounded."""
    digits = len(str(max(abs(base.numerator), base.denominator)))
    if abs(exponent) * digits > MAX_DIGITS or digits > MAX_DIGITS:
        raise CalculatorError("too large")
    if exponent.denominator == 1:
        return base**exponent.numerator
    if base < 0:
        raise CalculatorError("no root of a negative number")
    root = Fraction(*(round(part ** (1 / exponent.denominator)) for part in base.as_integer_ratio()))
    if root**exponent.denominator == base:
        return root**exponent.numerator
    return Fraction(float(base) ** float(exponent))
