"""Calling one reward function: what it may log, what it may return, and the loop that asynchronous ones share."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import threading
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import Future
from numbers import Real
from typing import Any

from ..recipes.registry import nearest
from .building import accepted_arguments
from .verdicts import OUTCOMES, RewardError, RewardFunction

LARGEST = 3.4028234663852886e38  # of fp32, in which the table holds its values


class Log:
    """What one reward logs during one call: `extra` and `metric` are its `log_extra` and `log_metric`."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.columns: dict[str, list[Any]] = {}
        self.numbers: dict[str, list[float]] = {}

    def extra(self, column: str, values: Iterable[Any]) -> None:
        """Append `values` to a column of the rollout log, one a rollout."""
        self.columns.setdefault(column, []).extend(values)

    def metric(self, name: str, value: float) -> None:
        """Record a finite number; the table holds the mean of all that were recorded under its name."""
        number = finite_number(value)
        if number is None:
            raise RewardError(f"reward '{self.name}': log_metric('{name}', {value!r:.80}) is not a finite number.")
        self.numbers.setdefault(name, []).append(number)

    def check(self) -> None:
        """Raise RewardError unless every column has one value a rollout and every outcome is a known code."""
        for column, values in self.columns.items():
            if len(values) != self.count:
                raise RewardError(
                    f"reward '{self.name}': log_extra('{column}', ...) got {len(values)} values for {self.count} "
                    "completions; log one a completion, None where there is none."
                )
        for code in self.columns.get("outcome", []):
            if code is not None and code not in OUTCOMES:
                raise RewardError(
                    f"reward '{self.name}': outcome {code!r:.80} is not a code; log it under another column name, or "
                    f"use one.{nearest(str(code), list(OUTCOMES))}"
                )

    def add(self, other: Log) -> None:
        """Append what the same reward logged about the rollouts that follow; a column that either lacks gets None."""
        for column in dict.fromkeys([*self.columns, *other.columns]):
            values = self.columns.setdefault(column, [None] * self.count)
            values.extend(other.columns.get(column, [None] * other.count))
        for name, numbers in other.numbers.items():
            self.numbers.setdefault(name, []).extend(numbers)
        self.count += other.count


def guarded(name: str, call: RewardFunction, count: int) -> Any:
    """Return what a call returns, awaited; RewardError naming the reward for any exception in it."""
    try:
        output = call()
        # A plain function may hand out another one's coroutine (a lambda does).
        return submit(lambda: output).result() if inspect.isawaitable(output) else output
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward '{name}' raised {type(error).__name__}: {error} (batch of {count} completions); correct it, or "
            "return None for completions that it cannot judge."
        ) from error


def is_async(function: RewardFunction) -> bool:
    """Tell whether calling `function` (also a partial, or an object with an async `__call__`) gives a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def submit(call: RewardFunction) -> Future[Any]:
    """Start a call that gives an awaitable on the loop of all asynchronous rewards, and return its future."""

    async def wait() -> Any:
        return await call()

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop())


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of a daemon thread; one for the process, as clients that rewards keep are bound to a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="unmask-rewards", daemon=True).start()
    return loop


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_event_loop.cache_clear)  # threads do not survive a fork


def finite_number(value: Any) -> float | None:
    """Return `value` as a float if it is a finite number of fp32's range (also a tensor of one element)."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) <= LARGEST else None


def check_values(name: str, output: Any, count: int) -> list[float]:
    """Return one float a completion, NaN for None; raises RewardError for anything but finite numbers and None."""
    if hasattr(output, "tolist"):
        output = output.tolist()
    if isinstance(output, str | bytes | Mapping | Set) or not isinstance(output, Iterable):
        hint = "; if it is a factory, register it in the slot 'reward'" if callable(output) else ""
        raise RewardError(
            f"reward '{name}' returned {output!r:.80}; return a list with one number or None a completion{hint}."
        )
    listed = list(output)
    if len(listed) != count:
        raise RewardError(
            f"reward '{name}' returned {len(listed)} values for {count} completions; return exactly one a completion, "
            "None where it does not apply."
        )
    values = []
    for row, value in enumerate(listed):
        number = math.nan if value is None else finite_number(value)
        if number is None:
            raise RewardError(
                f"reward '{name}' returned {value!r:.80} for completion {row}; return a finite number, or None where "
                "it does not apply."
            )
        values.append(number)
    return values


def judge_row(name: str, function: RewardFunction, arguments: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return what a reward says about one row, as plain data: `value`, logged `columns` and `numbers`.

    `arguments` hold lists of one. This runs in a worker of the pool; an exception is the caller's to report.
    """
    log = Log(name, 1)
    given = accepted_arguments(function, {**arguments, "log_extra": log.extra, "log_metric": log.metric})
    output = function(**given)
    if inspect.isawaitable(output):
        output = submit(lambda: output).result()
    (value,) = check_values(name, output, 1)
    log.check()
    columns = {column: values[0] for column, values in log.columns.items()}
    return {"value": None if math.isnan(value) else value, "columns": columns, "numbers": log.numbers}
