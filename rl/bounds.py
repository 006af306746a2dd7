"""Bounds: from the log-probs of a unit's tokens to one number a unit, whose difference from the old one is log rho.

A bound function maps the log-probs of A actions to `value_U`, differentiable in them. Those marked `linear` are applied
to differences of log-probs, so that equal ones give exactly 0. Estimated views (`Views.factor_K`) score a token on
several canvases; what each score counts is its factor, and `elbo`, `eubo` and `sandwich` read it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError

bound = SLOTS["bound"]


class Terms(NamedTuple):
    """How A actions make up U units.

    `index_A` is the unit of an action, `scale_A` 1 / its view's inclusion probability where a unit spans views (else
    1), `factor_A` what its log-prob counts in the estimate of its view (1 where views are not estimated), `token_A`
    numbers the tokens (the same one on two canvases has one number), `count_U` counts a unit's tokens, and
    `advantage_U` is its advantage.
    """

    index_A: Tensor
    scale_A: Tensor
    factor_A: Tensor
    token_A: Tensor
    count_U: Tensor
    advantage_U: Tensor

    def total(self, value_A: Tensor) -> Tensor:
        """Return the sum of `value_A` over each unit."""
        empty_U = torch.zeros_like(self.count_U, dtype=value_A.dtype)
        return empty_U.index_add(0, self.index_A, value_A * self.scale_A)


@bound.register
def sum_(logprob_A: Tensor, terms: Terms) -> Tensor:
    """The sum of the unit's log-probs: log p(unit) where views are those of the trajectory."""
    return terms.total(logprob_A)


@bound.register
def mean(logprob_A: Tensor, terms: Terms) -> Tensor:
    """The mean of the unit's log-probs over its tokens, whose exponential is a geometric mean (GSPO, eq. 7)."""
    return terms.total(logprob_A) / terms.count_U.clamp(min=1)


@bound.register
def elbo(logprob_A: Tensor, terms: Terms, *, per_token: bool = False) -> Tensor:
    """The sum of factor x log-prob: an estimate of the evidence lower bound of log p(unit) (likelihood_rl.md, A0.1).

    `per_token` divides by the unit's number of tokens (ESPO, SPG).
    """
    value_U = terms.total(terms.factor_A * logprob_A)
    return value_U / terms.count_U.clamp(min=1) if per_token else value_U


@bound.register
def eubo(logprob_A: Tensor, terms: Terms, *, beta: float = 1.5) -> Tensor:
    """1/beta x mean over tokens of log sum_m factor_m p_m^beta: SPG's evidence upper bound, a token (SPG).

    The sum is over the canvases that a token was hidden on, the mean over the tokens that were on any
    (likelihood_rl.md, A5). Never below the ELBO, and rising with beta. It takes the logarithm token by token, and so is
    above log p for a large beta only: on eight random tables not at 1, at 1.5 in six, at 4 in all
    (tests/test_likelihoods.py).
    """
    if not beta >= 1:
        raise RecipeError(f"bound.beta: {beta} must be at least 1, below it nothing is bounded.")
    token_X, place_A = torch.unique(terms.token_A, return_inverse=True)
    unit_X = torch.zeros_like(token_X).scatter_(0, place_A, terms.index_A)
    power_A = beta * logprob_A + terms.factor_A.log()
    # log-sum-exp over a token's canvases, shifted by the largest, which has no gradient of its own.
    largest_X = torch.full_like(token_X, -torch.inf, dtype=power_A.dtype)
    largest_X = largest_X.scatter_reduce(0, place_A, power_A.detach(), "amax")
    inside_X = torch.zeros_like(largest_X).index_add(0, place_A, (power_A - largest_X[place_A]).exp())
    value_X = (inside_X.log() + largest_X) / beta
    seen_U = torch.zeros_like(terms.count_U, dtype=value_X.dtype).index_add(0, unit_X, torch.ones_like(value_X))
    return torch.zeros_like(seen_U).index_add(0, unit_X, value_X) / seen_U.clamp(min=1)


@bound.register
def sandwich(logprob_A: Tensor, terms: Terms, *, beta: float = 1.5, mix: float = 0.5) -> Tensor:
    """`elbo` a token for units of advantage >= 0; mix x `eubo` + (1 - mix) x `elbo` for the others (SPG, Algorithm 1).

    What is to be raised is raised from below, and what is to be lowered from above; `mix` 1 is the pure sandwich.
    """
    if not 0 <= mix <= 1:
        raise RecipeError(f"bound.mix: {mix} must lie in [0, 1], it mixes the upper bound with the lower one.")
    lower_U = elbo(logprob_A, terms, per_token=True)
    upper_U = eubo(logprob_A, terms, beta=beta)
    return torch.where(terms.advantage_U >= 0, lower_U, upper_U.lerp(lower_U, 1 - mix))


for linear in (sum_, mean, elbo):
    linear.linear = True  # type: ignore[attr-defined]
