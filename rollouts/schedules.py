"""Schedules: which masked positions are open to a step, and how many of them it commits.

A schedule sees which positions are masked, the step and how many were open at the start; one that declares `state` gets
the `State` too (None where a recorded canvas is replayed and nothing else of it is known). With an attribute `narrows`
(state, quota, acts_A, knobs -> Quota) a schedule has a second word once the step is measured, in the rows that may act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .state import State
from .traits import bare, knobs_of

schedule = SLOTS["schedule"]


class Quota(NamedTuple):
    """What a schedule opens to a step.

    `window_BL`: masked positions that may be committed; `count_B`: how many, before the selection's say; `region_BL`:
    the positions, decided ones included, that the step works on (None: the canvas).
    """

    window_BL: Tensor
    count_B: Tensor
    region_BL: Tensor | None = None


def narrowed(part: Callable[..., Any], state: State, acts_A: Tensor) -> Quota:
    """Return the quota of a measured step: what the schedule `part` narrows it to in rows `acts_A`, if it does."""
    assert state.quota is not None
    rule = getattr(bare(part), "narrows", None)
    return state.quota if rule is None else rule(state, state.quota, acts_A, **knobs_of(part))


@schedule.register
def uniform(masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, steps: int) -> Quota:
    """The whole canvas, an even share a step, larger shares first: n_j = m // S + [j < m mod S].

    A row keeps its plan whatever else is in the batch: only its own masks and step count.
    """
    check_count("steps", steps)
    left_B = (steps - step_B).clamp(min=1)
    return Quota(masked_BL, (masked_BL.sum(1) + left_B - 1) // left_B)


@schedule.register
def cosine(masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, steps: int) -> Quota:
    """The whole canvas; after step t, floor(m cos(pi/2 (t+1)/S)) positions stay masked (MaskGIT, Chang et al. 2022).

    `open_B` is m, the positions that were open at the start. A step whose share is 0 commits one all the same.
    """
    check_count("steps", steps)
    # fp64 and a hair: cos(pi/3) is 0.49999997 in fp32, and its floor one position too few.
    ratio_B = torch.cos(math.pi / 2 * ((step_B.double() + 1) / steps).clamp(max=1.0)).clamp(min=0.0)
    stay_B = torch.floor(open_B * ratio_B + 1e-9).long()
    return Quota(masked_BL, masked_BL.sum(1) - stay_B)


@schedule.register
def whole(masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, per_step: int = 1) -> Quota:
    """The whole canvas, `per_step` positions a step: one of them is the first-hitting sampler's pace.

    That one (Zheng et al. 2024, arXiv 2409.02908) draws the times at which a masked diffusion opens its positions; a
    denoiser that is not told the time makes them needless, and with score `random` it is exact, at one call a token.
    """
    check_count("per_step", per_step)
    return Quota(masked_BL, masked_BL.sum(1).clamp(max=per_step))


@schedule.register
def blocks(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    size: int,
    per_step: int | None = None,
    steps: int | None = None,
    state: State | None = None,
) -> Quota:
    """Blocks of `size` from left to right, each finished before the next (semi-autoregressive, LLaDA section 2.4).

    `per_step` tokens a step, or `steps` for the whole canvas: then a block takes S_b = steps // (L / size) steps of
    n_j = size // S_b + [j < size mod S_b] tokens. Where a block of a block-causal family holds the prompt's last tokens
    and the canvas's first, the blocks keep to the family's borders.
    """
    length = masked_BL.shape[1]
    check_blocks(length, size=size, per_step=per_step, steps=steps)
    region_BL = first_block(masked_BL, size, state)
    window_BL = masked_BL & region_BL
    left_B = window_BL.sum(1)
    if per_step is not None:
        return Quota(window_BL, left_B.clamp(max=per_step), region_BL)
    assert steps is not None
    count_B = _block_table(size, steps // (length // size)).to(left_B.device)[left_B]
    return Quota(window_BL, count_B, region_BL)


def first_block(masked_BL: Tensor, size: int, state: State | None) -> Tensor:
    """Return the positions of each row's first block that has a mask."""
    place_L = torch.arange(masked_BL.shape[1], device=masked_BL.device)
    offset_B = masked_BL.new_zeros(len(masked_BL), dtype=torch.long) if state is None else state.offset_A
    block_BL = (place_L + offset_B[:, None]) // size
    first_B1 = torch.where(masked_BL, block_BL, masked_BL.shape[1]).amin(dim=1, keepdim=True)
    return block_BL == first_B1


def check_blocks(length: int, *, size: int, per_step: int | None, steps: int | None) -> None:
    """Raise RecipeError unless the blocks divide a canvas of `length` and exactly one of the two paces is given."""
    check_count("size", size)
    if length % size:
        near = [d for d in range(1, length + 1) if length % d == 0]
        best = min(near, key=lambda d: abs(d - size))
        raise RecipeError(f"schedule.size: blocks of {size} do not divide the canvas of {length}; use {best}, for one.")
    if (per_step is None) == (steps is None):
        raise RecipeError("schedule: blocks needs exactly one of per_step (tokens a step) and steps (for the canvas).")
    if per_step is not None and not 1 <= per_step <= size:
        raise RecipeError(f"schedule.per_step: {per_step} must lie between 1 and the block size {size}.")
    if steps is not None and (steps % (length // size) or not length // size <= steps <= length):
        raise RecipeError(
            f"schedule.steps: {steps} must be a multiple of the {length // size} blocks "
            f"and at most the canvas {length}."
        )


def _block_table(size: int, steps: int) -> Tensor:
    """Return, for every number of masked tokens left in a block, how many the plan commits next."""
    table, left = torch.zeros(size + 1, dtype=torch.long), size
    for step in range(steps):
        count = size // steps + (step < size % steps)
        # Given tokens can leave a block between two marks of the plan; the step then goes to the next mark.
        for missing in range(left - count + 1, left + 1):
            table[missing] = missing - (left - count)
        left -= count
    return table


def check_count(name: str, value: int) -> None:
    """Raise RecipeError unless a count is at least 1."""
    if value < 1:
        raise RecipeError(f"schedule.{name}: {value} must be at least 1.")
