r"""d1's rewards as published, defects included, for comparison with its numbers; train with our own instead.

Source: d1 (Zhao et al. 2025), `diffu-grpo/reward_func.py` and `math500_utils.py` of dllm-reasoning/d1, with Will
Brown's GRPO demo and Hendrycks et al.'s MATH behind them. They run in the pool, for their patterns can take minutes.
Known defects, none of which our own rewards share:

* `d1_gsm8k`: an answer counts when it is the same text (`1,000` or `$18` are wrong); only `isdigit` texts are numbers;
  characters behind the tags cost 0.001 each, and where no line end follows `</answer>`, the whole text is charged.
* `d1_math`: the test for a box looks for a backspace, so the form is worth 0.75 or 0.25 whatever is boxed.
* `d1_countdown`: any answer tag is worth 0.1; powers and floor division are taken.
* `d1_sudoku`: given cells are not looked at, one of several solutions is right, and a constant digit scores 0.25.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

from ..recipes.registry import SLOTS
from .verdicts import LogExtra, LogMetric, RewardFunction, isolated, text_of

MAX_CHARACTERS = 256
LARGEST = 1e12
_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_ANSWERS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def _reported(parts: list[dict[str, float]], right: list[bool], name: str, log: Any, metric: Any) -> list[float]:
    """Log every component's mean and the outcomes, and return the sums."""
    if metric is not None:
        for key in parts[0] if parts else ():
            metric(f"{name}/{key}", sum(part[key] for part in parts) / len(parts))
    if log is not None:
        log("outcome", ["ok" if good else "wrong" for good in right])
    return [sum(part.values()) for part in parts]


@SLOTS["reward"].register
@isolated()
def d1_gsm8k(*, dotall: bool = False) -> RewardFunction:
    """d1's sum of five for gsm8k as published: tags counted, soft and strict format, digits, and twice correctness.

    Column `answer` holds the number as text. `dotall` lets the formats span lines, which d1's later revisions do.
    """
    flags = re.DOTALL if dotall else re.RegexFlag(0)

    def d1_gsm8k_reward(
        completions: list[Any],
        answer: list[str],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **_: Any,
    ) -> list[float]:
        parts = []
        for text, gold in zip(map(text_of, completions), answer, strict=True):
            found = text.split("<answer>")[-1].split("</answer>")[0].strip()
            parts.append({**form_of(text, flags), "int": 0.5 * found.isdigit(), "correct": 2.0 * (found == gold)})
        right = [part["correct"] > 0 for part in parts]
        return _reported(parts, right, "d1_gsm8k", log_extra, log_metric)

    return d1_gsm8k_reward


def form_of(text: str, flags: re.RegexFlag) -> dict[str, float]:
    """Return d1's three rewards for tags."""
    soft = re.match(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", text, flags)
    strict = re.match(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$", text, flags)
    once = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    count = sum(0.125 for tag in once if text.count(tag) == 1)
    if text.count("\n<answer>\n") == 1:
        count -= 0.001 * len(text.rpartition("\n</answer>\n")[2])
    if text.count("\n</answer>") == 1:
        count -= 0.001 * (len(text.rpartition("\n</answer>")[2]) - 1)
    return {"xmlcount": count, "soft_format": 0.5 * bool(soft), "strict_format": 0.5 * bool(strict)}


@SLOTS["reward"].register
@isolated()
def d1_math() -> RewardFunction:
    r"""d1's sum of two for MATH as published: twice equality of the last boxes' texts, and the tags' 0.75 or 0.25.

    Column `answer` holds the solution with its \boxed{}.
    """

    def d1_math_reward(
        completions: list[Any],
        answer: list[str],
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **_: Any,
    ) -> list[float]:
        parts = []
        for text, solution in zip(map(text_of, completions), answer, strict=True):
            tagged = "<answer>" in text
            found, gold = _last_box(text), _last_box(solution)
            same = stripped(text if found is None else found) == stripped(solution if gold is None else gold)
            parts.append({"correct": 2.0 * same, "format": 0.75 if tagged else 0.25})
        return _reported(parts, [part["correct"] > 0 for part in parts], "d1_math", log_extra, log_metric)

    return d1_math_reward


def _last_box(text: str) -> str | None:
    """Return the braces of the last box, which must balance; escaped braces count."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0 and text[index] == "}":
            return text[start + len(r"\boxed{") : index]
    return None


def stripped(text: str) -> str:
    """Return an answer as Hendrycks et al.'s comparison for MATH reads it."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for gone in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(gone, "")
    text = text.partition("\\text{ ")[0].replace("\\%", "").replace("%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = f"0{text}" if text.startswith(".") else text
    left, equals, right = text.partition("=")
    text = right if equals and len(left) <= 2 and "=" not in right else text
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])([^{])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac([^{])(?=\{)", r"\\frac{\1}", text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


@SLOTS["reward"].register
@isolated()
def d1_countdown() -> RewardFunction:
    """d1's reward for countdown as published: 1 when the last answer tag reaches the target, 0.1 for any tag, else 0.

    Columns `numbers` and `target`. The expression is walked, not evaluated: towers of powers are worth 0.1 here, where
    the published code hangs.
    """

    def d1_countdown_reward(
        completions: list[Any], numbers: list[Any], target: list[Any], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float]:
        values = [
            _countdown(text_of(text), given, goal)
            for text, given, goal in zip(completions, numbers, target, strict=True)
        ]
        return _reported([{"value": value} for value in values], [v == 1 for v in values], "", log_extra, None)

    return d1_countdown_reward


def _countdown(text: str, numbers: Any, target: Any) -> float:
    found = _ANSWERS.findall(text)
    if not found:
        return 0.0
    equation = found[-1].strip()
    if sorted(int(digits) for digits in re.findall(r"\d+", equation[: 10 * MAX_CHARACTERS])) != sorted(numbers):
        return 0.1
    value = walked(equation)
    return 1.0 if value is not None and abs(value - target) < 1e-5 else 0.1


def walked(equation: str) -> float | None:
    """Return the value that Python gives an arithmetic expression; None where it fails or leaves LARGEST."""
    if len(equation) > MAX_CHARACTERS or not re.fullmatch(r"[\d+\-*/().\s]+", equation):
        return None
    try:
        value = _value(ast.parse(equation, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, KeyError):
        return None
    return value if math.isfinite(value) else None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: float = node.value  # type: ignore[assignment]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = _value(node.left), _value(node.right)
        if abs(base) > 1 and abs(exponent) * math.log10(abs(base)) > math.log10(LARGEST):
            raise ValueError("too large")
        value = float(base) ** exponent if exponent < 0 or base < 0 else base**exponent
        if isinstance(value, complex):
            raise ValueError("no real number")
    elif isinstance(node, ast.BinOp):
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("no arithmetic")
    if abs(value) > LARGEST:
        raise ValueError("too large")
    return value


@SLOTS["reward"].register
@isolated()
def d1_sudoku() -> RewardFunction:
    """d1's reward for 4x4 sudoku as published: the share of blank cells with the digit of column `solution`.

    Columns `puzzle` and `solution`, 16 digits each. The digits of the last answer tag are cut to 16, or filled with 0.
    """

    def d1_sudoku_reward(
        completions: list[Any], puzzle: list[str], solution: list[str], log_extra: LogExtra | None = None, **_: Any
    ) -> list[float]:
        values = []
        for text, clues, wanted in zip(completions, puzzle, solution, strict=True):
            found = _ANSWERS.findall(text_of(text))
            digits = "".join(c for c in found[-1] if c.isdigit())[:16] if found else ""
            blanks = [cell for cell in range(16) if clues[cell] == "0"]
            same = sum(digits.ljust(16, "0")[cell] == wanted[cell] for cell in blanks)
            values.append(same / len(blanks) if digits and blanks else 0.0)
        return _reported([{"value": value} for value in values], [v == 1 for v in values], "", log_extra, None)

    return d1_sudoku_reward
