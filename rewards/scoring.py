"""score(): reward functions with TRL's signature over a batch of rollouts, gathered in one table."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .building import UNPASSED_COLUMNS, Reward, accepted_arguments, check_columns, needed_columns
from .calling import Log, check_values, guarded, is_async, submit
from .pool import Job, Pool, Result, shared_pool
from .verdicts import FAILURES, RewardError

if TYPE_CHECKING:  # `unmask check` builds rewards and checks columns without paying for the import
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass
class RewardTable:
    """Rewards of B rollouts under R functions.

    `value_BR` fp32, NaN = does not apply; `weight_R` fp32; `total_B` fp32: sum of weight x value over the rewards
    that apply and are no truth, NaN if none does or if one that has a weight failed (timeout, error); `outcome` a code
    a row (ok, wrong, unparsable, timeout, error); `codes`: those of each reward that reports them; `truths`: names
    that are never trained on; `metrics`: means of what was logged through log_metric; `extra`: columns of B values
    logged through log_extra.
    """

    names: tuple[str, ...]
    value_BR: Tensor
    weight_R: Tensor
    total_B: Tensor
    outcome: list[str]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    codes: dict[str, list[str | None]] = field(default_factory=dict)
    truths: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.outcome)

    def spliced(self, other: RewardTable, index_B: Tensor) -> RewardTable:
        """Return the rows `index_B` of this table and `other`, end to end; metrics are this table's."""
        import torch

        chosen, counts = index_B.tolist(), (len(self), len(other))

        def pick(own: Mapping[str, list[Any]], others: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            # A column that only one of the tables has is None in rows of the other.
            names = dict.fromkeys([*own, *others])
            both = {n: [*own.get(n, [None] * counts[0]), *others.get(n, [None] * counts[1])] for n in names}
            return {name: [values[i] for i in chosen] for name, values in both.items()}

        outcome = [*self.outcome, *other.outcome]
        return replace(
            self,
            value_BR=torch.cat([self.value_BR, other.value_BR])[index_B],
            total_B=torch.cat([self.total_B, other.total_B])[index_B],
            outcome=[outcome[i] for i in chosen],
            extra=pick(self.extra, other.extra),
            codes=pick(self.codes, other.codes),
        )

    def components(self) -> dict[str, Tensor]:
        """Return each reward's values by its name in metrics: `reward/NAME`, or `truth/NAME`."""
        kinds = ["truth" if name in self.truths else "reward" for name in self.names]
        return {f"{kinds[r]}/{name}": self.value_BR[:, r] for r, name in enumerate(self.names)}


def score(
    functions: Sequence[Reward],
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    *,
    trainer_state: Any = None,
    pool: Pool | None = None,
) -> RewardTable:
    """Call every reward on a batch and return the table.

    Each function gets, by keyword, `prompts`, `completions`, `completion_ids`, one list per dataset column (None in
    rows without it), `trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`, or those of them that
    it names if it has no `**kwargs`. Where the row's prompt is a list of messages, the completion is passed as
    `[{"role": "assistant", "content": text}]`, as TRL does. Synchronous functions run one after the other in the
    calling thread (some use signals); meanwhile isolated ones judge row by row in the processes of `pool`, and
    asynchronous ones run together on one event loop of a background thread.

    The outcome of a row is the code that the first reward, in the order of the list, reports for it through
    `log_extra("outcome", [...])`; where none reports one, it is `ok` if the first reward that applies is at least 1
    and `wrong` below that; where no reward applies, it is `error`. A reward that fails on a row (timeout or error, and
    no value) excludes the row: its total is NaN. Truths have no part in outcomes and totals.

    Raises RewardError for a missing column, an exception in a reward, a wrong number of values, and values that are
    not finite numbers or None.
    """
    scoring = Scoring(functions, trainer_state=trainer_state, pool=pool)
    scoring.add(rows, prompts, completions, completion_ids)
    return scoring.table()


class Scoring:
    """The scoring of one batch that arrives in chunks.

    `add` starts isolated and asynchronous rewards on a chunk, which run while the next one is rolled out; `table`
    calls the others once on the whole batch and gathers everything. `score` has the rules.
    """

    def __init__(self, functions: Sequence[Reward], *, trainer_state: Any = None, pool: Pool | None = None) -> None:
        if not functions:
            raise RewardError("score: there is no reward function; pass at least one.")
        self.functions, self.trainer_state, self.pool = functions, trainer_state, pool
        self.rows: list[Mapping[str, Any]] = []
        self._texts: dict[str, list[Any]] = {"prompts": [], "completions": [], "completion_ids": []}
        # For each reward that has begun: a future and a log a chunk, or a future a row.
        self._chunks: dict[int, list[tuple[Future[Any], Log]]] = {}
        self._verdicts: dict[int, list[Future[Result]]] = {}

    def add(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
    ) -> None:
        """Take rollouts, one entry of each argument a rollout, and start what need not wait for the rest."""
        if not len(prompts) == len(completions) == len(completion_ids) == len(rows):
            raise RewardError(
                f"score: {len(rows)} rows, {len(prompts)} prompts, {len(completions)} completions and "
                f"{len(completion_ids)} lists of completion ids; pass one of each a rollout."
            )
        texts = _texts(rows, prompts, completions, completion_ids)
        self.rows += rows
        for name, values in texts.items():
            self._texts[name] += values
        if not rows:
            return
        for index, reward in enumerate(self.functions):
            early = reward.isolation is not None or is_async(reward.function)
            if not early:
                continue
            # A column that this chunk lacks may stand in a later one; `table` checks the batch.
            columns = {name: [None] * len(rows) for name in needed_columns(reward)} | _columns(rows)
            if reward.isolation is not None:
                self._verdicts.setdefault(index, []).extend(self._judge(reward, {**texts, **columns}, len(rows)))
            else:
                log = Log(reward.name, len(rows))
                call = self._call(reward, {**texts, **columns}, log)
                self._chunks.setdefault(index, []).append((submit(call), log))

    def table(self) -> RewardTable:
        """Call the rewards that want the whole batch, wait for the others, and return the table."""
        count, logs = len(self.rows), [Log(reward.name, 0) for reward in self.functions]
        values: list[list[float]] = [[] for _ in self.functions]
        try:
            columns = _columns(self.rows)
            if count:
                check_columns(self.functions, dict.fromkeys([*columns, *UNPASSED_COLUMNS]))
            for index, reward in enumerate(self.functions):
                if count and index not in self._verdicts and index not in self._chunks:
                    logs[index] = Log(reward.name, count)
                    call = self._call(reward, {**self._texts, **columns}, logs[index])
                    values[index] = check_values(reward.name, guarded(reward.name, call, count), count)
            for index, parts in self._chunks.items():
                for future, log in parts:
                    name = self.functions[index].name
                    values[index] += check_values(name, guarded(name, future.result, log.count), log.count)
                    logs[index].add(log)
            for index, futures in self._verdicts.items():
                values[index], logs[index] = _gather(self.functions[index].name, futures)
        finally:
            for future in [f for parts in self._chunks.values() for f, _ in parts]:
                future.cancel()
            for verdict in [f for futures in self._verdicts.values() for f in futures]:
                verdict.cancel()
        for log in logs:
            log.check()
        return _table(self.functions, values, logs, self._texts["prompts"])

    def _call(self, reward: Reward, arguments: Mapping[str, Any], log: Log) -> Callable[..., Any]:
        given = {**arguments, "trainer_state": self.trainer_state, "log_extra": log.extra, "log_metric": log.metric}
        return functools.partial(reward.function, **accepted_arguments(reward.function, given))

    def _judge(self, reward: Reward, arguments: Mapping[str, list[Any]], count: int) -> list[Future[Result]]:
        """Submit a chunk's rows to the pool; another process gets no trainer_state."""
        assert reward.isolation is not None
        given = accepted_arguments(reward.function, arguments)
        limit_s, preload = reward.isolation.limit_s, reward.isolation.preload
        jobs = [
            Job(reward.name, reward.entry, {name: [values[row]] for name, values in given.items()}, limit_s, preload)
            for row in range(count)
        ]
        return (self.pool or shared_pool()).submit(jobs)


def _texts(
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
) -> dict[str, list[Any]]:
    """Return prompts, completions and ids in TRL's formats."""
    shown = [row.get("prompt", prompt) for row, prompt in zip(rows, prompts, strict=True)]
    said = [
        [{"role": "assistant", "content": text}] if isinstance(prompt, list) and isinstance(text, str) else text
        for prompt, text in zip(shown, completions, strict=True)
    ]
    return {"prompts": shown, "completions": said, "completion_ids": [list(ids) for ids in completion_ids]}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row if name not in UNPASSED_COLUMNS)
    return {name: [row.get(name) for row in rows] for name in names}


def _gather(name: str, futures: Sequence[Future[Result]]) -> tuple[list[float], Log]:
    """Return one reward's values (NaN where it failed or does not apply) and what it logged about the rows."""
    values: list[float] = []
    whole = Log(name, 0)
    for future in futures:
        result, log = future.result(), Log(name, 1)
        if result.reply is None:
            values.append(math.nan)
            log.columns = {"outcome": [result.outcome], "cause": [result.cause]}
        else:
            values += check_values(name, [result.reply["value"]], 1)
            log.columns = {column: [value] for column, value in result.reply["columns"].items()}
            log.numbers = result.reply["numbers"]
        whole.add(log)
    return values, whole


def _table(
    functions: Sequence[Reward], values: Sequence[Sequence[float]], logs: Sequence[Log], prompts: Sequence[Any]
) -> RewardTable:
    import torch

    count = len(prompts)
    value_BR = torch.tensor(values, dtype=torch.float32).reshape(len(functions), count).T.contiguous()
    weight_R = torch.tensor([reward.weight for reward in functions], dtype=torch.float32)
    trained_R = torch.tensor([not reward.truth for reward in functions])
    applies_BR = ~value_BR.isnan() & trained_R
    total_B = torch.where(applies_BR, value_BR * weight_R, 0.0).sum(dim=1)
    if not bool(total_B.isfinite().all()):
        raise RewardError("score: the weighted sum of the rewards overflows fp32; scale values or weights down.")
    total_B[~applies_BR.any(dim=1)] = math.nan
    codes = {log.name: log.columns["outcome"] for log in logs if "outcome" in log.columns}
    judges = [index for index, reward in enumerate(functions) if not reward.truth]
    for index in judges:
        if functions[index].weight == 0:
            continue
        failed = [code in FAILURES for code in codes.get(functions[index].name, [None] * count)]
        total_B[torch.tensor(failed, dtype=torch.bool) & value_BR[:, index].isnan()] = math.nan
    return RewardTable(
        names=tuple(reward.name for reward in functions),
        value_BR=value_BR,
        weight_R=weight_R,
        total_B=total_B,
        outcome=_outcomes([logs[i] for i in judges], [values[i] for i in judges], prompts),
        metrics=_metrics(logs),
        extra=_extra(logs),
        codes=codes,
        truths=tuple(reward.name for reward in functions if reward.truth),
    )


def _outcomes(logs: Sequence[Log], values: Sequence[Sequence[float]], prompts: Sequence[Any]) -> list[str]:
    outcomes, orphans = [], []
    for row in range(len(prompts)):
        reported = [codes[row] for log in logs if (codes := log.columns.get("outcome"))]
        applying = [column[row] for column in values if not math.isnan(column[row])]
        derived = "error" if not applying else "ok" if applying[0] >= 1 else "wrong"
        code = next((code for code in reported if code is not None), None)
        outcomes.append(derived if code is None else code)
        if not applying and code not in FAILURES:
            orphans.append(row)
    if orphans:
        first = prompts[orphans[0]]
        logger.warning("no reward applies to %d of %d completions; first: %.200r", len(orphans), len(prompts), first)
    return outcomes


def _metrics(logs: Sequence[Log]) -> dict[str, float]:
    """Return the mean of each metric over everything logged under its name, whichever reward logged it."""
    names = sorted({name for log in logs for name in log.numbers})
    logged = {name: [number for log in logs for number in log.numbers.get(name, [])] for name in names}
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in logged.items()}


def _extra(logs: Sequence[Log]) -> dict[str, list[Any]]:
    """Return the logged columns but `outcome`; one that several rewards logged is named `reward/column`."""
    extra = {}
    for log in logs:
        for column, values in log.columns.items():
            if column != "outcome":
                shared = sum(column in other.columns for other in logs) > 1
                extra[f"{log.name}/{column}" if shared else column] = values
    return extra
