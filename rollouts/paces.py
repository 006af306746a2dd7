"""Schedules that follow a grid of times, powers of two, a dilated order, or more than one block."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .schedules import Quota, check_blocks, check_count, first_block
from .state import State
from .traits import traits

schedule = SLOTS["schedule"]


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
        check_count("steps", steps)
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
def ascending(masked_BL: Tensor, step_B: Tensor, open_B: Tensor, *, blocks: int = 1) -> Quota:
    """ASS: step i commits 2^i positions, and the last of floor(log2 L) steps what is left (CJ-GRPO, section 4).

    With `blocks` b the last b - 1 steps fill a block each, from left to right, of 2^i positions and the last of what is
    left; the first block has all the steps before. L is the number of positions open at the start, with b > 1 the
    canvas.
    """
    check_count("blocks", blocks)
    left_B, length = masked_BL.sum(1), masked_BL.shape[1]
    if blocks == 1:
        # The exponent of a float is exact, a logarithm is not.
        total_B = torch.frexp(open_B.double().clamp(min=1)).exponent.long() - 1
        count_B = torch.where(step_B + 1 >= total_B, left_B, 2 ** step_B.clamp(max=62))
        return Quota(masked_BL, count_B.minimum(left_B))
    steps = length.bit_length() - 1
    if blocks > steps:
        raise RecipeError(
            f"schedule.blocks: {blocks} exceed the {steps} steps of a canvas of {length}; use at most that."
        )
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
    round_BL = _rounds(size, base, masked_BL.device)[(place_L + offset_B[:, None]) % size]
    open_BL = masked_BL & region_BL
    next_B1 = torch.where(open_BL, round_BL, size).amin(dim=1, keepdim=True)
    window_BL = open_BL & (round_BL == next_B1)
    return Quota(window_BL, window_BL.sum(1), region_BL)


@cache
def _rounds(size: int, base: int, device: torch.device) -> Tensor:
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
    return table.to(device)


@schedule.register
def cross_blocks(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    size: int,
    ahead: int,
    per_step: int = 1,
    state: State | None = None,
) -> Quota:
    """Blocks of `size` from left to right, with the `ahead` next ones open as well; `per_step` positions a step.

    Cross-block decoding: what is confident behind an unfinished block need not wait for it.
    """
    check_blocks(masked_BL.shape[1], size=size, per_step=per_step, steps=None)
    if ahead < 0:
        raise RecipeError(f"schedule.ahead: {ahead} must be at least 0.")
    first_BL = first_block(masked_BL, size, state)
    wide_B1L = torch.nn.functional.pad(first_BL[:, None].float(), (ahead * size, 0))
    region_BL = torch.nn.functional.max_pool1d(wide_B1L, ahead * size + 1, stride=1)[:, 0] > 0
    window_BL = masked_BL & region_BL
    return Quota(window_BL, window_BL.sum(1).clamp(max=per_step), region_BL)
