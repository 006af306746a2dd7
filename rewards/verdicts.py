"""What a rule-based reward says about one completion, and how it tells the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..recipes.registry import RecipeError

OUTCOMES = ("ok", "wrong", "unparsable", "timeout", "error")
# What says nothing about the completion: such a row is tried again, then left out of training, never punished.
FAILURES = ("timeout", "error")
LIMIT_S = 10.0

LogExtra = Callable[[str, list[Any]], None]
LogMetric = Callable[[str, float], None]
RewardFunction = Callable[..., Any]


class RewardError(RecipeError):
    """A reward that cannot be computed; the message names the reward, the value, the rule and the remedy."""


@dataclass(frozen=True)
class Isolation:
    """How a reward is run in the pool: its wall clock for one completion, and modules every worker starts with."""

    limit_s: float = LIMIT_S
    preload: tuple[str, ...] = ()


def isolated(*, limit_s: float = LIMIT_S, preload: Sequence[str] = ()) -> Callable[[RewardFunction], RewardFunction]:
    """Mark a reward function, or a factory of one, to be judged row by row in worker processes that can be killed.

    `limit_s` is the wall clock of one completion, a second attempt included; a recipe's `limit_s` replaces it.
    """

    def mark(function: RewardFunction) -> RewardFunction:
        function.isolation = Isolation(limit_s, tuple(preload))  # type: ignore[attr-defined]
        return function

    return mark


class Verdict(NamedTuple):
    """Value, outcome code and extracted answer of one completion; all None where the reward does not apply."""

    value: float | None = None
    outcome: str | None = None
    answer: str | None = None


def report(verdicts: Sequence[Verdict], log_extra: LogExtra | None) -> list[float | None]:
    """Log the columns `outcome` and `extracted` of all rows and return the values."""
    if log_extra is not None:
        log_extra("outcome", [verdict.outcome for verdict in verdicts])
        log_extra("extracted", [verdict.answer for verdict in verdicts])
    return [verdict.value for verdict in verdicts]


def text_of(completion: str | Sequence[dict[str, Any]]) -> str:
    """Return the text of a completion in either of TRL's formats: a string, or messages (the last one counts)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") or "" if completion else ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text") or "" for block in content)


def column_error(reward: str, column: str, value: Any, rule: str) -> RewardError:
    """Return the error for a dataset value that `reward` cannot work with."""
    return RewardError(
        f"reward '{reward}': column '{column}' holds {value!r:.80}, {rule}; correct the row, or set the column to "
        "null where the reward does not apply."
    )


def check_share(reward: str, knob: str, value: float) -> None:
    """Raise RecipeError unless `value` lies in [0, 1): partial credit must stay below that of a right answer."""
    if not 0.0 <= value < 1.0:
        raise RecipeError(f"rewards.{reward}.{knob}: {value!r} must lie in [0, 1); a right answer is worth 1.")
