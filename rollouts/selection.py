"""Selections: which of the scored positions a step commits.

A selection sees `score_BL` (-inf outside the window) and the quota and returns `chosen_BL`; one that declares `state`
gets the `State` too. The engine keeps every selection inside the window and makes it commit at least one position a
live row, so none can hang the loop. `bar(score, chosen)` is the score that positions left open stayed below, which
gives drawn scores their exact log-probability; `order_logprob` is the log-probability of a random order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .schedules import Quota

selection = SLOTS["selection"]


def rank(score_BL: Tensor) -> Tensor:
    """Return every position's place in its row by falling score, ties by index."""
    order_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    place_L = torch.arange(score_BL.shape[1], device=score_BL.device).expand_as(order_BL)
    return torch.empty_like(order_BL).scatter_(1, order_BL, place_L)


@selection.register
def top(score_BL: Tensor, quota: Quota) -> Tensor:
    """The quota's number of positions with the highest scores."""
    return (rank(score_BL) < quota.count_B[:, None]) & quota.window_BL


def _lowest(score_BL: Tensor, chosen_BL: Tensor) -> Tensor:
    """Return the lowest chosen score of each row: what a position that was left open stayed below."""
    return torch.where(chosen_BL, score_BL, torch.inf).amin(dim=1)


top.bar = _lowest  # type: ignore[attr-defined]


@selection.register
def all_(score_BL: Tensor, quota: Quota) -> Tensor:
    """Every open position of the window; for remaskings that take back what exceeds the quota."""
    return quota.window_BL


all_.bar = _lowest  # type: ignore[attr-defined]


@selection.register
def threshold(score_BL: Tensor, quota: Quota, *, level: float = 0.9) -> Tensor:
    """Every position whose score reaches log(level), and never fewer than the quota (Fast-dLLM, section 3.3).

    With score `confidence` the level is a probability, with `margin` a difference of two, with `entropy` an inverse
    perplexity.
    """
    if not 0.0 < level <= 1.0:
        raise RecipeError(f"selection.level: {level} must lie in (0, 1], it is compared with a probability.")
    return ((score_BL >= math.log(level)) | (rank(score_BL) < quota.count_B[:, None])) & quota.window_BL


def _threshold_bar(score_BL: Tensor, chosen_BL: Tensor, *, level: float = 0.9) -> Tensor:
    # Where positions below the level were needed, the lowest of them; else the level.
    return _lowest(score_BL, chosen_BL).clamp(max=math.log(level))


threshold.bar = _threshold_bar  # type: ignore[attr-defined]
