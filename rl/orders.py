"""Reference orders that hold a planner to what confidence alone would decide (UPO, arXiv 2510.05725, section 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..policies.planner_distributions import FAR, Distribution
from ..recipes.registry import SLOTS, RecipeError
from ..rollouts.ranking import rank
from ..rollouts.traits import bare

order = SLOTS["order"]


@order.register
def max_confidence(odds_NL: Tensor, candidate_NL: Tensor) -> Tensor:
    """The most confident position, ties split evenly: the pull is a cross-entropy."""
    odds_NL = odds_NL.masked_fill(~candidate_NL, -torch.inf)
    best_NL = (odds_NL == odds_NL.amax(dim=1, keepdim=True)) & candidate_NL
    return best_NL / best_NL.sum(dim=1, keepdim=True).clamp(min=1)


max_confidence.certain = True  # type: ignore[attr-defined]


@order.register
def softmax(odds_NL: Tensor, candidate_NL: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Positions in proportion to exp(c / temperature), c the probability of the likeliest token: the pull is a KL."""
    if not temperature > 0:
        raise RecipeError(f"planner.order.temperature: {temperature} must be above 0.")
    weight_NL = torch.sigmoid(odds_NL) / temperature
    return torch.softmax(weight_NL.masked_fill(~candidate_NL, FAR), dim=1) * candidate_NL


@order.register
def top_k(odds_NL: Tensor, candidate_NL: Tensor, *, k: int = 5) -> Tensor:
    """The k most confident positions alike: the pull is a KL, log k - H(g) for a policy kept to them by `shortlist`."""
    if k < 1:
        raise RecipeError(f"planner.order.k: {k} must be at least 1.")
    among_NL = (rank(odds_NL.masked_fill(~candidate_NL, -torch.inf)) < k) & candidate_NL
    return among_NL / among_NL.sum(dim=1, keepdim=True).clamp(min=1)


def pull(part: Callable[..., Tensor], distribution: Distribution, odds_NL: Tensor, candidate_NL: Tensor) -> Tensor:
    """Return what a step pays for leaving the order of a part, in nats `[N]`.

    The cross-entropy H(order, g) where the part is `certain`, so that no logarithm of its zeros is taken, else KL(g,
    order). Exact at each state that was visited; the published estimate weighs whole rollouts by their score instead.
    """
    order_NL = part(odds_NL, candidate_NL).float()
    logprob_NL = torch.where(candidate_NL, distribution.chance_BL, 0.0)
    if getattr(bare(part), "certain", False):
        return -(order_NL * logprob_NL).sum(dim=1)
    gap_NL = logprob_NL - order_NL.clamp(min=torch.finfo(order_NL.dtype).tiny).log()
    return torch.where(candidate_NL, logprob_NL.exp() * gap_NL, 0.0).sum(dim=1)
