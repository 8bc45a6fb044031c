"""A calculator for models: exact arithmetic from text, safe for any text that a model may write."""

import ast
import operator
import re
from fractions import Fraction

MAX_LENGTH = 100
"""Maximum number of characters. There are no powers, so results have no more digits than this: the work is bounded."""

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression as text, or a text that begins with "error: ".

    Exact: decimals are fractions, so 0.1+0.2 is 0.3. Results that are not whole numbers are rounded to 10 digits.
    """
    if len(expression) > MAX_LENGTH:
        return f"error: longer than {MAX_LENGTH} characters"
    text = expression.translate(str.maketrans({"×": "*", "÷": "/", "−": "-"})).strip()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)  # 1,000
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)  # Python does not accept 007
    if not re.fullmatch(r"[0-9.+\-*/() ]+", text):  # not \d, which includes the digits of other scripts
        return "error: only numbers and + - * / ( )"
    try:
        value = _evaluate(ast.parse(text, mode="eval").body, text)
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError):
        return "error: not a sum"
    return str(value) if value.denominator == 1 else f"{float(value):.10g}"


def _evaluate(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant():
            return Fraction(ast.get_source_segment(text, node))  # the digits as written, not rounded to a float
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_evaluate(left, text), _evaluate(right, text))
        case ast.UnaryOp(op, operand) if type(op) in SIGNS:
            return SIGNS[type(op)](_evaluate(operand, text))
    raise ValueError("neither a number nor one of + - * /")
