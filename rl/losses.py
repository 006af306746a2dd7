"""From log-probabilities to the loss: units, ratios, surrogate and divergence, and the gradient at each action."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .bounds import Terms
from .plan import Plan


class NonFiniteError(ValueError):
    """A log-probability, loss or gradient that is NaN or infinite; the message names rollout, value and remedy."""


class RatioError(ValueError):
    """An importance ratio beyond the limit that is set for it; the message names rollout, ratio and remedy."""


class Loss(NamedTuple):
    """The loss of some views and what it is made of, one entry a unit (U); the divergence's are units or tokens (X)."""

    value: Tensor
    surrogate_U: Tensor
    weight_U: Tensor
    log_ratio_U: Tensor
    advantage_U: Tensor
    row_U: Tensor
    divergence_X: Tensor | None


class Unit(NamedTuple):
    """The units of some actions: the rollout and the weight of each, and how its actions make it up."""

    row_U: Tensor
    weight_U: Tensor
    terms: Terms


@dataclass(frozen=True)
class LossFunction:
    """The parts of an objective that turn log-probs into a loss; see `Objective` for the equation."""

    unit: Callable[..., Tensor]
    bound: Callable[..., Tensor]
    surrogate: Callable[..., Tensor]
    divergence: Callable[..., Tensor]
    beta: float
    over: str
    correction: Callable[[Tensor], Tensor] | None
    absolute: bool = False
    limit: float | None = None

    def spans_views(self, plan: Plan) -> bool:
        """Return whether a unit has actions in several views, so that one chunk of views may not hold it."""
        if not mark_of(self.unit, "spans_views"):
            return False
        actions = plan.views.actions
        unit, index_A = torch.unique(self.unit(actions), return_inverse=True)
        edge_U = [actions.view_A.new_zeros(len(unit)) for _ in range(2)]
        first_U, last_U = (
            edge.scatter_reduce(0, index_A, actions.view_A, kind, include_self=False)
            for edge, kind in zip(edge_U, ("amin", "amax"), strict=True)
        )
        return bool((first_U != last_U).any())

    def __call__(self, plan: Plan, logprob_A: Tensor) -> Loss:
        """Return the loss of the plan's actions at `logprob_A`, differentiable in it."""
        row_U, weight_U, terms = self.units(plan)
        advantage_U = terms.advantage_U
        # Without an old policy the surrogate gets the bound itself: that of zeros need not be 0.
        log_ratio_U = self.bound(logprob_A, terms) if self.absolute else self._change(logprob_A, plan.old_A, terms)
        surrogate_U = self.surrogate(log_ratio_U, advantage_U)
        if self.correction is not None:
            # A detached weight: the part of the ratio that the sampler's own log-probs add.
            surrogate_U = surrogate_U * self.correction(self._change(plan.old_A, plan.behaviour_A, terms))
        value = (weight_U * surrogate_U).sum()
        divergence_X = None
        if plan.reference_K is not None and self.over == "unit":
            # Divergence of the summed estimates, a token: that of ESPO's bounds.
            held_U = self.sums(plan.reference_K, terms)
            divergence_X = self.divergence(self.sums(logprob_A, terms), held_U) / terms.count_U.clamp(min=1)
            value = value + self.beta * (weight_U * divergence_X).sum()
        elif plan.reference_K is not None:
            divergence_X = self.divergence(logprob_A[: len(plan.weight_K)], plan.reference_K)
            value = value + self.beta * (plan.divergence_weight_K * divergence_X).sum()
        # A mass of 0 means that no rank has a token to score.
        value = value / (plan.mass or 1.0)
        return Loss(value, surrogate_U, weight_U, log_ratio_U, advantage_U, row_U, divergence_X)

    def sums(self, logprob_A: Tensor, terms: Terms) -> Tensor:
        """Return the sum of factor x log-prob of each unit."""
        return terms.total(terms.factor_A * logprob_A)

    def _change(self, now_A: Tensor, then_A: Tensor, terms: Terms) -> Tensor:
        """Return the difference of the bound between two tables of log-probs; exactly 0 between equal ones."""
        if mark_of(self.bound, "linear"):
            return self.bound(now_A - then_A, terms)
        return self.bound(now_A, terms) - self.bound(then_A, terms)

    def units(self, plan: Plan) -> Unit:
        """Return the units of a plan's actions.

        A unit weighs the sum of its tokens' weights; a choice that is a unit by itself weighs what a token of its step
        does on average; the units of a rollout that are `whole` share its mass. A unit that spans views has each
        log-prob divided by its view's inclusion probability (Horvitz-Thompson), so that subsampled views leave its
        log-ratio unbiased, and one that is a whole rollout counts all its tokens.
        """
        actions, views = plan.views.actions, plan.views
        units, index_A = torch.unique(self.unit(actions), return_inverse=True)
        row_U = torch.zeros_like(units).scatter_(0, index_A, actions.row_A)
        token_A = actions.token_A.to(plan.weight_K.dtype)
        scale_A, factor_A = torch.ones_like(token_A), torch.ones_like(token_A)
        if views.factor_K is not None:
            draws = 1 if mark_of(self.unit, "single_draw") else views.draws
            factor_A = views.factor_K.to(token_A.dtype) / draws
        if mark_of(self.unit, "spans_views"):
            scale_A = 1.0 / views.inclusion_N[actions.view_A]
        if mark_of(self.unit, "whole"):
            share = views.draws if mark_of(self.unit, "single_draw") else 1
            weight_U, count_U = (plan.mass_B / share)[row_U], views.count_B[row_U].to(token_A.dtype)
        else:
            weight_U, count_U = self._weigh(plan, index_A, len(units))
        advantage_U = plan.advantage_A.new_zeros(len(units)).scatter_(0, index_A, plan.advantage_A)
        return Unit(row_U, weight_U, Terms(index_A, scale_A, factor_A, actions.place_A, count_U, advantage_U))

    @staticmethod
    def _weigh(plan: Plan, index_A: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return weight and number of tokens of units that are no whole rollouts."""
        actions, views = plan.views.actions, plan.views
        token_A = actions.token_A.to(plan.weight_K.dtype)
        count_N = torch.bincount(views.view_K, minlength=len(views))
        weight_N = plan.weight_K.new_zeros(len(views)).index_add(0, views.view_K, plan.weight_K) / count_N
        count_U = token_A.new_zeros(count).index_add(0, index_A, token_A)
        alone_A = (count_U[index_A] == 0) & ~actions.token_A
        weight_A = torch.cat([plan.weight_K, plan.weight_K.new_zeros(len(token_A) - len(plan.weight_K))])
        weight_A = torch.where(alone_A, weight_N[actions.view_A], weight_A)
        if views.estimated:
            # A token on two canvases is one token.
            place, place_A = torch.unique(actions.place_A, return_inverse=True)
            once_A = 1.0 / torch.bincount(place_A, minlength=len(place))[place_A]
            count_U = token_A.new_zeros(count).index_add(0, index_A, token_A * once_A)
        return torch.zeros_like(count_U).index_add(0, index_A, weight_A), count_U

    def coefficients(self, plan: Plan, logprob_A: Tensor) -> Tensor:
        """Return dloss / dlogprob of every action, without a graph.

        NonFiniteError where anything is not finite, RatioError where a unit's ratio exceeds the limit.
        """
        leaf_A = logprob_A.detach().requires_grad_()
        _require_finite(plan, plan.views.row_N[plan.views.actions.view_A], leaf_A, "log-probability")
        with torch.enable_grad():
            loss = self(plan, leaf_A)
            _require_finite(plan, loss.row_U, loss.surrogate_U, "surrogate loss")
            if self.limit is not None and not self.absolute:
                require_bounded(loss.log_ratio_U, plan.views.trajectory.rollout_id_B[loss.row_U], self.limit)
            if loss.divergence_X is not None:
                row_X = loss.row_U if self.over == "unit" else plan.views.row_K
                _require_finite(plan, row_X, loss.divergence_X, "divergence")
            (coefficient_A,) = torch.autograd.grad(loss.value, leaf_A)
        _require_finite(plan, plan.views.actions.row_A, coefficient_A, "loss gradient")
        return coefficient_A


def mark_of(part: Any, mark: str) -> Any:
    """Return a mark that a part carries, also where its knobs are bound."""
    return getattr(getattr(part, "func", part), mark, None)


def _require_finite(plan: Plan, row_X: Tensor, value_X: Tensor, what: str) -> None:
    finite_X = value_X.detach().isfinite()
    if bool(finite_X.all()):
        return
    entry = int((~finite_X).nonzero()[0])
    rollout = int(plan.views.trajectory.rollout_id_B[row_X[entry]])
    raise NonFiniteError(
        f"rollout {rollout}: a {what} is {value_X[entry].item()} ({int((~finite_X).sum())} of {len(finite_X)} are not "
        "finite); nothing was stepped. Lower optim.lr, bound the ratio (ppo_clip), and resume from the last checkpoint."
    )


def require_bounded(log_ratio_U: Tensor, rollout_id_U: Tensor, limit: float) -> None:
    """Raise RatioError where the ratio of a unit, whose rollout is given, is larger than `limit`."""
    count = int((log_ratio_U > math.log(limit)).sum())
    if not count:
        return
    unit = int(log_ratio_U.argmax())
    raise RatioError(
        f"rollout {int(rollout_id_U[unit])}: an importance ratio is {log_ratio_U[unit].double().exp().item():.3g}, "
        f"objective.ratio_limit {limit:g} ({count} of {len(log_ratio_U)} units exceed it); nothing was stepped. Lower "
        "optim.lr or objective.inner_steps, or raise the limit, and resume from the last checkpoint."
    )
