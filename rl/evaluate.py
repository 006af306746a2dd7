"""Held-out evaluation: exact rate with its standard error, NFE and speed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..recipes.registry import RecipeError
from ..recipes.tasks import Row, Rows
from ..rollouts.worker import RolloutBatch, RolloutWorker
from .distributed import gather_objects, rank, world_size

CLOCKS = ("wall_s", "tokens_per_s")
EVALUATION_STEP = -1  # a step no training batch has: evaluation noise is the same before, during and after training


@dataclass(frozen=True)
class Evaluation:
    """Results on `n` held-out problems; `exact` is the share with outcome ok, `stderr` its standard error.

    `components` are the means of every reward (`reward/NAME`) and truth (`truth/NAME`) over the rows it applies to,
    `errors` their standard errors.
    """

    n: int
    exact: float
    stderr: float
    reward: float
    nfe: float
    length: float
    tokens_per_s: float
    wall_s: float
    outcomes: dict[str, int]
    components: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def metrics(self, prefix: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the numbers under the names of our records, and under those that Trainer's callbacks look for."""
        values = {name: value for name, value in self.as_dict().items() if isinstance(value, int | float)}
        values |= self.components | {f"stderr/{name}": error for name, error in self.errors.items()}
        logged = {f"time/{prefix}_{k}" if k in CLOCKS else f"{prefix}/{k}": v for k, v in values.items()}
        return logged, {f"{prefix}_{name}": value for name, value in values.items()}


def heldout_rows(rows: Rows, problems: int) -> list[Row]:
    """Return the first `problems` held-out rows, all of them when a stored dataset has fewer."""
    count = problems if rows.size is None else min(problems, rows.size)
    return [rows.row(index) for index in range(count)]


def evaluate(
    worker: RolloutWorker,
    rows: Sequence[Row],
    *,
    progress: Callable[[int], None] | None = None,
    keep: list[RolloutBatch] | None = None,
) -> Evaluation:
    """Roll out one completion a row and return the Evaluation; rows are shared among the ranks.

    `progress` is told how many rows have just been finished; batches are appended to `keep`. A completion that no
    reward applies to counts as reward 0. Raises RecipeError without rows.
    """
    if not rows:
        raise RecipeError("evaluate: there are no held-out problems; pass some (eval_dataset, evaluation.problems).")
    worker = replace(worker, group=1)
    started = time.perf_counter()
    model: Any = getattr(worker.denoiser, "model", None)
    training = model is not None and model.training
    if training:
        model.eval()
    outcomes: list[str] = []
    rewards: list[float] = []
    steps: list[int] = []
    components: dict[str, list[float]] = {}
    tokens = 0
    mine = range(rank() * worker.micro_batch, len(rows), world_size() * worker.micro_batch)
    for start in mine:
        chunk = list(rows[start : start + worker.micro_batch])
        batch = worker.collect(chunk, step=EVALUATION_STEP, first_id=start)
        outcomes += batch.rewards.outcome
        rewards += torch.nan_to_num(batch.rewards.total_B, nan=0.0).tolist()
        for name, value_B in batch.rewards.components().items():
            components.setdefault(name, []).extend(value_B[~value_B.isnan()].tolist())
        steps += batch.trajectory.steps_B.tolist()
        tokens += sum(map(len, batch.completion_ids))
        if keep is not None:
            keep.append(batch)
        if progress is not None:
            progress(len(chunk))
    if training:
        model.train()
    gathered = gather_objects((outcomes, rewards, steps, tokens, components))
    seconds = time.perf_counter() - started
    outcomes = [value for part in gathered for value in part[0]]
    rewards = [value for part in gathered for value in part[1]]
    steps = [value for part in gathered for value in part[2]]
    tokens = sum(part[3] for part in gathered)
    names = sorted({name for part in gathered for name in part[4]})
    judged = {name: [value for part in gathered for value in part[4].get(name, [])] for name in names}
    n = len(outcomes)
    exact = sum(outcome == "ok" for outcome in outcomes) / n
    return Evaluation(
        n=n,
        exact=exact,
        stderr=math.sqrt(exact * (1 - exact) / n),
        reward=sum(rewards) / n,
        nfe=sum(steps) / n,
        length=tokens / n,
        tokens_per_s=tokens / seconds,
        wall_s=seconds,
        outcomes=dict(Counter(outcomes)),
        components={name: _mean(values) for name, values in judged.items() if values},
        errors={name: _error(values) for name, values in judged.items() if values},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _error(values: list[float]) -> float:
    """Return the standard error of a mean; that of zeros and ones is the error of a share."""
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
