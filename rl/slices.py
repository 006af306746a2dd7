"""Sliced training of block-causal models: the r-th step of every block at once, in one pass over [x_t ; x_0]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import SAMPLED, Trajectory
from .estimators import check_unrevised, estimator, ranks
from .likelihoods import Frame
from .views import Views


@estimator.register
def sliced(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    size: int,
    merge: int = 1,
    tokens: Literal["until_eos", "all"] = "until_eos",
) -> Views:
    """The trace of a block-causal model, a view for the r-th step of every block together (TraceRL's sliced training).

    Behind clean blocks each block of `size` positions sees what its r-th step saw, so that the log-probs are those of
    `trace` and a rollout costs as many forwards, of twice the length, as its busiest block has steps
    (trajectory_rl.md section 6.5). `merge` takes the steps of a block so many at a time, as `trace` does. The rollout
    must have filled one block after the other, on the model's own borders.
    """
    if size < 1 or merge < 1:
        raise RecipeError(f"estimator.size, merge: {size} and {merge} must be at least 1.")
    check_unrevised(trajectory, "sliced views")
    if trajectory.offset_B is None:
        raise RecipeError("objective.estimator: 'sliced' needs a block-causal family; use trace.")
    rank_BL, part_BL = ranks(trajectory, size)
    _check_order(trajectory, part_BL)
    rounds = int(rank_BL.max()) // merge + 1
    round_1R1 = torch.arange(rounds, device=rank_BL.device)[None, :, None]
    own_BRL = torch.where(rank_BL >= 0, rank_BL // merge, -1)[:, None]
    action_BL = trajectory.action_BL(tokens)
    # What lies behind an EOS was seen, and competed for its place: it is hidden and shown like all else.
    views = Frame.of(trajectory, "all", None).views(
        own_BRL >= round_1R1,
        scored_BML=(own_BRL == round_1R1) & action_BL[:, None],
        sample_M=torch.zeros(rounds, dtype=torch.long, device=rank_BL.device),
        clean=True,
    )
    logprob_K = trajectory.logprob_BL[views.row_K, views.position_K]
    return replace(views, behaviour_K=logprob_K, count_B=action_BL.sum(dim=1), recorded=merge == 1)


def _rounds(knobs: Mapping[str, Any], steps: int, length: int) -> int:
    return min(steps, -(-min(knobs["size"], length) // knobs["merge"]))


sliced.canvases = _rounds  # type: ignore[attr-defined]


def _check_order(trajectory: Trajectory, part_BL: Tensor) -> None:
    """Raise RecipeError unless every block was finished before the next was begun."""
    sampled_BL, born_BL = trajectory.source_BL == SAMPLED, trajectory.born_BL.long()
    shape = (len(trajectory), int(part_BL.max()) + 1)
    last_BP = torch.full(shape, -1, device=born_BL.device)
    last_BP.scatter_reduce_(1, part_BL, torch.where(sampled_BL, born_BL, -1), "amax")
    latest = torch.iinfo(torch.long).max
    first_BP = torch.full(shape, latest, device=born_BL.device)
    first_BP.scatter_reduce_(1, part_BL, torch.where(sampled_BL, born_BL, latest), "amin")
    if bool((first_BP[:, 1:] <= last_BP.cummax(dim=1).values[:, :-1]).any()):
        raise RecipeError(
            "objective.estimator: 'sliced' needs rollouts that fill the model's blocks one after the other; set the "
            "schedule to blocks of the model's block length and objective.estimator.size to the same, or use trace."
        )
