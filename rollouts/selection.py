"""Selections: which of the scored positions a step commits.

A selection sees `score_BL` (-inf outside the window) and the quota and returns `chosen_BL`. The engine keeps every
selection inside the window and makes it commit at least one position a live row, so none can hang the loop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .categorical import log_odds, log_probs
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


@selection.register
def threshold(score_BL: Tensor, quota: Quota, *, level: float = 0.9) -> Tensor:
    """Every position whose score reaches log(level), and never fewer than the quota (Fast-dLLM, section 3.3).

    With score `confidence` the level is a probability, with `margin` a difference of two, with `entropy` an inverse
    perplexity.
    """
    if not 0.0 < level <= 1.0:
        raise RecipeError(f"selection.level: {level} must lie in (0, 1], it is compared with a probability.")
    return ((score_BL >= math.log(level)) | (rank(score_BL) < quota.count_B[:, None])) & quota.window_BL


@selection.register
def sampled_confidence(score_BL: Tensor, quota: Quota, *, exact: bool = True) -> Tensor:
    """LLaDA's rule: draw a token everywhere, commit the quota of positions whose *drawn* tokens are likeliest.

    `exact` records the log-probability of the positions too, which the drawn tokens decide (samplers.md section 1.3);
    without it a step's log-probability is the naive sum over its tokens, which is no distribution.
    """
    return top(score_BL, quota)


sampled_confidence.draws_first = True  # type: ignore[attr-defined]


def tail_logprob(
    logits_KV: Tensor,
    bar_K: Tensor,
    tie_K: Tensor,
    *,
    temperature: float,
    score_temperature: float,
    banned: tuple[int, ...] = (),
) -> Tensor:
    """Return log q({v : c(v) < bar}), the log-probability that a position's draw stayed below the bar.

    Shapes: `logits_KV`, `bar_K` and `tie_K` (True where a draw that equals the bar loses, because the tie goes to the
    smaller index) give `logprob_K`. c is the log-odds at `score_temperature`, q the draw's distribution at
    `temperature` (samplers.md section 1.3). Differentiable in the logits through q; the set of tokens below is a step
    function.
    """
    odds_KV = log_odds(log_probs(logits_KV, temperature=score_temperature, banned=banned)).detach()
    below_KV = (odds_KV < bar_K[:, None]) | (tie_K[:, None] & (odds_KV == bar_K[:, None]))
    logq_KV = log_probs(logits_KV, temperature=temperature, banned=banned)
    return logq_KV.masked_fill(~below_KV, -torch.inf).logsumexp(dim=-1)
