"""What selections share: ranks of scores, bars, checks of knobs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from .schedules import Quota


class Bar(NamedTuple):
    """The score that each position left open stayed below: `bar_BL`, and whether a draw that equals it does too."""

    bar_BL: Tensor
    tie_BL: Tensor


def rank(score_BL: Tensor) -> Tensor:
    """Return every position's place in its row by falling score, ties by index."""
    order_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    place_L = torch.arange(score_BL.shape[1], device=score_BL.device).expand_as(order_BL)
    return torch.empty_like(order_BL).scatter_(1, order_BL, place_L)


def best(score_BL: Tensor, inside_BL: Tensor) -> Tensor:
    """Return the one position of each row with the highest score among `inside_BL`; none where that is empty."""
    # A score of -inf inside still comes before everything outside.
    floor = torch.finfo(score_BL.dtype).min
    masked_BL = torch.where(inside_BL, score_BL.clamp(min=floor), -torch.inf)
    place_L = torch.arange(score_BL.shape[1], device=score_BL.device)
    return (place_L == masked_BL.argmax(dim=1, keepdim=True)) & inside_BL


def level_bar(score_BL: Tensor, chosen_BL: Tensor, level_B: Tensor | None = None) -> Bar:
    """Return one bar a row: the lowest chosen score or, where that is lower, the level that the others missed.

    A draw that equals the lowest score loses to the chosen position of smaller index; one that equals the level passes.
    """
    bar_B = torch.where(chosen_BL, score_BL, torch.inf).amin(dim=1)
    place_L = torch.arange(score_BL.shape[1], device=score_BL.device)
    # Only what comes after the last position that has the lowest score loses a tie.
    last_B = torch.where(chosen_BL & (score_BL == bar_B[:, None]), place_L, -1).amax(dim=1)
    if level_B is not None:
        last_B = torch.where(bar_B < level_B, last_B, len(place_L))
        bar_B = bar_B.minimum(level_B)
    return Bar(bar_B[:, None].expand_as(score_BL), place_L > last_B[:, None])


def fewest(score_BL: Tensor, quota: Quota) -> Tensor:
    """Return the quota's number of positions with the highest scores."""
    return (rank(score_BL) < quota.count_B[:, None]) & quota.window_BL


def check_level(level: float, name: str = "level") -> float:
    """Return log(level); RecipeError where it is no probability."""
    if not 0.0 < level <= 1.0:
        raise RecipeError(f"selection.{name}: {level} must lie in (0, 1], it is compared with a probability.")
    return math.log(level)


def check_positive(value: float, name: str) -> None:
    """Raise RecipeError unless `value` is above 0."""
    if not value > 0:
        raise RecipeError(f"selection.{name}: {value} must be above 0.")
