"""The objective: one policy-gradient loss made of parts, planned once a batch and differentiated chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from ..rollouts.forward import LogitSource
from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from . import divergences, estimators, surrogates, units, weights  # noqa: F401 (importing registers the parts)
from .diagnostics import diagnose
from .distributed import total
from .losses import LossFunction
from .plan import Plan
from .replay import Scores, chunks, join, replay, replay_all
from .sharding import paced
from .views import Views


@dataclass(frozen=True)
class Objective:
    """What is minimised; every field is a choice of the recipe's `objective` section.

    With units U of actions K (tokens, and where `sampled_confidence` records them the choices of positions):

        loss = 1/mass [ sum_U w_U c_U surrogate(log rho_U, A_U) + beta sum_K w_K divergence_K ]
        log rho_U = sum (bound `sum`) or mean over tokens (`mean`) of log p_now - log p_old over U
        w_U = sum of the weights of U's tokens;  mass = what these sum to over all rollouts of all ranks

    `old` is the rollout's own log-prob or one recomputed by `plan`; in the second case `correction` `truncated` sets
    c_U = min(p_old / p_rollout, `ceiling`) over the same unit, else c_U = 1. The divergence is that of tokens alone.
    `chunk` views share a forward and a graph; it changes memory and speed, never the gradient. Gradients of several
    ranks are to be summed, not averaged. Dropout is up to the caller: with any, ratios of 1 are not 1.
    """

    estimator: Callable[..., Views]
    unit: Callable[..., Tensor]
    surrogate: Callable[..., Tensor]
    weight: Callable[..., tuple[Tensor, Tensor]]
    divergence: Callable[..., Tensor]
    bound: str = "sum"
    beta: float = 0.0
    correction: str = "none"
    ceiling: float = 2.0
    old: str = "rollout"
    chunk: int = 32

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("bound", self.bound, ("sum", "mean")),
            ("old", self.old, ("rollout", "recompute")),
            ("correction", self.correction, ("none", "truncated")),
        ):
            if value not in allowed:
                raise RecipeError(f"objective.{name}: '{value}' is not one of {', '.join(allowed)}.")
        if self.correction == "truncated" and self.old != "recompute":
            raise RecipeError("objective.correction: 'truncated' weighs recomputed old log-probs; set old: recompute.")
        if self.correction == "truncated" and not self.ceiling > 0:
            raise RecipeError(f"objective.correction.ceiling: {self.ceiling} must be positive.")
        if self.chunk < 1:
            raise RecipeError(f"objective.chunk: {self.chunk} must be at least 1 view.")
        if not self.beta >= 0:
            raise RecipeError(f"objective.beta: {self.beta} must be at least 0.")
        # A part with impossible knobs is refused here, before anything was sampled.
        self.surrogate(torch.zeros(1), torch.ones(1))

    @cached_property
    def loss(self) -> LossFunction:
        """The loss as a function of log-probs."""
        ceiling = self.ceiling if self.correction == "truncated" else None
        return LossFunction(self.unit, self.surrogate, self.divergence, self.bound, self.beta, ceiling)

    @torch.no_grad()
    def plan(
        self,
        policy: LogitSource,
        reference: LogitSource | None,
        trajectory: Trajectory,
        advantage_B: Tensor,
        *,
        rng: torch.Generator | None,
        sampler: Sampler,
    ) -> Plan:
        """Return the plan of a batch: views, weights, old and reference log-probs, and the global mass.

        A NaN in `advantage_B` marks a rollout whose rewards do not apply: no gradient and no mass. With beta 0 a
        rollout of advantage 0 keeps its mass, but no forward is spent on it. Every rank must call this. Raises
        ValueError without a behaviour log-prob (temperature 0), without the reference that beta needs, or when
        the rollouts recorded no choice of positions.
        """
        _check_inputs(self, reference, trajectory, advantage_B, sampler)
        applies_B = ~advantage_B.isnan()
        views = self.estimator(trajectory, rng=rng, context=sampler)
        weight_K, mass_B = self.weight(views)
        mass_B = mass_B * applies_B
        advantage_B = advantage_B.nan_to_num(0.0)
        mass = total(float(mass_B.double().sum()))
        active_B = applies_B if self.beta > 0 else applies_B & (advantage_B != 0)
        active_N = active_B[views.row_N]
        weight_K = weight_K[active_N[views.view_K]]
        views = views.where(active_N)
        behaviour_A = _behaviour(views)
        recompute = self.old == "recompute"
        old_A = replay_all(policy, views, self.chunk).logprob_A if recompute else behaviour_A.clone()
        reference_K = None
        if self.beta > 0:
            assert reference is not None
            reference_K = replay_all(reference, views, self.chunk).logprob_A[: len(weight_K)]
        return Plan(views, advantage_B, weight_K, mass_B, behaviour_A, old_A, mass, reference_K)

    def backward(self, policy: LogitSource, plan: Plan) -> dict[str, float]:
        """Add this rank's share of the loss's gradient to the parameters' `.grad` and return statistics.

        Each chunk of views is one forward, and its graph is freed before the next: the gradient of the loss at the
        chunk's log-probs is a coefficient an action, and (coefficient x logprob).sum() is what is back-propagated.
        Where a unit spans views a first pass without grad gives the log-probs of all. Every rank must call this. Raises
        NonFiniteError, before the backward of the chunk concerned, where a log-prob, loss or coefficient is not finite.
        """
        coefficient_A: Tensor | None = None
        if self.loss.spans_views:
            coefficient_A = self.loss.coefficients(plan, replay_all(policy, plan.views, self.chunk).logprob_A)
        collected: list[Scores] = []
        for start, stop in paced(policy, chunks(plan.views, self.chunk)):
            part = plan.part(start, stop)
            scores = replay(policy, part.views)
            if coefficient_A is None:
                share_A = self.loss.coefficients(part, scores.logprob_A)
            else:
                share_A = coefficient_A[plan.action_index(start, stop)]
            torch.dot(share_A, scores.logprob_A).backward()
            collected.append(Scores(scores.logprob_A.detach(), scores.entropy_K))
        return diagnose(self.loss, plan, join(plan.views, collected), recomputed=self.old == "recompute")


def build_objective(section: Mapping[str, Any]) -> Objective:
    """Return the Objective of a recipe's `objective` section; `advantage` and other keys are not read."""
    correction = section.get("correction") or {"name": "none"}
    if isinstance(correction, str):
        correction = {"name": correction}
    section = {"divergence": "k3", **section}
    slots = ("estimator", "unit", "surrogate", "weight", "divergence")
    parts: dict[str, Any] = {slot: SLOTS[slot].build(section[slot], f"objective.{slot}") for slot in slots}
    return Objective(
        **parts,
        correction=correction["name"],
        ceiling=correction.get("ceiling") or 2.0,
        **{key: section[key] for key in ("bound", "beta", "old", "chunk") if key in section},
    )


def _check_inputs(
    objective: Objective, reference: LogitSource | None, trajectory: Trajectory, advantage_B: Tensor, sampler: Sampler
) -> None:
    """Raise ValueError for inputs that no plan can be made of."""
    if trajectory.temperature <= 0:
        raise RecipeError("rollout.temperature: 0 draws without a probability, so there is no ratio; set it above 0.")
    if advantage_B.shape != (len(trajectory),):
        raise ValueError(f"advantage: shape {tuple(advantage_B.shape)} does not fit {len(trajectory)} rollouts.")
    if bool(advantage_B.isinf().any()):
        row = int(advantage_B.isinf().nonzero()[0])
        rollout = int(trajectory.rollout_id_B[row])
        raise ValueError(f"advantage: that of rollout {rollout} is infinite; check the rewards.")
    if objective.beta > 0 and reference is None:
        raise RecipeError(f"objective.beta: {objective.beta} weighs a divergence to a reference, and there is none.")
    if sampler.exact_choice and trajectory.choice_logprob_BS is None:
        raise RecipeError("trajectory: choice_logprob_BS is missing; the rollout's sampler recorded none.")


def _behaviour(views: Views) -> Tensor:
    """Return the rollout's own log-probs of the actions of `views`."""
    trajectory, logprob_K = views.trajectory, views.behaviour_K.clone()
    if views.sampler is None:
        return logprob_K
    assert trajectory.choice_logprob_BS is not None
    return torch.cat([logprob_K, trajectory.choice_logprob_BS[views.row_N, views.step_N].to(logprob_K.dtype)])
