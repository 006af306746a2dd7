"""Filters: which groups of rollouts are worth an update.

A filter maps which rollouts were right (`right_B`), their rewards (NaN: does not apply) and their groups to `kept_B`,
the same for all rollouts of a group. Sums are over ids, so that groups may have any size and order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError

filter_ = SLOTS["filter"]


@filter_.register
def signal(right_B: Tensor, reward_B: Tensor, group_B: Tensor) -> Tensor:
    """Groups whose rewards are not all equal: with the others every advantage is 0 (DAPO, Yu et al. 2025)."""
    groups, index_B = torch.unique(group_B, return_inverse=True)
    known_B, reward_B = ~reward_B.isnan(), reward_B.nan_to_num(0.0)

    def extreme(start: float, how: str) -> Tensor:
        table_G = torch.full((len(groups),), start, dtype=reward_B.dtype)
        return table_G.scatter_reduce(0, index_B[known_B], reward_B[known_B], how)

    return (extreme(-torch.inf, "amax") > extreme(torch.inf, "amin"))[index_B]


@filter_.register
def accuracy(right_B: Tensor, reward_B: Tensor, group_B: Tensor, *, low: float = 0.2, high: float = 0.8) -> Tensor:
    """Groups of which a share in [`low`, `high`] is right: neither too hard nor too easy.

    TraceRL keeps tasks in [0.2, 0.8] (trajectory_rl.md section 6.2).
    """
    if not 0 <= low <= high <= 1:
        raise RecipeError(f"exploration.filter.low, high: {low}, {high} must satisfy 0 <= low <= high <= 1.")
    groups, index_B = torch.unique(group_B, return_inverse=True)
    right_G = torch.zeros(len(groups), dtype=torch.float64).index_add(0, index_B, right_B.double())
    share_G = right_G / torch.bincount(index_B, minlength=len(groups))
    return ((share_G >= low) & (share_G <= high))[index_B]
