"""The calculator against Python's own arithmetic, and against whatever a model may write."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoghost.tasks.everyday_sums import words_of
from nanoghost.tools.calculator import calculate

NUMBERS = st.integers(0, 9999)


@given(NUMBERS, NUMBERS, NUMBERS, st.sampled_from("+-*"), st.sampled_from("+-*"))
@settings(max_examples=100, deadline=None)
def test_whole_numbers_are_the_same_as_in_python(a, b, c, first, second):
    for expression in (f"{a}{first}{b}{second}{c}", f"({a} {first} {b}) {second} -{c}"):
        assert calculate(expression) == str(eval(expression))
    assert calculate(f"{a} × {b} − {c}") == str(a * b - c)


@given(NUMBERS, st.integers(1, 9999))
@settings(max_examples=100, deadline=None)
def test_fractions_have_ten_digits(a, b):
    quotient = Fraction(a, b)
    assert abs(Fraction(calculate(f"{a}/{b}")) - quotient) <= quotient / 10**9
    assert calculate(f"{a}/{b}*{b}") == str(a)  # exact inside


@pytest.mark.parametrize(
    "expression, value",
    [("0.1+0.2", "0.3"), ("007+1", "8"), ("1,000+2", "1002"), ("10÷4", "2.5"), ("--2", "2"), (" 2 * (3 + 4) ", "14"),
     ("100.05+0.05", "100.1")],
)  # fmt: skip
def test_forms_of_numbers(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "9" * 200, "(" * 99, "-" * 99 + "1", "__import__('os')", "1/0", "", "1+", "7//2", "1e999", "()", "1 2",
     "2(3)", "a+1", "[1]*9", "٣+1", "\n", "1.2.3", "(" * 49 + "1" + ")" * 49 + "!"],
)  # fmt: skip
def test_hostile_expressions_are_fast_errors(expression):
    begun = time.perf_counter()
    answer = calculate(expression)
    assert time.perf_counter() - begun < 0.1
    assert answer.startswith("error: ") or expression.startswith("-")


@given(st.text(max_size=40) | st.text("0123456789+-*/(). ", max_size=120))
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_result(text):
    assert isinstance(calculate(text), str)


@pytest.mark.parametrize(
    "expression, value",
    [("2^10", "1024"), ("2**3", "8"), ("7²", "49"), ("2^3^2", "512"), ("2^-2", "0.25"), ("-2^2", "-4"),
     ("sqrt(81)", "9"), ("√2", "1.414213562"), ("8^(1/3)", "2"), ("sqrt(1/4)", "0.5"), ("15% of 80", "12"),
     ("80 - 20%", "64"), ("200 + 10%", "220"), ("50%", "0.5"), ("17 % 5", "2"), ("17 mod 5", "2"),
     ("3,5 + 2,25", "5.75"), ("10:4", "2.5"), ("$1,250.50 + $3", "1253.5"), ("5 apples - 2 apples", "3"),
     ("60 miles * 2.5", "150"), ("12 x -3", "-36")],
)  # fmt: skip
def test_powers_roots_percentages_and_units(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression, value",
    [("nine plus six", "15"), ("half of 50", "25"), ("twice eight", "16"), ("seven squared", "49"),
     ("two hundred and five minus three", "202"), ("three point two five times 2", "6.5"), ("a dozen times 4", "48"),
     ("the square root of sixteen", "4"), ("two to the power of ten", "1024"), ("minus five plus two", "-3"),
     ("treinta y uno por 2", "62"), ("siebenundzwanzig geteilt durch neun", "3"), ("vingt et un fois deux", "42"),
     ("dodici meno sette", "5"), ("dez mais cinco", "15"), ("acht keer acht", "64"), ("twenty percent of 50", "10")],
)  # fmt: skip
def test_words(expression, value):
    assert calculate(expression) == value


@given(st.integers(0, 999_999), st.sampled_from([1, 1000, 10**6]))
@settings(max_examples=200, deadline=None)
def test_english_number_words(number, scale):
    names = {1: "", 1000: " thousand", 10**6: " million"}
    words = words_of(number if scale == 1 else number % 999 + 1) + names[scale]
    assert calculate(words) == str(number if scale == 1 else (number % 999 + 1) * scale)
