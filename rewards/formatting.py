"""Where the answer stands in a completion: extraction rules, and a reward for writing exactly one answer."""

from __future__ import annotations

import re
from typing import Any, Literal

from ..recipes.registry import SLOTS
from .verdicts import RewardFunction, text_of

Marked = Literal["hash", "answer_tag", "boxed"]
Extract = Literal["hash", "answer_tag", "boxed", "last_number"]

_HASH = re.compile(r"(?<!#)####(?!#)")
_BOXED = re.compile(r"\\boxed\s*\{")
_OPEN, _CLOSE = "<answer>", "</answer>"
# A minus belongs to the number unless it can be read as a subtraction (`7-5` ends with 5, `= -5` with -5).
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


def extract_answer(text: str, rule: Extract) -> str | None:
    r"""Return the answer of `text` without surrounding blanks; None if the rule finds none or an empty one.

    `hash`: the rest of the line after the last `####`. `answer_tag`: what lies between the last `</answer>` and the
    nearest `<answer>` before it. `boxed`: the braces of the last `\boxed{...}`, which must balance (`\{` and `\}` are
    text). `last_number`: the last number in ASCII digits, with thousands commas, decimals and sign.
    """
    answer: str | None
    if rule == "hash":
        answer = _last_hash(text)
    elif rule == "answer_tag":
        answer = _last_tag(text)
    elif rule == "boxed":
        answer = _last_boxed(text)
    else:
        answer = None
        for match in _NUMBER.finditer(text):
            answer = match.group()
    return (answer or "").strip() or None


def _last_hash(text: str) -> str | None:
    marks = [match.end() for match in _HASH.finditer(text)]
    return re.split(r"[\r\n]", text[marks[-1] :], maxsplit=1)[0] if marks else None


def _last_tag(text: str) -> str | None:
    end = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, max(end, 0))
    return text[start + len(_OPEN) : end] if start >= 0 else None


def _last_boxed(text: str) -> str | None:
    marks = [match.end() for match in _BOXED.finditer(text)]
    if not marks:
        return None
    depth, position = 1, marks[-1]
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[marks[-1] : position]
        position += 1
    return None


def has_one_answer(text: str, style: Marked) -> bool:
    """Tell whether `text` marks exactly one answer in `style`, and a non-empty one."""
    if style == "answer_tag":
        once = text.count(_OPEN) == 1 and text.count(_CLOSE) == 1
    else:
        once = len((_HASH if style == "hash" else _BOXED).findall(text)) == 1
    return once and extract_answer(text, style) is not None


@SLOTS["reward"].register
def answer_format(*, style: Marked = "hash") -> RewardFunction:
    r"""1 for exactly one non-empty answer (`#### x`, `<answer>x</answer>` or `\boxed{x}`), 0 otherwise.

    It judges the form alone and reports no outcome code, so it never hides that of a correctness reward.
    """

    def answer_format_reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(has_one_answer(text_of(completion), style)) for completion in completions]

    return answer_format_reward
