"""Schedules: which masked positions are open to a step, and how many of them it commits.

A schedule sees which positions are masked, the step and how many were open at the start; one that declares `state` gets
the `State` too (None where a recorded canvas is replayed and nothing else of it is known).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .state import State
from .traits import traits

schedule = SLOTS["schedule"]


class Quota(NamedTuple):
    """What a schedule opens to a step.

    `window_BL`: masked positions that may be committed; `count_B`: how many, before the selection's say; `region_BL`:
    the positions, decided ones included, that the step works on (None: the canvas).
    """

    window_BL: Tensor
    count_B: Tensor
    region_BL: Tensor | None = None


@schedule.register
def uniform(masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, steps: int) -> Quota:
    """The whole canvas, an even share a step, larger shares first: n_j = m // S + [j < m mod S].

    A row keeps its plan whatever else is in the batch: only its own masks and step count.
    """
    _positive("steps", steps)
    left_B = (steps - step_B).clamp(min=1)
    return Quota(masked_BL, (masked_BL.sum(1) + left_B - 1) // left_B)


@schedule.register
def cosine(masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, steps: int) -> Quota:
    """The whole canvas; after step t, floor(m cos(pi/2 (t+1)/S)) positions stay masked (MaskGIT, Chang et al. 2022).

    `open_B` is m, the positions that were open at the start. A step whose share is 0 commits one all the same.
    """
    _positive("steps", steps)
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
    _positive("per_step", per_step)
    return Quota(masked_BL, masked_BL.sum(1).clamp(max=per_step))


@schedule.register
def time(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    steps: int | None = None,
    eps: float = 1e-3,
    realign: bool = False,
) -> Quota:
    """The whole canvas on a grid of times t_k = 1 - k (1 - eps) / S; step k commits floor(n (1 - t_{k+1} / t_k)).

    Dream's schedule, with n the row's own masks (released: the batch's mean); the last step commits all. `steps` is S
    (default: one a position that was open at the start). `realign` puts n / open_B in the place of t_k and the first
    later time that commits something in that of t_{k+1} (Dimple). A step whose share is 0 commits one all the same.
    """
    left_B, total_B = masked_BL.sum(1), _steps(steps, eps, open_B)
    if realign:
        # floor(n - open t_s) >= 1 first at t_s = (n - 1) / open; fp64 and a hair, as everywhere.
        wanted_B = (1 - (left_B - 1) / open_B.double().clamp(min=1)) * total_B / (1 - eps)
        next_B = torch.maximum(step_B + 1, torch.ceil(wanted_B - 1e-9).long())
        share_B = left_B - open_B * (1 - next_B * (1 - eps) / total_B.double())
    else:
        next_B = step_B + 1
        share_B = left_B * _opening(step_B, total_B, eps)
    count_B = torch.floor(share_B + 1e-9).long()
    return Quota(masked_BL, torch.where(next_B >= total_B, left_B, count_B))


def _steps(steps: int | None, eps: float, open_B: Tensor) -> Tensor:
    """Return the number of steps of each row, once the grid's knobs are checked."""
    if steps is not None:
        _positive("steps", steps)
    if not 0 < eps < 1:
        raise RecipeError(f"schedule.eps: {eps} must lie in (0, 1), it is the last time of the grid.")
    return open_B.clamp(min=1) if steps is None else torch.full_like(open_B, steps)


def _opening(step_B: Tensor, steps_B: Tensor, eps: float) -> Tensor:
    """Return 1 - t_{k+1} / t_k, the chance that a mask opens between two times of the grid, fp64."""
    drop_B = (1 - eps) / steps_B.double()
    return drop_B / (1 - step_B * drop_B).clamp(min=eps)


@schedule.register
@traits(history=True)
def origin(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    steps: int | None = None,
    eps: float = 1e-3,
    state: State | None = None,
) -> Quota:
    """Every mask by itself with probability 1 - t_{k+1} / t_k, on the grid of `time`; for selection `all`.

    Dream's `origin`, the masked diffusion itself: which positions open depends on no weight. The last step opens all,
    and where chance opens none the nearest to it is opened.
    """
    assert state is not None, "which positions open is drawn by rollout and step"
    total_B = _steps(steps, eps, open_B)
    chance_B = torch.where(step_B + 1 >= total_B, 1.0, _opening(step_B, total_B, eps))
    noise_BL = torch.where(masked_BL, state.uniform("open"), 2.0)
    opens_BL = (noise_BL < chance_B[:, None]) | (noise_BL == noise_BL.amin(dim=1, keepdim=True))
    window_BL = masked_BL & opens_BL
    return Quota(window_BL, window_BL.sum(1))


@schedule.register
def ascending(
    masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, blocks: int = 1, state: State | None = None
) -> Quota:
    """ASS: step i commits 2^i positions, and the last of floor(log2 L) steps what is left (CJ-GRPO, section 4).

    With `blocks` b the last b - 1 steps fill a block each, from left to right, of 2^i positions and the last of what is
    left; the first block has all the steps before. L is the number of positions open at the start, with b > 1 the
    canvas.
    """
    _positive("blocks", blocks)
    left_B, length = masked_BL.sum(1), masked_BL.shape[1]
    if blocks == 1:
        # The exponent of a float is exact, a logarithm is not.
        total_B = torch.frexp(open_B.double().clamp(min=1)).exponent.long() - 1
        count_B = torch.where(step_B + 1 >= total_B, left_B, 2 ** step_B.clamp(max=62))
        return Quota(masked_BL, count_B.minimum(left_B))
    steps = length.bit_length() - 1
    if blocks > steps:
        raise RecipeError(f"schedule.blocks: {blocks} exceed the {steps} steps of a canvas of {length}; use at most that.")
    edges = [2 ** (i + 1) - 1 for i in range(steps - blocks, steps - 1)]
    place_L = torch.arange(length, device=masked_BL.device)
    block_BL = sum((place_L >= edge).long() for edge in edges).expand_as(masked_BL)  # type: ignore[union-attr]
    first_B1 = torch.where(masked_BL, block_BL, blocks).amin(dim=1, keepdim=True)
    region_BL = block_BL == first_B1
    window_BL = masked_BL & region_BL
    ends_B = (first_B1[:, 0] > 0) | (step_B >= steps - blocks)
    inside_B = window_BL.sum(1)
    count_B = torch.where(ends_B, inside_B, 2 ** step_B.clamp(max=62)).minimum(inside_B)
    return Quota(window_BL, count_B, region_BL)


@schedule.register
def dilated(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    size: int,
    base: int = 2,
    state: State | None = None,
) -> Quota:
    """DUS: blocks of `size` from left to right, each opened coarse to fine; for selection `all`.

    Round r of a block opens every position at a multiple of the stride size // base^r that is not open yet, so that
    tokens of one step lie apart: log2 `size` steps a block. What remains is a round of its own, joined to the one
    before if it is smaller (Luxembourg et al. 2025, arXiv 2506.19037).
    """
    check_blocks(masked_BL.shape[1], size=size, per_step=1, steps=None)
    if base < 2:
        raise RecipeError(f"schedule.base: {base} must be at least 2, a stride is divided by it.")
    region_BL = first_block(masked_BL, size, state)
    place_L = torch.arange(masked_BL.shape[1], device=masked_BL.device)
    offset_B = torch.zeros_like(open_B) if state is None else state.offset_A
    round_BL = _rounds(size, base).to(masked_BL.device)[(place_L + offset_B[:, None]) % size]
    open_BL = masked_BL & region_BL
    next_B1 = torch.where(open_BL, round_BL, size).amin(dim=1, keepdim=True)
    window_BL = open_BL & (round_BL == next_B1)
    return Quota(window_BL, window_BL.sum(1), region_BL)


def _rounds(size: int, base: int) -> Tensor:
    """Return the round in which each position of a block is opened."""
    rounds: list[list[int]] = []
    stride, rest = size // base, list(range(size))
    while stride >= 1:
        rounds.append([i for i in rest if i % stride == 0])
        rest = [i for i in rest if i % stride]
        stride //= base
    rounds = [positions for positions in (*rounds, rest) if positions]
    if len(rounds) > 1 and len(rounds[-1]) < len(rounds[-2]):
        rounds[-2:] = [rounds[-2] + rounds[-1]]
    table = torch.empty(size, dtype=torch.long)
    for number, positions in enumerate(rounds):
        table[positions] = number
    return table


@schedule.register
def cross_blocks(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    block: int,
    ahead: int = 1,
    per_step: int = 1,
    state: State | None = None,
) -> Quota:
    """Blocks from left to right, with the `ahead` next ones open as well; `per_step` positions a step.

    Cross-block decoding: what is confident behind an unfinished block need not wait for it.
    """
    check_blocks(masked_BL.shape[1], size=block, per_step=per_step, steps=None)
    if ahead < 0:
        raise RecipeError(f"schedule.ahead: {ahead} must be at least 0.")
    first_BL = first_block(masked_BL, block, state)
    wide_B1L = torch.nn.functional.pad(first_BL[:, None].float(), (ahead * block, 0))
    region_BL = torch.nn.functional.max_pool1d(wide_B1L, ahead * block + 1, stride=1)[:, 0] > 0
    window_BL = masked_BL & region_BL
    return Quota(window_BL, window_BL.sum(1).clamp(max=per_step), region_BL)


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
    _positive("size", size)
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


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise RecipeError(f"schedule.{name}: {value} must be at least 1.")
