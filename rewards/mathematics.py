"""Rewards for numeric answers."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from ..recipes.registry import SLOTS
from .extraction import Extract, Rules, extract_answer
from .verdicts import LogExtra, RewardFunction, Verdict, column_error, report, text_of

MAX_CHARACTERS = 64
_NUMBER = re.compile(r"([-+]?)\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)\.?")


def parse_number(text: str) -> Fraction | None:
    """Return the decimal number that is all of `text` (`-3`, `1,250`, `$18`, `0.50`, `7.`) exactly; None otherwise."""
    match = _NUMBER.fullmatch(text.strip()) if len(text) <= MAX_CHARACTERS else None
    if match is None:
        return None
    magnitude = Fraction(match.group(2).replace(",", ""))
    return -magnitude if match.group(1) == "-" else magnitude


@SLOTS["reward"].register
def arithmetic(*, extract: Extract = "gsm8k_hash", rules: Rules = 1) -> RewardFunction:
    """1 for an answer equal to the number in column `answer`, compared as exact decimals, 0 otherwise.

    `extract` and `rules` (their version) say where the answer stands. Outcomes: ok, wrong, unparsable (no answer, or
    not a number).
    """

    def arithmetic_reward(
        completions: list[Any], answer: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float | None]:
        rows = zip(completions, answer, strict=True)
        return report([judge_arithmetic(text_of(text), gold, extract, rules) for text, gold in rows], log_extra)

    return arithmetic_reward


def judge_arithmetic(text: str, gold: Any, extract: Extract = "gsm8k_hash", rules: Rules = 1) -> Verdict:
    """Judge one completion; raises RewardError when the row's `answer` is not a number."""
    if gold is None:
        return Verdict()
    wanted = _gold(gold)
    if wanted is None:
        raise column_error("arithmetic", "answer", gold, "which is not a number")
    answer = extract_answer(text, extract, rules)
    found = None if answer is None else parse_number(answer)
    if found is None:
        return Verdict(0.0, "unparsable", answer)
    return Verdict(1.0, "ok", answer) if found == wanted else Verdict(0.0, "wrong", answer)


def _gold(value: Any) -> Fraction | None:
    if isinstance(value, str):
        return parse_number(value)
    try:
        return Fraction(str(value))  # through its decimal text: the float 0.1 means one tenth
    except ValueError:  # nan, inf, True, a list
        return None
