"""Rewards that a random model scores on; tests name them in recipes as `toyrewards:NAME`."""

from __future__ import annotations

import asyncio
import time
from typing import Any


def digits(completions: list[str], **kwargs: Any) -> list[float]:
    """The share of characters that are digits."""
    return [sum(c in "0123456789" for c in text) / max(len(text), 1) for text in completions]


def mean_id(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The mean token id over 261: different for any two completions of a random model."""
    return [sum(ids) / (261.0 * max(len(ids), 1)) for ids in completion_ids]


def slow_mean_id(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """`mean_id` after a pause, so that there is time to be killed in."""
    time.sleep(0.1)
    return mean_id(completion_ids)


async def later(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """`mean_id`, asynchronously."""
    await asyncio.sleep(0.01)
    return mean_id(completion_ids)


def one_sided(prompts: list[str], completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """`mean_id` for prompts that begin with a digit below 5; nothing to learn otherwise, nor in the third batch."""
    if trainer_state.global_step in (4, 5):
        return [0.5] * len(prompts)
    values = mean_id(completion_ids)
    return [value if prompt[0] in "01234" else 0.5 for prompt, value in zip(prompts, values, strict=True)]


def counted(completions: list[str], log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float | None]:
    """Every other completion is right; the others are passed over. Logs a metric and a column."""
    log_metric("seen", float(len(completions)))
    log_extra("size", [len(text) for text in completions])
    return [1.0 if index % 2 == 0 else None for index in range(len(completions))]


def nan(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that divides by zero somewhere."""
    return [float("nan")] * len(completions)


def short(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that forgets a completion."""
    return [0.0] * (len(completions) - 1)


def broken(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that has a bug."""
    raise ZeroDivisionError("division by zero")


def needs_solution(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    """A reward that needs a column no task has."""
    return [0.0] * len(completions)


def low(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """The share of tokens below 128, a half for a random model."""
    return [sum(token < 128 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def anywhere(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """A reward that takes the right answer wherever it stands, which a completion with every answer earns."""
    lines = [[line.strip() for line in text.splitlines()] for text in completions]
    return [float(f"#### {gold}" in found) for found, gold in zip(lines, answer, strict=True)]


def parity(completions: list[str], completion_ids: list[list[int]], log_extra: Any = None, **_: Any) -> list[float]:
    """1 where the sum of the ids is even; the answer is its last digit, and a sum divisible by seven is unreadable."""
    sums = [sum(ids) for ids in completion_ids]
    codes = ["unparsable" if s % 7 == 0 else "wrong" if s % 2 else "ok" for s in sums]
    log_extra("outcome", codes)
    log_extra("extracted", [None if s % 7 == 0 else str(s % 10) for s in sums])
    return [float(code == "ok") for code in codes]


def near(completion_ids: list[list[int]], reference: list[str], **kwargs: Any) -> list[float]:
    """Right if at least seven bytes stand where the worked solution has them, which a random model does not get."""
    pairs = zip(completion_ids, reference, strict=True)
    return [float(sum(a == b for a, b in zip(ids, text.encode(), strict=False)) >= 7) for ids, text in pairs]


def lucky(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Right for one completion in twelve of a random model, whatever it says."""
    return [float(sum(ids) % 12 == 0) for ids in completion_ids]


def anything(completions: list[str], **kwargs: Any) -> list[float]:
    """Everything is right."""
    return [1.0] * len(completions)


def rising(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward that every batch earns more of."""
    return [0.1 * trainer_state.global_step + value for value in mean_id(completion_ids)]


def falling(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A truth that holds less and less."""
    return [1.0 - 0.1 * trainer_state.global_step + 0.01 * value for value in mean_id(completion_ids)]
