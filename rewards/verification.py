"""The reward `math`: answers compared by math-verify, in a process that can be killed."""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

from ..recipes.registry import SLOTS
from .extraction import Extract, Rules, extract_answer
from .notation import normalise, too_large
from .verdicts import LogExtra, RewardFunction, Verdict, column_error, isolated, report, text_of

# A side of an equation that only names what the other side says: x, x_1, f(x), P(A), \text{Area}.
_NAME = re.compile(
    r"\([a-z](?:\s*,\s*[a-z])+\)|(?:[a-zA-Z]|\\[a-zA-Z]+|\\text\{[^{}]*\})(?:_\{?\w+\}?)?'?(?:\s*\([^()=]*\))?"
)
_CONSTANTS = (r"\pi", r"\infty", "e", "i")
_BASE = re.compile(r"\d_\{?(\d+)\}?$")
# Numbers that are compared without math-verify, which rounds to six decimals and takes ten milliseconds.
_DECIMAL = re.compile(r"-?(?:\d{1,15}|\d{1,9}\.\d{1,6})")
_RATIONAL = re.compile(r"(-?)(?:\\[dt]?frac\{(\d{1,15})\}\{(\d{1,15})\}|(\d{1,15})(?:/(\d{1,15}))?)")
_EQUALS = re.compile(r"(?<![\\<>!=:])=(?!=)")


# One answer of each kind: the parser learns its grammar from what it reads, each construction a tenth of a second once.
WARM = (
    *("1", r"\frac{1}{2}", "x=5", r"\{1,2\}", "(1,2]", r"\begin{pmatrix}1\\2\end{pmatrix}", r"50\%", "x^2+1", "((2x))"),
    *("a^3+b^3=7", "y_{2}-y_{3}", "[0.25,3)", r"\left(\begin{array}{cc}5&6\\7&8\end{array}\right)", r"(\frac34,-2)"),
    *(r"\cos^2 t\sin t", r"\log_3 9", r"{3 \over 4}", r"-2\le t<1", r"\sqrt[3]{2}\pi", "|a|+3!", "-3x(2-x)", "11_{7}"),
)


def warm() -> None:
    """Import the libraries and use them once, in the nursery: every worker is forked with them ready."""
    for gold in WARM:
        compare(gold + r" \cdot 1", gold)


@SLOTS["reward"].register
@isolated(preload=("unmask.rewards.verification:warm",))
def math_(*, extract: Extract = "boxed", rules: Rules = 1) -> RewardFunction:
    """1 for an answer equal to column `answer` (LaTeX, text or a number) as mathematics, 0 otherwise; by math-verify.

    `extract` and `rules` (their version, and that of how answers are read) say where the answer stands. Outcomes: ok,
    wrong, unparsable (no answer, one that is no mathematics, or one longer or larger than any answer). It runs in the
    pool: an answer that takes too long has outcome timeout and is left out.
    """

    def math_reward(
        completions: list[Any], answer: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float | None]:
        rows = zip(completions, answer, strict=True)
        return report([judge_math(text_of(text), gold, extract, rules) for text, gold in rows], log_extra)

    return math_reward


def judge_math(text: str, gold: Any, extract: Extract = "boxed", rules: Rules = 1) -> Verdict:
    """Judge one completion; raises RewardError when the row's `answer` is neither text nor a number."""
    if gold is None:
        return Verdict()
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise column_error("math", "answer", gold, "which is neither text nor a number")
    wanted = normalise(str(gold))
    if not wanted:
        raise column_error("math", "answer", gold, "which is empty")
    answer = extract_answer(text, extract, rules)
    if answer is None or too_large(answer):
        return Verdict(0.0, "unparsable", answer and answer[:80])
    equal = compare(normalise(answer), wanted)
    outcome = "unparsable" if equal is None else "ok" if equal else "wrong"
    return Verdict(float(bool(equal)), outcome, answer)


def compare(answer: str, gold: str) -> bool | None:
    """Tell whether two normalised answers are equal; None when the answer is no mathematics.

    An equation's side that is a mere name is dropped (`x=5` is 5; two different names are not equal). What is then
    still a chain of equations is right when each of its sides is, so that `6=5` is neither 6 nor 5. Brackets and bases
    are compared as they are written: `(1,2)`, `[1,2]` and `{1,2}` differ, and so do `12_8` and `12_9`. Percents equal
    percents, a number as it stands, and a number a hundred times smaller.
    """
    if _squeezed(answer) == _squeezed(gold):
        return True
    bases = [_BASE.search(text) for text in (answer, gold)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    share, gold_share = _percent(answer), _percent(gold)
    if share is not None and gold_share is not None:
        return _compare(share, gold_share)
    if share is not None:
        return _either(_compare(share, gold), _compare(rf"\frac{{{share}}}{{100}}", gold))
    if gold_share is not None:
        return _either(_compare(answer, gold_share), _compare(answer, rf"\frac{{{gold_share}}}{{100}}"))
    return _compare(answer, gold)


def _percent(text: str) -> str | None:
    """Return what stands before a final percent sign; None where there is none."""
    number = re.sub(r"\s*(?:\\?%|\\text\{\s*percent\s*\})$", "", text)
    return None if number == text else number


def _either(one: bool | None, other: bool | None) -> bool | None:
    return None if one is None and other is None else bool(one or other)


def _compare(answer: str, gold: str) -> bool | None:
    (name, sides), (gold_name, gold_sides) = _sides(answer), _sides(gold)
    if name and gold_name and _squeezed(name) != _squeezed(gold_name):
        return False
    if len(gold_sides) > 1:
        return _equal(answer, gold)
    verdicts = [_equal(side, gold_sides[0]) for side in sides]
    return None if None in verdicts else all(verdicts)


def _sides(text: str) -> tuple[str | None, list[str]]:
    """Return the name that an equation defines, if any, and its other sides."""
    sides = [side.strip() for side in _EQUALS.split(text)]
    if len(sides) == 1 or not all(sides):
        return None, [text]
    named = [side for side in sides if _NAME.fullmatch(side) and side not in _CONSTANTS]
    others = [side for side in sides if side not in named]
    return (named[0], others) if len(named) == 1 and others else (None, sides)


def _equal(answer: str, gold: str) -> bool | None:
    if _squeezed(answer) == _squeezed(gold):
        return True
    for read in (_decimal, _rational):
        numbers = read(answer), read(gold)
        if None not in numbers:
            return numbers[0] == numbers[1]
    brackets = _bracket(answer), _bracket(gold)
    if all(brackets) and brackets[0] != brackets[1]:
        return False
    from math_verify import verify

    wanted, found = _parsed(gold), _parsed(answer)
    if not found:
        return None
    return bool(wanted) and verify(list(wanted), list(found), timeout_seconds=None)


def _decimal(text: str) -> Fraction | None:
    """Return a number of at most six decimals; None for anything else."""
    return Fraction(text) if _DECIMAL.fullmatch(text) else None


def _rational(text: str) -> Fraction | None:
    """Return a whole number or a fraction of two; None for anything else."""
    found = _RATIONAL.fullmatch(text)
    if found is None:
        return None
    below = int(found[3] or found[5] or 1)
    return Fraction(int(found[1] + (found[2] or found[4])), below) if below else None


def _bracket(text: str) -> str:
    """Return the kind of brackets around a list; "" where there is no list or there are no brackets."""
    inner = text.replace(r"\left", "").replace(r"\right", "").replace(" ", "")
    pairs = {("(", ")"): "()", ("[", "]"): "[]", (r"\{", r"\}"): "{}", ("(", "]"): "(]", ("[", ")"): "[)"}
    for (opening, closing), kind in pairs.items():
        if inner.startswith(opening) and inner.endswith(closing) and "," in inner:
            return kind if _one_pair(inner) else ""
    return ""


def _one_pair(text: str) -> bool:
    """Tell whether the first bracket of `text` is closed by its last character."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and index < len(text) - 1 and character in ")]}":
            return False
    return True


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    """Return what math-verify reads, without its fallback to a string; () where it reads nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # The caller's process is killed when this takes too long; the library's own alarm needs the main thread.
    for name in ("math_verify.parser", "math_verify.grader", "math_verify.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    boxed = rf"\boxed{{{text}}}"
    return tuple(parse(boxed, extraction_config=targets, fallback_mode="no_fallback", parsing_timeout=None))


def _squeezed(text: str) -> str:
    """Return a text without spaces, \\text wrappers and differences of case, for comparison as words."""
    plain = re.sub(r"\\(?:text|textbf|mathrm|mbox|textit)\s*\{([^{}]*)\}", r"\1", text)
    plain = plain.replace(r"\left", "").replace(r"\right", "").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    words = re.fullmatch(r"[a-zA-Z' -]+", plain)
    return re.sub(r"\s+|\\[,;:! ]", "", plain.casefold() if words and len(plain) > 2 else plain)
