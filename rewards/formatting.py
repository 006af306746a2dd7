"""Rewards for the form of a completion alone; they report no outcome code, which is for correctness rewards."""

from __future__ import annotations

from typing import Any

from ..recipes.registry import SLOTS
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
