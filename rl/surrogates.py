"""Surrogates: the loss of a unit from its log importance ratio log rho and its advantage A."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError

surrogate = SLOTS["surrogate"]


@surrogate.register
def importance(log_ratio_U: Tensor, advantage_U: Tensor) -> Tensor:
    """-rho A: the exact off-policy objective where a unit is a whole rollout; nothing bounds rho."""
    return -log_ratio_U.exp() * advantage_U


@surrogate.register
def ppo_clip(log_ratio_U: Tensor, advantage_U: Tensor, *, low: float = 0.2, high: float = 0.2) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) (Schulman et al. 2017, eq. 7; two widths as in DAPO).

    The ratio is bounded in log space on the one side that the minimum can select, so that a clipped unit has gradient 0
    even where rho overflows.
    """
    if not 0 < low <= 1:
        raise RecipeError(f"surrogate.low: {low} must lie in (0, 1], the ratio is clipped at 1 - low.")
    if not 0 < high < math.inf:
        raise RecipeError(f"surrogate.high: {high} must be positive and finite, the ratio is clipped at 1 + high.")
    floor = math.log1p(-low) if low < 1 else -math.inf
    above_U = log_ratio_U.clamp(max=math.log1p(high))
    below_U = log_ratio_U.clamp(min=floor)
    return -torch.where(advantage_U >= 0, above_U, below_U).exp() * advantage_U


@surrogate.register
def dual_clip(
    log_ratio_U: Tensor, advantage_U: Tensor, *, low: float = 0.2, high: float = 0.2, ceiling: float = 3.0
) -> Tensor:
    """`ppo_clip`, and for negative advantages at most -ceiling A (Ye et al. 2020): rho there is bounded too."""
    if not 1 + high < ceiling < math.inf:
        raise RecipeError(f"surrogate.ceiling: {ceiling} must be finite and above 1 + high, {1 + high}.")
    bounded_U = torch.where(advantage_U < 0, log_ratio_U.clamp(max=math.log(ceiling)), log_ratio_U)
    return ppo_clip(bounded_U, advantage_U, low=low, high=high)


@surrogate.register
def cispo(log_ratio_U: Tensor, advantage_U: Tensor, *, high: float = 1.28) -> Tensor:
    """-stop(min(rho, high)) A log rho (MiniMax-M1, 2025): every unit has a gradient, its weight is bounded."""
    if not 0 < high < math.inf:
        raise RecipeError(f"surrogate.high: {high} must be positive and finite, it is the largest weight.")
    return -log_ratio_U.detach().clamp(max=math.log(high)).exp() * advantage_U * log_ratio_U


@surrogate.register
def linear_bound(log_ratio_U: Tensor, advantage_U: Tensor, *, ceiling: float = 3.0) -> Tensor:
    """-A (1 + log rho) for A >= 0, -A min(rho, ceiling) else: BGPO's lower bound of rho A (likelihood_rl.md, A7).

    Linear in each draw of the estimate, so that the draws may be units of their own. Finite for every log rho (the
    released code takes exp(log(1 + log rho)), which is NaN below -1).
    """
    if not 1 < ceiling < math.inf:
        raise RecipeError(f"surrogate.ceiling: {ceiling} must be finite and above 1, it bounds rho for A < 0.")
    falling_U = log_ratio_U.clamp(max=math.log(ceiling)).exp()
    return -advantage_U * torch.where(advantage_U >= 0, 1 + log_ratio_U, falling_U)


@surrogate.register
def weighted_likelihood(log_ratio_U: Tensor, advantage_U: Tensor) -> Tensor:
    """-A log rho: the bound itself weighted by the advantage, no ratio (wd1, SPG; with `old: none`)."""
    return -advantage_U * log_ratio_U
