"""Crediting: from a scored batch to the advantages of its actions, by way of the rewards of drafts if asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..rollouts.drafts import draft_canvases
from ..rollouts.trajectory import Trajectory
from ..rollouts.worker import RolloutBatch, RolloutWorker
from .credit import Credit
from .losses import mark_of


def by_step(advantage: Callable[..., Tensor]) -> bool:
    """Return whether an advantage takes the rewards of every step's draft."""
    return mark_of(advantage, "by") == "step"


def asks_for_drafts(objective: Any, advantage: Callable[..., Tensor]) -> bool:
    """Return whether rollouts must record what each step drew: for the advantage, for what is scored or labelled."""
    asked = getattr(objective, "needs_drafts", False) or mark_of(getattr(objective, "estimator", None), "needs_drafts")
    return by_step(advantage) or bool(asked)


def credited(
    worker: RolloutWorker, batch: RolloutBatch, advantage: Callable[..., Tensor], reward_B: Tensor | None = None
) -> tuple[RolloutBatch, Credit]:
    """Return the batch with its advantages, and the credit that the objective reads.

    `reward_B` are the rewards that a group compares (default: the batch's totals). Where steps are told apart
    `advantage_B` is the mean over a rollout's steps, which only records read.
    """
    if not by_step(advantage):
        advantage_B = advantage(batch.rewards.total_B if reward_B is None else reward_B, batch.group_B)
        return batch.with_advantage(advantage_B), Credit(advantage_B)
    started = time.perf_counter()
    reward_BS, metrics = step_rewards(worker, batch)
    metrics["time/drafts_s"] = time.perf_counter() - started
    advantage_BS = advantage(reward_BS, batch.group_B)
    batch = replace(batch, step_reward_BS=reward_BS, step_advantage_BS=advantage_BS, metrics=batch.metrics | metrics)
    return batch.with_advantage(advantage_BS.nanmean(dim=1)), Credit(advantage_BS, by="step")


def step_rewards(worker: RolloutWorker, batch: RolloutBatch) -> tuple[Tensor, dict[str, float]]:
    """Return `reward_BS`, the reward of the draft of every step, NaN behind a rollout's last, and what it cost.

    A draft ends with its first EOS, as a completion does. Drafts of one problem that say the same are scored once, and
    those that say what a rollout of it ended with are not scored again. `rollout/drafts_scored` is the share that was,
    `rollout/backslide` that of rollouts with a draft better than what they ended with.
    """
    trajectory, scored = batch.trajectory, batch.rewards.total_B
    steps = int(trajectory.steps_B.max())
    row_N, step_N = (torch.arange(steps) < trajectory.steps_B[:, None]).nonzero(as_tuple=True)
    rows: list[int] = []
    wanted: list[list[int]] = []
    # The number of each draft among all those that are told apart, then the reward of each of these.
    index_N = torch.empty_like(row_N)
    value_U: list[float | None] = []
    for group in batch.group_B.unique().tolist():
        member_B = batch.group_B == group
        of_N = member_B[row_N]
        ids_NL = _completions(trajectory, row_N[of_N], step_N[of_N])
        ids_UL, own_N = torch.unique(ids_NL, dim=0, return_inverse=True)
        index_N[of_N] = own_N + len(value_U)
        members = member_B.nonzero().squeeze(1).tolist()
        known = {tuple(batch.completion_ids[b]): scored[b].item() for b in members}
        for ids in ids_UL.tolist():
            said = [token for token in ids if token >= 0]
            value_U.append(known.get(tuple(said)))
            if value_U[-1] is None:
                rows.append(members[0])
                wanted.append(said)
    if wanted:
        shown = [batch.rows[b] for b in rows]
        table = worker.scorer(shown, [row.get("prompt") for row in shown], worker.texts(wanted), wanted)
        found = iter(table.total_B.tolist())
        value_U = [next(found) if value is None else value for value in value_U]
    reward_BS = scored.new_full((len(batch), steps), torch.nan)
    reward_BS[row_N, step_N] = scored.new_tensor(value_U)[index_N]
    better_B = reward_BS.nan_to_num(-torch.inf).amax(dim=1) > scored.nan_to_num(torch.inf)
    metrics = {
        "rollout/drafts_scored": len(wanted) / max(len(row_N), 1),
        "rollout/backslide": better_B.double().mean().item(),
    }
    return reward_BS, metrics


def _completions(trajectory: Trajectory, row_N: Tensor, step_N: Tensor) -> Tensor:
    """Return the drafts' ids `[N, L]`, -1 behind the first EOS."""
    ids_NL = draft_canvases(trajectory, row_N, step_N)
    ends_NL = torch.isin(ids_NL, torch.tensor(trajectory.eos_token_ids))
    behind_NL = ends_NL.cumsum(dim=1) - ends_NL.long() > 0
    return ids_NL.masked_fill(behind_NL, -1)
