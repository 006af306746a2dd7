"""Estimators: which canvases of a rollout are scored, and on which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from ..rollouts.noise import uniform
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import SAMPLED, Actions, Trajectory
from .views import Views

estimator = SLOTS["estimator"]


@estimator.register
def trace(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    steps: Literal["all", "uniform_k"] = "all",
    k: int | None = None,
    merge: int = 1,
    block: int | None = None,
    tokens: Literal["until_eos", "all"] = "until_eos",
) -> Views:
    """Every token on the very canvas it was drawn on: log p(trajectory) = sum over steps of their actions' log-probs.

    With `tokens` `all` the policy gradient is unbiased (samplers.md sections 1.1-1.3); `until_eos` leaves out what lies
    behind the first EOS, unbiased where nothing there changes what comes before it. Only steps that commit an action
    count as views. `uniform_k` keeps k of a rollout's S_b views, drawn uniformly without replacement, each with
    inclusion probability min(1, k / S_b) (trajectory_rl.md section 8); the draw is keyed by rollout id and step, so
    batch composition and ranks do not change it. `context` is the sampler; where it draws before it selects and records
    that exactly, the choice of positions is an action as well.

    `merge` > 1 scores the tokens of that many consecutive steps on the canvas before the first of them, inside each
    `block` of positions where one is given: fewer forwards, biased by what the canvases lack (TraceRL's shrinkage,
    trajectory_rl.md section 6.3). The rollout has no log-probs on them, and no choice of positions is scored.
    """
    check_steps(steps, k)
    actions = trajectory.actions(tokens)
    row_K, position_K, _, target_K, logprob_K = actions
    step_K, part_K, parts = merged(trajectory, actions, merge, block)
    stride = int(trajectory.steps_B.max()) + 1 if len(trajectory) else 1
    key_K = (row_K * stride + step_K) * parts + part_K
    if merge > 1:
        order_K = torch.argsort(key_K * trajectory.canvas + position_K)
        row_K, position_K, target_K, logprob_K, key_K = (
            x[order_K] for x in (row_K, position_K, target_K, logprob_K, key_K)
        )
    key_N, view_K = torch.unique_consecutive(key_K, return_inverse=True)
    row_N, step_N = key_N // parts // stride, key_N // parts % stride
    views = Views(
        trajectory=trajectory,
        row_N=row_N,
        step_N=step_N,
        inclusion_N=torch.ones(len(row_N), device=row_N.device),
        view_K=view_K,
        position_K=position_K,
        target_K=target_K,
        behaviour_K=logprob_K,
        count_B=torch.bincount(row_K, minlength=len(trajectory)),
        views_B=torch.bincount(row_N, minlength=len(trajectory)),
        sampler=context if context is not None and context.exact_choice and merge == 1 else None,
        recorded=merge == 1,
    )
    return views if k is None else uniform_k(views, k, rng)


def most_canvases(choice: Mapping[str, Any], steps: int, length: int) -> int:
    """Return on how many canvases at most an estimator (name and knobs) scores a rollout of `steps` steps.

    A user's estimator says so by an attribute `canvases(knobs, steps, length)`; without one, one a step is assumed.
    """
    count = getattr(estimator.get(choice["name"]), "canvases", None)
    return steps if count is None else count(choice, steps, length)


def _merged_steps(knobs: Mapping[str, Any], steps: int, length: int) -> int:
    merged = steps if knobs["block"] else -(-steps // knobs["merge"])
    return min(merged, knobs["k"] or merged)


trace.canvases = _merged_steps  # type: ignore[attr-defined]


def check_steps(steps: str, k: int | None, allowed: tuple[str, ...] = ("all", "uniform_k")) -> None:
    """Raise RecipeError unless a choice of k steps, and nothing else, comes with a positive k."""
    if steps not in allowed:
        raise RecipeError(f"estimator.steps: '{steps}' is not one of {', '.join(allowed)}.")
    if steps == "all" and k is not None:
        raise RecipeError(f"estimator.k: {k} has no effect with steps 'all'; set steps to {' or '.join(allowed[1:])}.")
    if steps != "all" and (k is None or k < 1):
        raise RecipeError(f"estimator.k: {k} must be at least 1; {steps} needs the number of steps to keep.")


def uniform_k(views: Views, k: int, rng: torch.Generator | None) -> Views:
    """Keep min(k, S_b) views of every rollout, uniformly without replacement, with their inclusion probability."""
    assert rng is not None, "uniform_k draws and needs a generator"
    seed = int(torch.randint(2**62, (), generator=rng))
    noise_N = uniform(seed, "uniform_k", 0, views.trajectory.rollout_id_B[views.row_N], views.step_N)
    order_N = torch.argsort(noise_N)
    order_N = order_N[torch.argsort(views.row_N[order_N], stable=True)]
    first_B = views.views_B.cumsum(0) - views.views_B
    place_N: Tensor = torch.arange(len(order_N), device=order_N.device) - first_B[views.row_N]
    keep_N = torch.zeros_like(views.row_N, dtype=torch.bool)
    keep_N[order_N] = place_N < k
    kept = views.where(keep_N)
    inclusion_N = (k / views.views_B[kept.row_N]).clamp(max=1.0)
    return replace(kept, inclusion_N=inclusion_N)


def merged(trajectory: Trajectory, actions: Actions, merge: int, block: int | None) -> tuple[Tensor, Tensor, int]:
    """Return (`step_K`, `part_K`, number of parts): the first of the merged steps of each action, and its block.

    The distinct steps of a rollout, or of each block of it, are taken `merge` at a time in their order; those that
    committed only what lies behind an EOS count.
    """
    if merge < 1 or (block is not None and block < 1):
        raise RecipeError(f"estimator.merge, block: {merge} and {block} must be at least 1.")
    if merge == 1:
        return actions.step_K, torch.zeros_like(actions.step_K), 1
    check_unrevised(trajectory, "merged steps")
    rank_BL, part_BL = ranks(trajectory, block)
    stride = int(rank_BL.max()) // merge + 1
    parts = int(part_BL.max()) + 1
    # The first step of each group of each part, over all tokens that a step drew.
    sampled_BL = trajectory.source_BL == SAMPLED
    row_BL = torch.arange(len(trajectory), device=rank_BL.device)[:, None].expand_as(rank_BL)
    group_BL = (row_BL * parts + part_BL) * stride + rank_BL.clamp(min=0) // merge
    first = torch.full((len(trajectory) * parts * stride,), torch.iinfo(torch.long).max, device=rank_BL.device)
    first.scatter_reduce_(0, group_BL[sampled_BL], trajectory.born_BL[sampled_BL].long(), "amin")
    place_K = actions.row_K, actions.position_K
    return first[group_BL[place_K]], part_BL[place_K], parts


def ranks(trajectory: Trajectory, block: int | None) -> tuple[Tensor, Tensor]:
    """Return (`rank_BL`, `part_BL`): the place of a token's step among the distinct ones of its part, and the part.

    Parts are blocks of `block` positions on the model's own borders, or the whole canvas; the place is -1 where no step
    drew a token.
    """
    length, sampled_BL = trajectory.canvas, trajectory.source_BL == SAMPLED
    place_BL = torch.arange(length, device=sampled_BL.device).expand_as(sampled_BL)
    if trajectory.offset_B is not None:
        place_BL = place_BL + trajectory.offset_B[:, None]
    part_BL = torch.zeros_like(place_BL) if block is None else place_BL // block
    row_K, position_K = sampled_BL.nonzero(as_tuple=True)
    stride = int(trajectory.steps_B.max()) + 1 if len(trajectory) else 1
    cell_K = row_K * (int(part_BL.max()) + 1 if part_BL.numel() else 1) + part_BL[row_K, position_K]
    key_U, index_K = torch.unique(cell_K * stride + trajectory.born_BL[row_K, position_K], return_inverse=True)
    cell_U = key_U // stride
    rank_U = torch.arange(len(key_U), device=key_U.device) - torch.searchsorted(cell_U, cell_U)
    rank_BL = torch.full_like(place_BL, -1)
    rank_BL[row_K, position_K] = rank_U[index_K]
    return rank_BL, part_BL


def check_unrevised(trajectory: Trajectory, what: str) -> None:
    """Raise RecipeError for rollouts whose tokens were taken back or edited, or whose canvases changed their length."""
    if trajectory.retracted is not None or trajectory.length_BS is not None:
        raise RecipeError(
            f"objective.estimator: {what} need a sampler that takes nothing back and keeps its length; drop remasking, "
            "editing and length, or score every step (merge 1)."
        )
