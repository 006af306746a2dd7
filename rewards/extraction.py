"""Where the answer stands in a completion: four rules, each named, and one version of all of them.

A rule is never changed once it is released: what has to change becomes version 2, which a recipe asks for by
`rules: 2`, so that the recipe in an old run's folder keeps meaning what it meant.
"""

from __future__ import annotations

import re
from typing import Literal

Marked = Literal["gsm8k_hash", "answer_tag", "boxed"]
Extract = Literal["gsm8k_hash", "answer_tag", "boxed", "last_number"]
Rules = Literal[1]

HASH = re.compile(r"(?<!#)####(?!#)")
BOXED = re.compile(r"\\boxed\s*\{")
OPEN, CLOSE = "<answer>", "</answer>"
# A minus belongs to the number unless it can be read as a subtraction (`7-5` ends with 5, `= -5` with -5).
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")


def extract_answer(text: str, rule: Extract, rules: Rules = 1) -> str | None:
    r"""Return the answer of `text` without surrounding blanks; None if the rule finds none or an empty one.

    Rules of version 1: `gsm8k_hash`: the rest of the line after the last `####`. `answer_tag`: what lies between the
    last `</answer>` and the nearest `<answer>` before it. `boxed`: the braces of the last `\boxed{...}`, which must
    balance (`\{` and `\}` are text). `last_number`: the last number in ASCII digits, with thousands commas, decimals
    and sign.
    """
    assert rules == 1
    answer: str | None
    if rule == "gsm8k_hash":
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
    marks = [match.end() for match in HASH.finditer(text)]
    return re.split(r"[\r\n]", text[marks[-1] :], maxsplit=1)[0] if marks else None


def _last_tag(text: str) -> str | None:
    end = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(end, 0))
    return text[start + len(OPEN) : end] if start >= 0 else None


def _last_boxed(text: str) -> str | None:
    marks = [match.end() for match in BOXED.finditer(text)]
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
