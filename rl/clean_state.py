"""The estimator of RLDF: what a step had not decided yet, scored as it turned out, on the canvas that the step saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.noise import uniform
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from .estimators import check_unrevised, estimator, trace
from .views import Views


@estimator.register
def clean_state(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner_step: tuple[int, int] = (0, 1),
    k: int = 4,
    temperature: float = 1.0,
    tokens: Literal["until_eos", "all"] = "until_eos",
) -> Views:
    """The final tokens of every position that was masked, on the canvas of k steps of a rollout (RLDF).

    Steps are drawn without replacement, t with weight exp(-mean log p of its tokens / temperature) by the rollout's own
    log-probs: those at which it was least sure come more often, and nothing makes up for it. A rollout of fewer steps
    has all of them. The draw is keyed by rollout id and step. Tokens of later steps are scored as if drawn here, so
    that the rollout has no log-probs of its own on these canvases.
    """
    if k < 1 or not temperature > 0:
        raise RecipeError(f"estimator.k, temperature: {k} must be at least 1, and {temperature} positive.")
    check_unrevised(trajectory, "clean states")
    assert rng is not None, "clean_state draws and needs a generator"
    steps = trace(trajectory, rng=None, tokens=tokens)
    logprob_N = steps.behaviour_K.new_zeros(len(steps)).index_add(0, steps.view_K, steps.behaviour_K)
    unsure_N = -logprob_N.double() / torch.bincount(steps.view_K, minlength=len(steps))
    chosen_N = _drawn(steps, unsure_N / temperature, k, int(torch.randint(2**62, (), generator=rng)))
    row_N, step_N = steps.row_N[chosen_N], steps.step_N[chosen_N]
    left_NL = trajectory.action_BL(tokens)[row_N] & (trajectory.born_BL[row_N] >= step_N[:, None])
    view_K, position_K = left_NL.nonzero(as_tuple=True)
    row_K = row_N[view_K]
    place = torch.unique(row_K * trajectory.canvas + position_K)
    return Views(
        trajectory=trajectory,
        row_N=row_N,
        step_N=step_N,
        inclusion_N=torch.ones(len(row_N), device=row_N.device),
        view_K=view_K,
        position_K=position_K,
        target_K=trajectory.tokens_BL[row_K, position_K],
        behaviour_K=trajectory.logprob_BL[row_K, position_K],
        count_B=torch.bincount(place // trajectory.canvas, minlength=len(trajectory)),
        views_B=torch.bincount(row_N, minlength=len(trajectory)),
        recorded=False,
    )


def _drawn(steps: Views, score_N: Tensor, k: int, seed: int) -> Tensor:
    """Return which steps are among the k of their rollout with the largest score + Gumbel noise.

    These are k draws without replacement, each with a weight of exp(score).
    """
    noise_N = uniform(seed, "clean_state", 0, steps.trajectory.rollout_id_B[steps.row_N], steps.step_N)
    order_N = torch.argsort(score_N - (-noise_N.double().log()).log(), descending=True, stable=True)
    order_N = order_N[torch.argsort(steps.row_N[order_N], stable=True)]
    first_B = steps.views_B.cumsum(0) - steps.views_B
    place_N = torch.arange(len(order_N), device=order_N.device) - first_B[steps.row_N]
    return torch.zeros_like(order_N, dtype=torch.bool).index_put((order_N,), place_N < k)


def _chosen_steps(knobs: Mapping[str, Any], steps: int, length: int) -> int:
    return min(steps, knobs["k"])


clean_state.canvases = _chosen_steps  # type: ignore[attr-defined]
