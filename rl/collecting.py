"""Collecting: from the number of a batch to its rollouts, with hints, refilled groups and past successes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from ..recipes.tasks import Rows
from ..rollouts import exploration as exploring
from ..rollouts.noise import derived
from ..rollouts.trajectory import HINT
from ..rollouts.worker import RolloutBatch, RolloutWorker, measured
from . import filters  # noqa: F401 (importing registers the parts)
from .distributed import rank, world_size
from .successes import Successes

COUNTED = ("tried", "leak", "replayed", "refilled")


@dataclass(frozen=True)
class Exploration:
    """What is done besides rolling out `group` completions of each problem; nothing by default.

    `hints` treats groups that failed altogether, `filter` says which groups are learnt from, a refused group gets a new
    problem at most `refills` times, and `successes` past ones are kept for groups that fail.
    """

    hints: Callable[..., RolloutBatch] | None = None
    filter: Callable[..., Tensor] | None = None
    refills: int = 0
    successes: int = 0

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return self.hints is not None or self.filter is not None or self.successes > 0


def build_exploration(section: Mapping[str, Any]) -> Exploration:
    """Return the Exploration of a recipe's `exploration` section."""
    hints, filter_ = (
        None if section.get(key) is None else SLOTS[slot].build(section[key], f"exploration.{key}")
        for key, slot in (("hints", "exploration"), ("filter", "filter"))
    )
    return Exploration(hints, filter_, section.get("refills", 0), section.get("successes", 0))


class Collector:
    """Collects this rank's share of each batch of `prompts` problems.

    Everything is a function of the batch's number, the seed and, with past successes, of the batches before: group g of
    batch n has problem (n (1 + refills) + a) prompts + g of the task in its attempt a, whichever groups were refused:
    no rank has to know about another's. Problems that no attempt needed are passed over.
    """

    def __init__(
        self, worker: RolloutWorker, rows: Rows, *, prompts: int, exploration: Exploration | None = None
    ) -> None:
        self.worker, self.rows, self.prompts = worker, rows, prompts
        self.exploration = exploration or Exploration()
        self.successes = Successes(self.exploration.successes) if self.exploration.successes else None

    def collect(self, number: int) -> RolloutBatch:
        """Return the rollouts of batch `number`; every rank must call this.

        Groups that are refused in the end have total rewards of NaN: no gradient, and no weight in any mean.
        """
        share = self.prompts // world_size()
        groups = list(range(rank() * share, (rank() + 1) * share))
        if not self.exploration.active:
            return self._roll_out(self.worker, groups, number, 0)
        batch = self._attempt(groups, number, 0)
        metrics, refilled = batch.metrics, set[int]()
        for attempt in range(1, self.exploration.refills + 1):
            refused = self._refused(batch)
            if not refused:
                break
            again = self._attempt(refused, number, attempt)
            still = set(self._refused(again))
            batch = _with_groups(batch, again, [group for group in refused if group not in still])
            refilled |= set(refused) - still
        if self.successes is not None:
            self.successes.remember(batch)
        metrics["explore/refilled"] = len(refilled) / len(groups)
        return self._finished(replace(batch, metrics=metrics))

    def save(self, folder: Path) -> None:
        """Write what later batches depend on into a checkpoint's folder."""
        if self.successes is not None:
            self.successes.save(folder)

    def load(self, folder: Path | None) -> None:
        """Read what `save` wrote, or begin anew."""
        if self.successes is not None:
            self.successes.load(folder)

    def _roll_out(self, worker: RolloutWorker, groups: Sequence[int], number: int, attempt: int) -> RolloutBatch:
        first = (number * (1 + self.exploration.refills) + attempt) * self.prompts
        return worker.collect([self.rows.row(first + group) for group in groups], step=number, ids=groups)

    def _attempt(self, groups: Sequence[int], number: int, attempt: int) -> RolloutBatch:
        """Return scored rollouts of new problems, with hints and past successes where a group failed."""
        worker = self.worker
        if attempt:
            worker = replace(worker, seed=derived(worker.seed, "refill", attempt))
        batch = self._roll_out(worker, groups, number, attempt)
        total_B = batch.rewards.total_B
        batch.metrics |= dict.fromkeys((f"explore/{name}" for name in COUNTED), 0.0)
        batch.metrics["explore/failed_groups_before"] = len(exploring.failed_groups(batch)) / len(groups)
        batch.metrics["explore/first_exact"] = batch.rewards.outcome.count("ok") / len(batch)
        batch.metrics["explore/first_reward"] = float(total_B.nan_to_num(0.0).double().mean())
        if self.exploration.hints is not None:
            batch = self.exploration.hints(batch, worker, number)
        if self.successes is not None:
            failed = len(exploring.failed_groups(batch))
            batch = self.successes.recall(batch, worker, number)
            batch.metrics["explore/replayed"] = (failed - len(exploring.failed_groups(batch))) / len(groups)
        return batch

    def _refused(self, batch: RolloutBatch) -> list[int]:
        """Return the groups that the filter does not keep, in the order of the batch."""
        return list(dict.fromkeys(batch.group_B[~self._kept(batch)].tolist()))

    def _kept(self, batch: RolloutBatch) -> Tensor:
        if self.exploration.filter is None:
            return torch.ones(len(batch), dtype=torch.bool)
        right_B = torch.tensor([outcome == "ok" for outcome in batch.rewards.outcome])
        return self.exploration.filter(right_B, batch.rewards.total_B, batch.group_B)

    def _finished(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the rewards of refused groups removed and everything counted."""
        kept_B, hint_BL = self._kept(batch), batch.trajectory.source_BL == HINT
        groups = len(torch.unique(batch.group_B))
        batch.metrics |= measured(batch.trajectory, batch.completion_ids) | {
            "explore/failed_groups_after": len(exploring.failed_groups(batch)) / groups,
            "explore/refused": 1.0 - kept_B.double().mean().item(),
            "explore/hinted": hint_BL.any(dim=1).double().mean().item(),
            "explore/hint_tokens": hint_BL.sum().item() / len(batch),
        }
        total_B = torch.where(kept_B, batch.rewards.total_B, torch.nan)
        return replace(batch, rewards=replace(batch.rewards, total_B=total_B))


def _with_groups(batch: RolloutBatch, other: RolloutBatch, groups: Sequence[int]) -> RolloutBatch:
    """Return `batch` with the rollouts of `groups` taken from `other`, where they stand in the same order."""
    if not groups:
        return batch
    chosen = torch.tensor(groups)
    place_B = torch.full((len(batch),), -1)
    place_B[torch.isin(batch.group_B, chosen)] = torch.isin(other.group_B, chosen).nonzero().squeeze(1)
    return exploring.splice(batch, other, place_B)
