"""score(): reward functions with TRL's signature over a batch of rollouts, gathered in one table."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..recipes.registry import nearest
from .building import UNPASSED_COLUMNS, Reward, accepted_arguments, build_rewards, check_columns
from .verdicts import OUTCOMES, RewardError, RewardFunction

if TYPE_CHECKING:  # `unmask check` builds rewards and checks columns without paying for the import
    from torch import Tensor

__all__ = ["Reward", "RewardTable", "build_rewards", "check_columns", "score"]

LARGEST = 3.4028234663852886e38  # of fp32, in which the table holds its values
logger = logging.getLogger(__name__)


@dataclass
class RewardTable:
    """Rewards of B rollouts under R functions.

    `value_BR` fp32, NaN = does not apply; `weight_R` fp32; `total_B` fp32: sum of weight x value over the rewards
    that apply, NaN if none does; `outcome` a code a row (ok, wrong, unparsable, timeout, error); `metrics`: means of
    what was logged through log_metric; `extra`: columns of B values logged through log_extra.
    """

    names: tuple[str, ...]
    value_BR: Tensor
    weight_R: Tensor
    total_B: Tensor
    outcome: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.outcome)


def score(
    functions: Sequence[Reward],
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    trainer_state: Any = None,
) -> RewardTable:
    """Call every reward once on the whole batch and return the table; asynchronous rewards run meanwhile.

    Each function gets, by keyword, `prompts`, `completions`, `completion_ids`, one list per dataset column (None in
    rows without it), `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, or those of them that
    it names if it has no `**kwargs`. Where the row's prompt is a list of messages, the completion is passed as
    `[{"role": "assistant", "content": text}]`, as TRL does. Synchronous functions run one after the other in the
    calling thread (some use signals), asynchronous ones together on one event loop of a background thread.

    The outcome of a row is the code that the first reward, in the order of the list, reports for it through
    `log_extra("outcome", [...])`; where none reports one, it is `ok` if the first reward that applies is at least 1
    and `wrong` below that; where no reward applies, it is `error`.

    Raises RewardError for a missing column, an exception in a reward, a wrong number of values, and values that are
    not finite numbers or None.
    """
    import torch

    count = len(rows)
    if not functions:
        raise RewardError("score: there is no reward function; pass at least one.")
    if not len(prompts) == len(completions) == len(completion_ids) == count:
        raise RewardError(
            f"score: {count} rows, {len(prompts)} prompts, {len(completions)} completions and {len(completion_ids)} "
            "lists of completion ids; pass one of each a rollout."
        )
    logs = [_Log(reward.name, count) for reward in functions]
    outputs: list[Any] = [[]] * len(functions)
    if count:
        arguments = _arguments(rows, prompts, completions, completion_ids)
        check_columns(functions, dict.fromkeys([*arguments["columns"], *UNPASSED_COLUMNS]))
        shared = {**arguments["texts"], **arguments["columns"], "trainer_state": trainer_state}
        outputs = _call_all(functions, shared, logs)
    values = [_values(reward.name, output, count) for reward, output in zip(functions, outputs, strict=True)]
    value_BR = torch.tensor(values, dtype=torch.float32).reshape(len(functions), count).T.contiguous()
    weight_R = torch.tensor([reward.weight for reward in functions], dtype=torch.float32)
    applies_BR = ~value_BR.isnan()
    total_B = torch.where(applies_BR, value_BR * weight_R, 0.0).sum(dim=1)
    if not bool(total_B.isfinite().all()):
        raise RewardError("score: the weighted sum of the rewards overflows fp32; scale values or weights down.")
    total_B[~applies_BR.any(dim=1)] = math.nan
    return RewardTable(
        names=tuple(reward.name for reward in functions),
        value_BR=value_BR,
        weight_R=weight_R,
        total_B=total_B,
        outcome=_outcomes(logs, values, prompts),
        metrics=_metrics(logs),
        extra=_extra(logs),
    )


class _Log:
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
        number = _number(value)
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


def _arguments(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, dict[str, list[Any]]]:
    """Return the texts in TRL's formats and the dataset columns, both as keyword arguments."""
    shown = [row.get("prompt", prompt) for row, prompt in zip(rows, prompts, strict=True)]
    said = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) and isinstance(text, str) else text
        for prompt, text in zip(shown, completions, strict=True)
    ]
    texts = {"prompts": shown, "completions": said, "completion_ids": [list(ids) for ids in completion_ids]}
    names = dict.fromkeys(name for row in rows for name in row if name not in UNPASSED_COLUMNS)
    return {"texts": texts, "columns": {name: [row.get(name) for row in rows] for name in names}}


def _call_all(functions: Sequence[Reward], shared: Mapping[str, Any], logs: Sequence[_Log]) -> list[Any]:
    calls = []
    for reward, log in zip(functions, logs, strict=True):
        arguments = {**shared, "log_extra": log.extra, "log_metric": log.metric}
        calls.append(functools.partial(reward.function, **accepted_arguments(reward.function, arguments)))
    pending: dict[int, Future[Any]] = {}
    outputs: dict[int, Any] = {}
    try:
        for index, call in enumerate(calls):
            if is_async(functions[index].function):
                pending[index] = _submit(call)
        for index, call in enumerate(calls):
            if index not in pending:
                outputs[index] = _guarded(functions[index].name, call, len(shared["prompts"]))
        for index, future in pending.items():
            outputs[index] = _guarded(functions[index].name, future.result, len(shared["prompts"]))
    finally:
        for future in pending.values():
            future.cancel()
    for log in logs:
        log.check()
    return [outputs[index] for index in range(len(calls))]


def _guarded(name: str, call: RewardFunction, count: int) -> Any:
    try:
        output = call()
        # A plain function may hand out another one's coroutine (a lambda does).
        return _submit(lambda: output).result() if inspect.isawaitable(output) else output
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


def _submit(call: RewardFunction) -> Future[Any]:
    async def wait() -> Any:
        return await call()

    return asyncio.run_coroutine_threadsafe(wait(), _event_loop())


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the loop of a daemon thread; one for the process, as clients that rewards keep are bound to a loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="unmask-rewards", daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_event_loop.cache_clear)  # threads do not survive a fork


def _number(value: Any) -> float | None:
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


def _values(name: str, output: Any, count: int) -> list[float]:
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
        number = math.nan if value is None else _number(value)
        if number is None:
            raise RewardError(
                f"reward '{name}' returned {value!r:.80} for completion {row}; return a finite number, or None where "
                "it does not apply."
            )
        values.append(number)
    return values


def _outcomes(logs: Sequence[_Log], values: Sequence[Sequence[float]], prompts: Sequence[Any]) -> list[str]:
    outcomes, orphans = [], []
    for row in range(len(prompts)):
        reported = [codes[row] for log in logs if (codes := log.columns.get("outcome"))]
        applying = [column[row] for column in values if not math.isnan(column[row])]
        derived = "error" if not applying else "ok" if applying[0] >= 1 else "wrong"
        outcomes.append(next((code for code in reported if code is not None), derived))
        if not applying:
            orphans.append(row)
    if orphans:
        first = prompts[orphans[0]]
        logger.warning("no reward applies to %d of %d completions; first: %.200r", len(orphans), len(prompts), first)
    return outcomes


def _metrics(logs: Sequence[_Log]) -> dict[str, float]:
    """Return the mean of each metric over everything logged under its name, whichever reward logged it."""
    names = sorted({name for log in logs for name in log.numbers})
    logged = {name: [number for log in logs for number in log.numbers.get(name, [])] for name in names}
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in logged.items()}


def _extra(logs: Sequence[_Log]) -> dict[str, list[Any]]:
    """Return the logged columns but `outcome`; one that several rewards logged is named `reward/column`."""
    extra = {}
    for log in logs:
        for column, values in log.columns.items():
            if column != "outcome":
                shared = sum(column in other.columns for other in logs) > 1
                extra[f"{log.name}/{column}" if shared else column] = values
    return extra
