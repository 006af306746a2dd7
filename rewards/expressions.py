"""Arithmetic written by a model, evaluated over rationals by walking its syntax tree; model text is never run."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 256
MAX_DEPTH = 64
MAX_MAGNITUDE = 10**12

# The alphabet is closed before Python's parser sees the text: no names, strings, attributes, floats, hexadecimal or
# underscored literals, no digits outside ASCII. `**` and `//` still pass and are refused as tree nodes.
_ALPHABET = re.compile(r"[0-9+\-*/() \t]+")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class ExpressionError(ValueError):
    """Text that is not an expression of + - * / unary minus, parentheses and whole numbers within the limits."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression: exact value (None where it divides by zero) and its literals from left to right."""

    value: Fraction | None
    numbers: tuple[int, ...]


def parse_expression(text: str) -> Expression:
    """Return the value and the literals of `text`.

    Limits: MAX_CHARACTERS characters, MAX_DEPTH pairs of parentheses and levels of the tree, MAX_MAGNITUDE for the
    numerator and denominator of every literal and every intermediate result. Raises ExpressionError for anything
    else than `+ - * /`, unary minus, parentheses and whole numbers; a division by zero parses, with value None.
    """
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"{len(text)} characters exceed the limit of {MAX_CHARACTERS}.")
    if not _ALPHABET.fullmatch(text):
        raise ExpressionError(f"{text!r:.80} holds characters outside digits, + - * / ( ) and blanks, or is empty.")
    if text.count("(") > MAX_DEPTH:
        raise ExpressionError(f"{text.count('(')} pairs of parentheses exceed the limit of {MAX_DEPTH}.")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ExpressionError(f"{text!r:.80} is not an expression.") from error
    numbers: list[int] = []
    return Expression(_walk(tree.body, 1, numbers), tuple(numbers))


def _walk(node: ast.expr, depth: int, numbers: list[int]) -> Fraction | None:
    """Return the value of `node`, None below a division by zero; append its literals to `numbers`."""
    if depth > MAX_DEPTH:
        raise ExpressionError(f"the expression is nested deeper than {MAX_DEPTH} levels.")
    value: Fraction | None
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        value = Fraction(node.value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        operand = _walk(node.operand, depth + 1, numbers)
        value = None if operand is None else -operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left = _walk(node.left, depth + 1, numbers)
        right = _walk(node.right, depth + 1, numbers)
        undefined = left is None or right is None or (isinstance(node.op, ast.Div) and right == 0)
        value = None if undefined else _OPERATORS[type(node.op)](left, right)  # type: ignore[arg-type]
    else:
        kind = type(getattr(node, "op", node)).__name__
        raise ExpressionError(f"{kind} is not allowed; + - * / unary minus and parentheses are.")
    if value is not None and max(abs(value.numerator), value.denominator) > MAX_MAGNITUDE:
        raise ExpressionError(f"a literal or an intermediate result exceeds {MAX_MAGNITUDE}.")
    return value
