"""Rewards for the form of a completion alone; they report no outcome code, which is for correctness rewards."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from ..recipes.registry import SLOTS, RecipeError
from .extraction import BOXED, CLOSE, HASH, OPEN, Marked, extract_answer
from .verdicts import RewardFunction, text_of


def has_one_answer(text: str, style: Marked) -> bool:
    """Tell whether `text` marks exactly one answer in `style`, and a non-empty one."""
    if style == "answer_tag":
        once = text.count(OPEN) == 1 and text.count(CLOSE) == 1
    else:
        once = len((HASH if style == "gsm8k_hash" else BOXED).findall(text)) == 1
    return once and extract_answer(text, style) is not None


@SLOTS["reward"].register
def answer_format(*, style: Marked = "gsm8k_hash") -> RewardFunction:
    r"""1 for exactly one non-empty answer (`#### x`, `<answer>x</answer>` or `\boxed{x}`), 0 otherwise.

    It judges the form alone and reports no outcome code, so it never hides that of a correctness reward.
    """

    def answer_format_reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(has_one_answer(text_of(completion), style)) for completion in completions]

    return answer_format_reward


@SLOTS["reward"].register
def tags(*, names: tuple[str, ...] = ("reasoning", "answer")) -> RewardFunction:
    """1 for a completion that is one `<name>...</name>` after the other, in this order, none of them empty; else 0.

    Each tag stands there exactly once, with nothing but blanks between and around the elements. Line ends inside count
    as any other character.
    """
    if not names or any(not re.fullmatch(r"[A-Za-z_][\w-]*", name) for name in names) or len(set(names)) < len(names):
        raise RecipeError(
            f"rewards.tags.names: {list(names)} must be different names of tags, such as [think, answer]."
        )

    def tags_reward(completions: list[Any], **_: Any) -> list[float]:
        return [float(has_tags(text_of(completion), names)) for completion in completions]

    return tags_reward


def has_tags(text: str, names: tuple[str, ...]) -> bool:
    """Tell whether `text` is made of the elements `names`, each once, in order and not empty."""
    rest = text.strip()
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1 or not rest.startswith(opening):
            return False
        inner, closed, rest = rest.removeprefix(opening).partition(closing)
        if not closed or not inner.strip():
            return False
        rest = rest.lstrip()
    return not rest


@SLOTS["reward"].register
def soft_length(*, limit: int, buffer: int = 0) -> RewardFunction:
    """0 up to `limit - buffer` tokens, then falling linearly to -1 at `limit` and staying there.

    Counts `completion_ids`, EOS included (DAPO's soft overlong punishment, Yu et al. 2025, equation 13).
    """
    if limit < 1 or not 0 <= buffer <= limit:
        raise RecipeError(
            f"rewards.soft_length: limit {limit}, buffer {buffer} must satisfy 0 <= buffer <= limit, limit >= 1."
        )

    def soft_length_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [-over_length(len(ids), limit, buffer) for ids in completion_ids]

    return soft_length_reward


def over_length(length: int, limit: int, buffer: int) -> float:
    """Return how far `length` has gone from `limit - buffer` (0) to `limit` (1)."""
    if length <= limit - buffer:
        return 0.0
    return 1.0 if length >= limit else (length - limit + buffer) / buffer


@SLOTS["reward"].register
def repetition(*, words: int = 4) -> RewardFunction:
    """Minus the share of runs of `words` words that have occurred before in the completion: 0 without any, towards -1.

    Words are what blanks separate; a completion shorter than that has 0.
    """
    if words < 1:
        raise RecipeError(f"rewards.repetition.words: {words} must be at least 1.")

    def repetition_reward(completions: list[Any], **_: Any) -> list[float]:
        return [-repeated_share(text_of(completion).split(), words) for completion in completions]

    return repetition_reward


def repeated_share(words: list[str], size: int) -> float:
    """Return the share of runs of `size` words that have occurred before."""
    runs = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    return 1 - len(runs) / runs.total() if runs else 0.0
