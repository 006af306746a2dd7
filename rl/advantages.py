"""Advantages: how much better a rollout did than the other rollouts of its group (prompt), by group id.

Shapes: `reward_B` and `group_B` (any integers, in any order, groups of any size, whole on one rank) give
`advantage_B` in the reward's dtype. A NaN reward does not apply: it enters no mean, and its advantage is NaN, which the
objective reads as "no gradient and no weight". Sums run in float64, so that equal rewards give exactly 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .distributed import total

advantage = SLOTS["advantage"]


@advantage.register
def group_mean(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """r - mean(r) (Dr. GRPO, Liu et al. 2025; CJ-GRPO)."""
    value_B, applies_B, index_B = _prepare(reward_B, group_B)
    return _finish(value_B - _mean(value_B, applies_B, index_B), reward_B, applies_B)


@advantage.register
def group_std(reward_B: Tensor, group_B: Tensor, *, eps: float = 1e-4, sample: bool = True) -> Tensor:
    """(r - mean(r)) / (std(r) + eps) (GRPO, Shao et al. 2024).

    The standard deviation is the sample's (n - 1, as in GRPO's released implementations), or the population's (n, as in
    TraceRL) with `sample` false; it is 0 for a group of one.
    """
    if eps < 0:
        raise RecipeError(f"advantage.eps: {eps} must be at least 0.")
    value_B, applies_B, index_B = _prepare(reward_B, group_B)
    centred_B = (value_B - _mean(value_B, applies_B, index_B)) * applies_B
    count_B = _sum(applies_B.double(), index_B)
    std_B = (_sum(centred_B.square(), index_B) / (count_B - int(sample)).clamp(min=1)).sqrt()
    # With eps 0 a group of equal rewards is 0 / 0, and its advantage is 0.
    scaled_B = torch.where(centred_B == 0, 0.0, centred_B / (std_B + eps))
    return _finish(scaled_B, reward_B, applies_B)


@advantage.register
def leave_one_out(reward_B: Tensor, group_B: Tensor) -> Tensor:
    """r - mean of the *other* rewards of the group (RLOO, Ahmadian et al. 2024); 0 for a group of one."""
    value_B, applies_B, index_B = _prepare(reward_B, group_B)
    others_B = _sum(applies_B.double(), index_B) - 1
    baseline_B = (_sum(value_B * applies_B, index_B) - value_B) / others_B.clamp(min=1)
    return _finish(torch.where(others_B > 0, value_B - baseline_B, 0.0), reward_B, applies_B)


@advantage.register
def batch_std(reward_B: Tensor, group_B: Tensor, *, eps: float = 1e-4) -> Tensor:
    """(r - mean of the group) / (std over all groups of all ranks + eps) (REINFORCE++-baseline, Hu 2025)."""
    if eps < 0:
        raise RecipeError(f"advantage.eps: {eps} must be at least 0.")
    value_B, applies_B, index_B = _prepare(reward_B, group_B)
    centred_B = (value_B - _mean(value_B, applies_B, index_B)) * applies_B
    std = math.sqrt(total(float(centred_B.square().sum())) / max(total(float(applies_B.sum())) - 1, 1))
    return _finish(torch.where(centred_B == 0, 0.0, centred_B / (std + eps)), reward_B, applies_B)


@advantage.register
def softmax_pair(reward_B: Tensor, group_B: Tensor, *, temperature: float = 1.0) -> Tensor:
    """n (softmax(A / t) - softmax(-A / t)) over the group's n rows, A = r - mean(r) (wd1).

    A mean over rollouts is then the mean over groups of what wd1 sums; 0 where all rewards are equal.
    """
    if not temperature > 0:
        raise RecipeError(f"advantage.temperature: {temperature} must be positive.")
    value_B, applies_B, index_B = _prepare(reward_B, group_B)
    centred_B = (value_B - _mean(value_B, applies_B, index_B)) / temperature

    def share(score_B: Tensor) -> Tensor:
        score_B = torch.where(applies_B, score_B, -torch.inf)
        top_B = torch.full_like(score_B, -torch.inf).scatter_reduce(0, index_B, score_B, "amax")[index_B]
        power_B = torch.where(applies_B, (score_B - top_B).exp(), 0.0)
        return power_B / _sum(power_B, index_B).clamp(min=1.0)  # the largest adds 1

    pair_B = share(centred_B) - share(-centred_B)
    return _finish(pair_B * _sum(applies_B.double(), index_B), reward_B, applies_B)


def _prepare(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (reward with 0 for NaN, which apply, dense group index); ValueError for infinite rewards."""
    if reward_B.shape != group_B.shape:
        shapes = f"{tuple(reward_B.shape)} and {tuple(group_B.shape)}"
        raise ValueError(f"advantage: rewards and group ids have shapes {shapes}; one of each a rollout is needed.")
    if bool(reward_B.isinf().any()):
        row = int(reward_B.isinf().nonzero()[0])
        raise ValueError(f"advantage: the reward of row {row} is {reward_B[row].item()}; rewards are finite or None.")
    applies_B = ~reward_B.isnan()
    return reward_B.double().nan_to_num(0.0), applies_B, torch.unique(group_B, return_inverse=True)[1]


def _sum(value_B: Tensor, index_B: Tensor) -> Tensor:
    """Return each row's group sum."""
    return torch.zeros_like(value_B).index_add(0, index_B, value_B)[index_B]


def _mean(value_B: Tensor, applies_B: Tensor, index_B: Tensor) -> Tensor:
    """Return each row's group mean over the rows that apply (0 where none does)."""
    return _sum(value_B * applies_B, index_B) / _sum(applies_B.double(), index_B).clamp(min=1)


def _finish(advantage_B: Tensor, reward_B: Tensor, applies_B: Tensor) -> Tensor:
    return torch.where(applies_B, advantage_B, torch.nan).to(reward_B.dtype)
