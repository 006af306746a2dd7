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
from ..rollouts.trajectory import Trajectory
from .views import Views

estimator = SLOTS["estimator"]


@estimator.register
def trace(
    trajectory: Trajectory,
    *,
    rng: torch.Generator | None,
    context: Sampler | None = None,
    inner: tuple[int, int] = (0, 1),
    steps: Literal["all", "uniform_k"] = "all",
    k: int | None = None,
    tokens: Literal["until_eos", "all"] = "until_eos",
) -> Views:
    """Every token on the very canvas it was drawn on: log p(trajectory) = sum over steps of their actions' log-probs.

    With `tokens` `all` the policy gradient is unbiased (samplers.md sections 1.1-1.3); `until_eos` leaves out what lies
    behind the first EOS, unbiased where nothing there changes what comes before it. Only steps that commit an action
    count as views. `uniform_k` keeps k of a rollout's S_b views, drawn uniformly without replacement, each with
    inclusion probability min(1, k / S_b) (trajectory_rl.md section 8); the draw is keyed by rollout id and step, so
    batch composition and ranks do not change it. `context` is the sampler; where it draws before it selects and records
    that exactly, the choice of positions is an action as well.
    """
    check_steps(steps, k)
    row_K, position_K, born_K, target_K, logprob_K = trajectory.actions(tokens)
    stride = int(trajectory.steps_B.max()) + 1 if len(trajectory) else 1
    key_N, view_K = torch.unique_consecutive(row_K * stride + born_K, return_inverse=True)
    row_N, step_N = key_N // stride, key_N % stride
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
        sampler=context if context is not None and context.exact_choice else None,
    )
    return views if k is None else uniform_k(views, k, rng)


def most_canvases(choice: Mapping[str, Any], steps: int, length: int) -> int:
    """Return on how many canvases at most an estimator (name and knobs) scores a rollout of `steps` steps.

    A user's estimator says so by an attribute `canvases(knobs, steps, length)`; without one, one a step is assumed.
    """
    count = getattr(estimator.get(choice["name"]), "canvases", None)
    return steps if count is None else count(choice, steps, length)


trace.canvases = lambda knobs, steps, length: min(steps, knobs["k"] or steps)  # type: ignore[attr-defined]


def check_steps(steps: str, k: int | None) -> None:
    """Raise RecipeError unless `uniform_k`, and nothing else, comes with a positive k."""
    if steps not in ("all", "uniform_k"):
        raise RecipeError(f"estimator.steps: '{steps}' is not one of all, uniform_k.")
    if steps == "all" and k is not None:
        raise RecipeError(f"estimator.k: {k} has no effect with steps 'all'; set steps to uniform_k.")
    if steps == "uniform_k" and (k is None or k < 1):
        raise RecipeError(f"estimator.k: {k} must be at least 1; uniform_k needs the number of steps to draw.")


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
