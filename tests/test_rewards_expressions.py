"""The expression parser: exact values of what it takes, and that nothing else passes (hand-computed tables)."""

from __future__ import annotations

import time
import warnings
from fractions import Fraction

import pytest

from unmask.rewards.expressions import MAX_CHARACTERS, MAX_DEPTH, MAX_MAGNITUDE, ExpressionError, parse_expression

VALUES = [
    ("7", Fraction(7), (7,)),
    ("3*8-5", Fraction(19), (3, 8, 5)),
    (" 3 * 8\t- 5 ", Fraction(19), (3, 8, 5)),
    ("3-8-5", Fraction(-10), (3, 8, 5)),  # left to right
    ("3-(8-5)", Fraction(0), (3, 8, 5)),
    ("2+3*4", Fraction(14), (2, 3, 4)),  # precedence
    ("12/4/3", Fraction(1), (12, 4, 3)),
    ("1/3+1/3+1/3", Fraction(1), (1, 3, 1, 3, 1, 3)),  # 0.999... in floats of some orders
    ("8/(3-8/3)", Fraction(24), (8, 3, 8, 3)),
    ("7/2", Fraction(7, 2), (7, 2)),
    ("-3+8", Fraction(5), (3, 8)),
    ("--3", Fraction(3), (3,)),
    ("8--3", Fraction(11), (8, 3)),
    ("((((3))))", Fraction(3), (3,)),
    ("1/0", None, (1, 0)),
    ("3*8/(5-5)+2", None, (3, 8, 5, 5, 2)),  # the literals behind the division are still listed
    ("-(1/0)", None, (1, 0)),
    ("0/1", Fraction(0), (0, 1)),
    ("1000000*1000000", Fraction(MAX_MAGNITUDE), (10**6, 10**6)),
]

REFUSED = [
    "",
    "   ",
    "3*8-5=19",
    "__import__('os')",
    "__import__('os').system('true')",
    "exec('1')",
    "open",
    "x+1",
    "9**9**9**9",
    "2**3",
    "7//2",
    "7%2",
    "1<<2",
    "~1",
    "+3",
    "3 8",
    "3(8)",
    "(3)(8)",
    "3,8",
    "()",
    "(",
    "3*",
    "*3",
    "3)",
    "03",
    "1_000",
    "0x10",
    "0b1",
    "1e3",
    "1.5",
    "1.",
    "1j",
    "٣+٤",  # Arabic-Indic digits
    "３*８",  # full-width digits
    "²",
    "½",
    "3×8",
    "3−8",
    "3\n*8",
    "1if 1else 2",
    "1 if 1 else 2",
    "lambda: 1",
    "[1]",
    "'1'",
    "True",
    "1#2",
    "3\\8",
    "3\x008",
    "1000000*1000001",  # past MAX_MAGNITUDE
    "1/1000000/1000001",  # the denominator counts too
    "9" * 13,
    "9" * 200,
    "(" * 10_000 + "1" + ")" * 10_000,
    "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
    "-" * 255 + "1",
    "-" * 100_000 + "1",
    "1+" * MAX_DEPTH + "1",
    "1" + "+1" * 10_000,
    "1" + " " * MAX_CHARACTERS + "+1",
]


@pytest.mark.parametrize(("text", "value", "numbers"), VALUES)
def test_value_and_literals(text: str, value: Fraction | None, numbers: tuple[int, ...]) -> None:
    parsed = parse_expression(text)
    assert (parsed.value, parsed.numbers) == (value, numbers)


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: ascii(text[:24]))
def test_refuses_everything_else_without_warning(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ExpressionError):
            parse_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH,
        "1+" * (MAX_DEPTH - 1) + "1",
        "-" * (MAX_DEPTH - 1) + "1",
        "1" + " " * (MAX_CHARACTERS - 3) + "+1",
    ],
    ids=["parentheses", "chain", "minus", "length"],
)
def test_limits_are_inclusive(text: str) -> None:
    assert parse_expression(text).value in (1, -1, 2, MAX_DEPTH)


def test_hostile_text_costs_no_time() -> None:
    hostile = ["9**9**9**9", "(" * 100_000, "9" * 100_000, "-" * 100_000, "1+" * 100_000 + "1", "1/" * 120 + "9"]
    start = time.thread_time()  # of this thread: the machine may have other work
    for text in hostile:
        with pytest.raises(ExpressionError):
            parse_expression(text)
    assert time.thread_time() - start < 0.5
