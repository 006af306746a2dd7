"""The estimator of MDPO: all that a step drew, scored on the canvas it was drawn on, for the steps that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from . import blockwise, clean_state, slices  # noqa: F401 (importing registers the other estimators)
from .credit import Credit
from .estimators import check_steps, estimator, uniform_k
from .views import Views

STEPS = ("all", "uniform_k", "top_k")


@estimator.register
def drafts(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    credit: Credit | None = None,
    steps: Literal["all", "uniform_k", "top_k"] = "all",
    k: int | None = None,
    within: Literal["window", "canvas"] = "window",
) -> Views:
    """All tokens that a step drew, kept or not, on the canvas it saw: the exact log p of the rollout with its drafts.

    The order in which drawn tokens are kept counts as part of the environment (trajectory_rl.md, section 0). `within`
    the `window` leaves out draws that the step could not have kept, which say nothing about the rollout; `canvas`
    scores all. `top_k` keeps the k steps of each rollout whose advantages are largest in size, biased and cheap (MDPO);
    `uniform_k` is unbiased. A forward a step. The factor of a token is L / masked positions of the canvas, which makes
    the sum over a canvas an estimate of the ELBO.
    """
    check_steps(steps, k, STEPS)
    if trajectory.draft_BSL is None or trajectory.draft_logprob_BSL is None or trajectory.draft_window_BSL is None:
        raise RecipeError("objective.estimator: 'drafts' needs rollouts that recorded them (RolloutWorker.drafts).")
    drawn_BSL = trajectory.draft_BSL != trajectory.mask_token_id
    scored_BSL = drawn_BSL & trajectory.draft_window_BSL if within == "window" else drawn_BSL
    seen_BS = scored_BSL.any(dim=2)
    views_B = seen_BS.sum(dim=1)
    if steps == "top_k":
        assert k is not None
        seen_BS = seen_BS & _largest(_strength(credit, seen_BS), k)
        views_B = seen_BS.sum(dim=1)
    row_N, step_N = seen_BS.nonzero(as_tuple=True)
    view_K, position_K = scored_BSL[row_N, step_N].nonzero(as_tuple=True)
    row_K, step_K = row_N[view_K], step_N[view_K]
    masked_N = drawn_BSL[row_N, step_N].sum(dim=1)
    views = Views(
        trajectory=trajectory,
        row_N=row_N,
        step_N=step_N,
        inclusion_N=torch.ones(len(row_N), device=row_N.device),
        view_K=view_K,
        position_K=position_K,
        target_K=trajectory.draft_BSL[row_K, step_K, position_K].long(),
        behaviour_K=trajectory.draft_logprob_BSL[row_K, step_K, position_K],
        count_B=torch.bincount(row_K, minlength=len(trajectory)),
        views_B=views_B,
        factor_K=(trajectory.canvas / masked_N)[view_K],
    )
    return uniform_k(views, k, rng) if steps == "uniform_k" and k is not None else views


def _chosen_steps(knobs: Mapping[str, Any], steps: int, length: int) -> int:
    return min(steps, knobs["k"] or steps)


drafts.needs_drafts = True  # type: ignore[attr-defined]
drafts.canvases = _chosen_steps  # type: ignore[attr-defined]


def _strength(credit: Credit | None, seen_BS: Tensor) -> Tensor:
    """Return the size of each step's advantage, -1 where there is none or nothing to score."""
    if credit is None or credit.by != "step":
        raise RecipeError("objective.estimator: steps 'top_k' ranks the advantages of steps; use step_difference.")
    width = seen_BS.shape[1]
    size_BS = torch.nn.functional.pad(credit.value.abs()[:, :width], (0, max(width - credit.value.shape[1], 0)))
    return size_BS.nan_to_num(-1.0).masked_fill(~seen_BS, -1.0)


def _largest(size_BS: Tensor, k: int) -> Tensor:
    """Return which k entries of each row are largest, the earlier of equal ones, without negative ones."""
    order_BS = torch.argsort(size_BS, dim=1, descending=True, stable=True)
    place_BS = torch.argsort(order_BS, dim=1)
    return (place_BS < k) & (size_BS >= 0)
