"""Reward of the countdown game: reach a target from numbers that are each used exactly once."""

from __future__ import annotations

from collections import Counter
from numbers import Integral, Real
from typing import Any

from ..recipes.registry import SLOTS
from .expressions import ExpressionError, parse_expression
from .extraction import Marked, Rules, extract_answer
from .verdicts import LogExtra, RewardFunction, Verdict, check_share, column_error, report, text_of


@SLOTS["reward"].register
def countdown(*, extract: Marked = "gsm8k_hash", rules: Rules = 1, partial: float = 0.0) -> RewardFunction:
    """1 for an expression that uses every number of column `numbers` exactly once and equals column `target`.

    `extract` and `rules` (their version) say where the answer stands. `partial`, in [0, 1), is the value of an
    expression that uses the numbers exactly once but misses the target. Exact rational arithmetic; `+ - * /`, unary
    minus and parentheses only. Outcomes: ok, wrong (also: other numbers, division by zero), unparsable (no answer, or
    no expression).
    """
    check_share("countdown", "partial", partial)

    def countdown_reward(
        completions: list[Any], numbers: list[Any], target: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float | None]:
        rows = zip(completions, numbers, target, strict=True)
        return report([judge_countdown(text_of(text), n, t, extract, partial, rules) for text, n, t in rows], log_extra)

    return countdown_reward


def judge_countdown(
    text: str, numbers: Any, target: Any, extract: Marked = "gsm8k_hash", partial: float = 0.0, rules: Rules = 1
) -> Verdict:
    """Judge one completion; raises RewardError when the row's `numbers` or `target` are not whole numbers."""
    if numbers is None or target is None:
        return Verdict()
    if isinstance(numbers, str) or not hasattr(numbers, "__iter__"):
        raise column_error("countdown", "numbers", numbers, "which is not a list of whole numbers")
    given, goal = Counter(_whole("numbers", number) for number in numbers), _whole("target", target)
    answer = extract_answer(text, extract, rules)
    if answer is None:
        return Verdict(0.0, "unparsable")
    try:
        expression = parse_expression(answer)
    except ExpressionError:
        return Verdict(0.0, "unparsable", answer)
    if Counter(expression.numbers) != given or expression.value is None:
        return Verdict(0.0, "wrong", answer)
    return Verdict(1.0, "ok", answer) if expression.value == goal else Verdict(partial, "wrong", answer)


def _whole(column: str, value: Any) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer():
        return int(float(value))  # data frames turn columns with a null into floats
    raise column_error("countdown", column, value, "which is not a whole number")
