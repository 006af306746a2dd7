"""From log-probabilities to the loss: units, ratios, surrogate and divergence, and the gradient at each action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Plan


class NonFiniteError(ValueError):
    """A log-probability, loss or gradient that is NaN or infinite; the message names rollout, value and remedy."""


class Loss(NamedTuple):
    """The loss of some views and what it is made of, one entry a unit (U) or scored token (K)."""

    value: Tensor
    surrogate_U: Tensor
    weight_U: Tensor
    log_ratio_U: Tensor
    advantage_U: Tensor
    row_U: Tensor
    divergence_K: Tensor | None


@dataclass(frozen=True)
class LossFunction:
    """The parts of an objective that turn log-probs into a loss; see `Objective` for the equation."""

    unit: Callable[..., Tensor]
    surrogate: Callable[..., Tensor]
    divergence: Callable[..., Tensor]
    bound: str
    beta: float
    ceiling: float | None

    @property
    def spans_views(self) -> bool:
        """Whether a unit is all of a rollout, so that one chunk of views does not hold it."""
        return bool(getattr(self.unit, "spans_views", False))

    def __call__(self, plan: Plan, logprob_A: Tensor) -> Loss:
        """Return the loss of the plan's actions at `logprob_A`, differentiable in it."""
        index_A, row_U, weight_U, scale_A = self._units(plan)

        def combine(value_A: Tensor) -> Tensor:
            return torch.zeros_like(weight_U, dtype=value_A.dtype).index_add(0, index_A, value_A * scale_A)

        log_ratio_U = combine(logprob_A - plan.old_A)
        advantage_U = plan.advantage_B[row_U]
        surrogate_U = self.surrogate(log_ratio_U, advantage_U)
        if self.ceiling is not None:
            # A detached weight: the part of the ratio that the sampler's own log-probs add (truncated importance).
            surrogate_U = surrogate_U * combine(plan.old_A - plan.behaviour_A).exp().clamp(max=self.ceiling)
        value = (weight_U * surrogate_U).sum()
        divergence_K = None
        if plan.reference_K is not None:
            divergence_K = self.divergence(logprob_A[: len(plan.weight_K)], plan.reference_K)
            value = value + self.beta * (plan.weight_K * divergence_K).sum()
        # A mass of 0 means that no rank has a token to score.
        value = value / (plan.mass or 1.0)
        return Loss(value, surrogate_U, weight_U, log_ratio_U, advantage_U, row_U, divergence_K)

    def _units(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (unit of each action, rollout of each unit, weight of each unit, factor of each action's log-ratio).

        A unit weighs the sum of its tokens' weights; a choice that is a unit by itself weighs what a token of its step
        does on average. `mean` divides by the number of tokens. A unit that is a whole rollout has the weight and count
        of the full estimator, and each log-ratio is divided by its inclusion probability (Horvitz-Thompson), so that
        subsampled views leave the log-ratio of the rollout unbiased.
        """
        actions, views = plan.views.actions, plan.views
        units, index_A = torch.unique(self.unit(actions), return_inverse=True)
        row_U = torch.zeros_like(units).scatter_(0, index_A, actions.row_A)
        token_A = actions.token_A.to(plan.weight_K.dtype)
        scale_A = torch.ones_like(token_A)
        if self.spans_views:
            weight_U, count_U = plan.mass_B[row_U], views.count_B[row_U].to(token_A.dtype)
            scale_A = 1.0 / views.inclusion_N[actions.view_A]
        else:
            count_N = torch.bincount(views.view_K, minlength=len(views))
            weight_N = plan.weight_K.new_zeros(len(views)).index_add(0, views.view_K, plan.weight_K) / count_N
            count_U = token_A.new_zeros(len(units)).index_add(0, index_A, token_A)
            alone_A = (count_U[index_A] == 0) & ~actions.token_A
            weight_A = torch.cat([plan.weight_K, plan.weight_K.new_zeros(len(token_A) - len(plan.weight_K))])
            weight_A = torch.where(alone_A, weight_N[actions.view_A], weight_A)
            weight_U = torch.zeros_like(count_U).index_add(0, index_A, weight_A)
        if self.bound == "mean":
            scale_A = scale_A / count_U.clamp(min=1)[index_A]
        return index_A, row_U, weight_U, scale_A

    def coefficients(self, plan: Plan, logprob_A: Tensor) -> Tensor:
        """Return dloss / dlogprob of every action, without a graph; NonFiniteError where anything is not finite."""
        leaf_A = logprob_A.detach().requires_grad_()
        _require_finite(plan, plan.views.row_N[plan.views.actions.view_A], leaf_A, "log-probability")
        with torch.enable_grad():
            loss = self(plan, leaf_A)
            _require_finite(plan, loss.row_U, loss.surrogate_U, "surrogate loss")
            if loss.divergence_K is not None:
                _require_finite(plan, plan.views.row_K, loss.divergence_K, "divergence")
            (coefficient_A,) = torch.autograd.grad(loss.value, leaf_A)
        _require_finite(plan, plan.views.actions.row_A, coefficient_A, "loss gradient")
        return coefficient_A


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
