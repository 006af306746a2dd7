"""Selections: which of the scored positions a step commits.

A selection sees `score_BL` (-inf outside the window) and the quota and returns `chosen_BL`; one that declares `state`
gets the `State` too. The engine keeps every selection inside the window and makes it commit at least one position a
live row, so none can hang the loop. Those that must know earlier steps, or what lies beside a position, are in
`rules.py`.

A function may carry three more. `bar(score, chosen, window, **knobs)` is the `Bar` that positions left open stayed
below, which gives drawn scores their exact log-probability (samplers.md section 1.3). Where the order is random,
`keys(score, state, **knobs)` is what it falls by and `order_logprob(score, chosen, rank, window, **knobs)` its
log-probability (section 1.2).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .ranking import Bar, check_level, check_positive, fewest, level_bar, rank
from .schedules import Quota
from .state import State
from .traits import traits

selection = SLOTS["selection"]
FAR = -1e30  # nats: so unlikely that it does not count, and no infinity, whose gradient is NaN


@selection.register
def top(score_BL: Tensor, quota: Quota) -> Tensor:
    """The quota's number of positions with the highest scores."""
    return fewest(score_BL, quota)


def _lowest_bar(score_BL: Tensor, chosen_BL: Tensor, window_BL: Tensor) -> Bar:
    return level_bar(score_BL, chosen_BL)


top.bar = _lowest_bar  # type: ignore[attr-defined]


@selection.register
def all_(score_BL: Tensor, quota: Quota) -> Tensor:
    """Every open position of the window; for schedules that narrow it, and remaskings that take the excess back."""
    return quota.window_BL


all_.bar = _lowest_bar  # type: ignore[attr-defined]


@selection.register
def threshold(score_BL: Tensor, quota: Quota, *, level: float = 0.9) -> Tensor:
    """Every position whose score reaches log(level), and never fewer than the quota (Fast-dLLM, section 3.3).

    With score `confidence` the level is a probability, with `margin` a difference of two, with `entropy` an inverse
    perplexity: dParallel's bound of 0.45 nats is the level exp(-0.45).
    """
    return ((score_BL >= check_level(level)) & quota.window_BL) | fewest(score_BL, quota)


def _threshold_bar(score_BL: Tensor, chosen_BL: Tensor, window_BL: Tensor, *, level: float = 0.9) -> Bar:
    # Where positions below the level were needed, the lowest of them; else the level.
    return level_bar(score_BL, chosen_BL, torch.full_like(score_BL[:, 0], check_level(level)))


threshold.bar = _threshold_bar  # type: ignore[attr-defined]


@selection.register
def confident(score_BL: Tensor, quota: Quota, *, level: float = 0.95) -> Tensor:
    """Every position whose score reaches log(level); where none does, the quota's number (Dimple, section 3.3)."""
    ready_BL = (score_BL >= check_level(level)) & quota.window_BL
    return torch.where(ready_BL.any(dim=1, keepdim=True), ready_BL, fewest(score_BL, quota))


confident.bar = _threshold_bar  # type: ignore[attr-defined]


def _factor_level(number: Tensor, f: float) -> Tensor:
    """Return the log-probability that the n-th best position must reach: log(1 - f / (n + 1)), fp64."""
    return (1 - f / (number.double() + 1)).clamp(min=0.0).log()


@selection.register
def factor(score_BL: Tensor, quota: Quota, *, f: float = 1.0) -> Tensor:
    """The n best with (n + 1)(1 - p_n) <= f for the largest such n, never fewer than the quota (Fast-dLLM, 3.3).

    p_n is the probability of the n-th best position. The bars 1 - f / (n + 1) rise while the probabilities fall, so n
    is a count; the loops of several ports take one position too many where the last of them passes.
    """
    check_positive(f, "f")
    place_BL = rank(score_BL)
    passes_BL = score_BL >= _factor_level(place_BL + 1, f)
    return (passes_BL | (place_BL < quota.count_B[:, None])) & quota.window_BL


def _factor_bar(score_BL: Tensor, chosen_BL: Tensor, window_BL: Tensor, *, f: float = 1.0) -> Bar:
    # The best of the others failed at place n + 1, whose bar is 1 - f / (n + 2).
    level_B = _factor_level(chosen_BL.sum(dim=1) + 1, f)
    return level_bar(score_BL, chosen_BL, level_B)


factor.bar = _factor_bar  # type: ignore[attr-defined]


@selection.register
def frechet(score_BL: Tensor, quota: Quota, *, f: float = 1.0) -> Tensor:
    """The n best with sum_{r <= n} (1 - p_r) + (1 - p_n) <= f for the largest such n, never fewer than the quota.

    At f = 1 the string of the likeliest tokens is then the likeliest string: it has at least 1 - sum (1 - p_r) by
    Bonferroni, any other at most max (1 - p_r). With equal probabilities it is `factor`, otherwise it takes more.
    """
    check_positive(f, "f")
    place_BL = rank(score_BL)
    sorted_BL = torch.zeros_like(score_BL).scatter(1, place_BL, score_BL)
    miss_BL = -torch.expm1(sorted_BL.double())
    passes_BL = (miss_BL.cumsum(dim=1) + miss_BL <= f).gather(1, place_BL)
    return (passes_BL | (place_BL < quota.count_B[:, None])) & quota.window_BL


def _frechet_bar(score_BL: Tensor, chosen_BL: Tensor, window_BL: Tensor, *, f: float = 1.0) -> Bar:
    # The best of the others, of miss m, failed: sum_S (1 - p) + 2 m > f.
    spent_B = torch.where(chosen_BL, -torch.expm1(score_BL.double()), 0.0).sum(dim=1)
    level_B = (1 - (f - spent_B) / 2).clamp(min=0.0).log()
    return level_bar(score_BL, chosen_BL, level_B)


frechet.bar = _frechet_bar  # type: ignore[attr-defined]


@selection.register
@traits(needs=("entropy",))
def entropy_budget(score_BL: Tensor, quota: Quota, *, state: State, nats: float = 0.1) -> Tensor:
    """The k best with sum H - max H <= nats for the largest such k, never fewer than the quota (EB-Sampler).

    H are the entropies of those k at the score's temperature; KL(joint | product) <= sum H - max H. The score gives the
    order (`entropy` or another error proxy). Ben-Hamu et al. 2025, section 3. Ports that forget "- max H" stop at the
    first uncertain position.
    """
    if nats < 0:
        raise RecipeError(f"selection.nats: {nats} must be at least 0.")
    assert state.statistics is not None and state.statistics.entropy is not None
    place_BL = rank(score_BL)
    entropy_BL = torch.where(quota.window_BL, state.statistics.entropy, 0.0).double()
    sorted_BL = torch.zeros_like(entropy_BL).scatter(1, place_BL, entropy_BL)
    spent_BL = sorted_BL.cumsum(dim=1) - sorted_BL.cummax(dim=1).values
    passes_BL = (spent_BL <= nats).gather(1, place_BL)
    return (passes_BL | (place_BL < quota.count_B[:, None])) & quota.window_BL


@selection.register
@traits(status="exact with order")
def plackett_luce(
    score_BL: Tensor,
    quota: Quota,
    *,
    state: State,
    temperature: float = 1.0,
    of: Literal["score", "probability"] = "score",
) -> Tensor:
    """The quota's number of positions, drawn one after the other from softmax(score / temperature) of those left.

    Dream's `alg_temp`. `of: probability` puts exp(score) in the place of the score, as Dream does for its confidence
    and its margin (its entropy is a score as ours). The recorded ranks are the order of the draws, an action of its
    own: log P = sum_r [w_{i_r} - log sum_{j not yet drawn} exp w_j].
    """
    check_positive(temperature, "temperature")
    return fewest(_gumbel_keys(score_BL, state, temperature=temperature, of=of), quota)


def _weights(score_BL: Tensor, temperature: float, of: str) -> Tensor:
    """Return log-weights, -inf outside the window."""
    weight_BL = score_BL.exp().masked_fill(score_BL == -torch.inf, -torch.inf) if of == "probability" else score_BL
    return weight_BL / temperature


def _gumbel_keys(score_BL: Tensor, state: State, *, temperature: float = 1.0, of: str = "score") -> Tensor:
    """Return log-weights with Gumbel noise: their falling order is a draw without replacement (Yellott 1977)."""
    noise_BL = -torch.log(-torch.log(state.uniform("order")))
    return _weights(score_BL, temperature, of) + noise_BL


def _order_logprob(
    score_BL: Tensor,
    chosen_BL: Tensor,
    rank_BL: Tensor,
    window_BL: Tensor,
    *,
    temperature: float = 1.0,
    of: str = "score",
) -> Tensor:
    """Return `logprob_B` of the recorded order of the chosen positions, differentiable in the scores."""
    weight_BL = _weights(score_BL, temperature, of).clamp(min=FAR).masked_fill(~window_BL, FAR)
    length = score_BL.shape[1]
    order_BL = torch.where(chosen_BL, rank_BL, length).argsort(dim=1, stable=True)
    weight_BL = weight_BL.gather(1, order_BL)
    # What is not yet drawn at the r-th draw is the r-th and all that follow.
    left_BL = weight_BL.flip(1).logcumsumexp(dim=1).flip(1)
    drawn_BL = torch.arange(length, device=score_BL.device) < chosen_BL.sum(dim=1, keepdim=True)
    return torch.where(drawn_BL, weight_BL - left_BL, 0.0).sum(dim=1)


plackett_luce.keys = _gumbel_keys  # type: ignore[attr-defined]
plackett_luce.order_logprob = _order_logprob  # type: ignore[attr-defined]
