"""Advantages: how much better a rollout did than the other rollouts of its group (prompt), by group id.

Shapes: `reward_B` and `group_B` (any integers, in any order, groups of any size, whole on one rank) give
`advantage_B` in the reward's dtype. A NaN reward does not apply: it enters no mean, and its advantage is NaN, which the
objective reads as "no gradient and no weight". Sums run in float64, so that equal rewards give exactly 0.

An advantage marked `by` = "step" takes the rewards of the drafts of every step, `reward_BS` with NaN behind a rollout's
last step, and gives `advantage_BS`.
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


@advantage.register
def step_difference(reward_BS: Tensor, group_B: Tensor, *, eps: float = 1e-4) -> Tensor:
    """(A - mean(A)) / (std(A) + eps) a step over the group, A_s = r_s - r_{s-1} + mean of the later r (MDPO).

    r_s is the reward of the draft of step s, r_{-1} = 0, and the last step has r_s for the mean of later ones; std is
    the sample's. A rollout that has finished counts in the group's later steps as one that keeps its answer: A = r of
    its last step. A step whose reward does not apply (NaN) is left out: the next is compared with the one before it.
    Rewards `[B]` are those of one step.
    """
    if eps < 0:
        raise RecipeError(f"advantage.eps: {eps} must be at least 0.")
    _check(reward_BS, group_B)
    if reward_BS.dim() == 1:
        return step_difference(reward_BS[:, None], group_B, eps=eps)[:, 0]
    index_B = torch.unique(group_B, return_inverse=True)[1]
    raw_BS, member_BS, known_BS = _differences(reward_BS.double())

    def summed(value_BS: Tensor) -> Tensor:
        return torch.zeros_like(value_BS).index_add(0, index_B, value_BS)[index_B]

    def extreme(how: str, empty: float) -> Tensor:
        table_BS = torch.where(member_BS, raw_BS, empty)
        index_BS = index_B[:, None].expand_as(table_BS)
        return torch.full_like(table_BS, empty).scatter_reduce(0, index_BS, table_BS, how)[index_B]

    count_BS = summed(member_BS.double())
    centred_BS = (raw_BS - summed(raw_BS * member_BS) / count_BS.clamp(min=1)) * member_BS
    std_BS = (summed(centred_BS.square()) / (count_BS - 1).clamp(min=1)).sqrt()
    # Means of later rewards are no binary fractions: among equal ones a rounding error would remain.
    equal_BS = extreme("amin", torch.inf) >= extreme("amax", -torch.inf)
    scaled_BS = torch.where(equal_BS | (centred_BS == 0), 0.0, centred_BS / (std_BS + eps))
    return torch.where(known_BS, scaled_BS, torch.nan).to(reward_BS.dtype)


step_difference.by = "step"  # type: ignore[attr-defined]
COMPARING = (group_mean, group_std, leave_one_out, step_difference)  # those that say nothing about a group of one


def _differences(reward_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A of MDPO before it is normalised, which steps count in a group, and which have a reward of their own."""
    known_BS, value_BS = ~reward_BS.isnan(), reward_BS.nan_to_num(0.0)
    place_S = torch.arange(reward_BS.shape[1], device=reward_BS.device)
    latest_BS = torch.where(known_BS, place_S, -1).cummax(dim=1).values
    held_BS = torch.where(latest_BS >= 0, value_BS.gather(1, latest_BS.clamp(min=0)), 0.0)
    before_BS = torch.nn.functional.pad(held_BS[:, :-1], (1, 0))
    # Sums over the steps from s on, less the step's own.
    later_BS = value_BS.flip(1).cumsum(1).flip(1) - value_BS
    count_BS = known_BS.double().flip(1).cumsum(1).flip(1) - known_BS.double()
    future_BS = torch.where(count_BS > 0, later_BS / count_BS.clamp(min=1), held_BS)
    finished_BS = (count_BS == 0) & ~known_BS & (latest_BS >= 0)
    return held_BS - before_BS + future_BS, known_BS | finished_BS, known_BS


def _prepare(reward_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (reward with 0 for NaN, which apply, dense group index); ValueError for infinite rewards."""
    _check(reward_B, group_B)
    applies_B = ~reward_B.isnan()
    return reward_B.double().nan_to_num(0.0), applies_B, torch.unique(group_B, return_inverse=True)[1]


def _check(reward: Tensor, group_B: Tensor) -> None:
    """Raise ValueError for rewards that are infinite or not one (a step) a rollout."""
    if reward.shape[:1] != group_B.shape:
        shapes = f"{tuple(reward.shape)} and {tuple(group_B.shape)}"
        raise ValueError(f"advantage: rewards and group ids have shapes {shapes}; one of each a rollout is needed.")
    if bool(reward.isinf().any()):
        place = tuple(reward.isinf().nonzero()[0].tolist())
        raise ValueError(
            f"advantage: the reward of row {place[0]} is {reward[place].item()}; rewards are finite or None."
        )


def _sum(value_B: Tensor, index_B: Tensor) -> Tensor:
    """Return each row's group sum."""
    return torch.zeros_like(value_B).index_add(0, index_B, value_B)[index_B]


def _mean(value_B: Tensor, applies_B: Tensor, index_B: Tensor) -> Tensor:
    """Return each row's group mean over the rows that apply (0 where none does)."""
    return _sum(value_B * applies_B, index_B) / _sum(applies_B.double(), index_B).clamp(min=1)


def _finish(advantage_B: Tensor, reward_B: Tensor, applies_B: Tensor) -> Tensor:
    return torch.where(applies_B, advantage_B, torch.nan).to(reward_B.dtype)
