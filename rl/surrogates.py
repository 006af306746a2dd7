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
