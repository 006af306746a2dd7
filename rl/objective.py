"""The objective: one policy-gradient loss made of parts, planned once a batch and differentiated chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from ..rollouts.forward import LogitSource
from ..rollouts.sampler import Sampler
from ..rollouts.traits import wants
from ..rollouts.trajectory import Trajectory
from . import blockwise, bounds, divergences, drafts, slices, surrogates, units, weights  # noqa: F401 (registers parts)
from .credit import Credit
from .diagnostics import diagnose
from .distributed import total
from .losses import LossFunction
from .plan import Plan
from .replay import Scores, chunks, join, replay, replay_all
from .sharding import paced
from .surprise import weigh
from .views import Views

CORRECTIONS = ("none", "truncated", "masked")
OLD = ("rollout", "recompute", "none")


@dataclass(frozen=True)
class Objective:
    """What is minimised; every field is a choice of the recipe's `objective` section.

    With units U of actions K (tokens, and where `sampled_confidence` records them the choices of positions):

        loss = 1/mass [ sum_U w_U c_U surrogate(log rho_U, A_U) + beta sum_X w_X divergence_X ]
        log rho_U = bound(log p_now of U) - bound(log p_old of U)
        w_U = sum of the weights of U's tokens;  mass = what these sum to over all rollouts of all ranks

    `old` is the rollout's own log-prob, one recomputed by `plan`, or `none` (0: the surrogate gets the bound itself).
    Where it is recomputed, `correction` `truncated` sets c_U = min(p_old / p_rollout, `ceiling`) over the same unit,
    and `masked` 0 above the ceiling or below its inverse; else c_U = 1. The divergence is that of tokens, or `over` a
    unit that of the summed estimates divided by its tokens; `divergence_weight` gives w_X where it is not `weight`'s. A
    reference that is the policy itself is the old policy. With `redraw` an estimator that draws does so anew for
    each inner step. `chunk` views share a forward and a graph; it changes memory and speed, never the gradient. A unit
    whose ratio exceeds `ratio_limit` refuses the update (None: no limit).
    Gradients of several ranks are to be summed, not averaged. Dropout is up to the caller: with any, ratios of 1 are
    not 1.
    """

    estimator: Callable[..., Views]
    unit: Callable[..., Tensor]
    surrogate: Callable[..., Tensor]
    weight: Callable[..., tuple[Tensor, Tensor]]
    divergence: Callable[..., Tensor]
    divergence_weight: Callable[..., tuple[Tensor, Tensor]] | None = None
    bound: Callable[..., Tensor] = bounds.sum_
    beta: float = 0.0
    over: str = "token"
    correction: str = "none"
    ceiling: float = 2.0
    old: str = "rollout"
    redraw: bool = False
    chunk: int = 32
    ratio_limit: float | None = 1.0e4

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("old", self.old, OLD),
            ("correction", self.correction, CORRECTIONS),
            ("over", self.over, ("token", "unit")),
        ):
            if value not in allowed:
                raise RecipeError(f"objective.{name}: '{value}' is not one of {', '.join(allowed)}.")
        if self.correction != "none" and self.old != "recompute":
            raise RecipeError(
                f"objective.correction: '{self.correction}' weighs recomputed old log-probs; set old: recompute."
            )
        if self.correction != "none" and not self.ceiling > 0:
            raise RecipeError(f"objective.correction.ceiling: {self.ceiling} must be positive.")
        if self.chunk < 1:
            raise RecipeError(f"objective.chunk: {self.chunk} must be at least 1 view.")
        if self.divergence_weight is not None and self.over == "unit":
            raise RecipeError("objective.divergence_weight: weighs tokens, and the divergence is over units; drop one.")
        if not self.beta >= 0:
            raise RecipeError(f"objective.beta: {self.beta} must be at least 0.")
        if self.ratio_limit is not None and not self.ratio_limit > 1:
            raise RecipeError(f"objective.ratio_limit: {self.ratio_limit} must exceed 1, the ratio before any update.")
        # A part with impossible knobs is refused here, before anything was sampled.
        self.surrogate(torch.zeros(1), torch.ones(1))
        one, zero = torch.ones(1), torch.zeros(1, dtype=torch.long)
        self.bound(-one, bounds.Terms(zero, one, one, zero, one, one))

    @cached_property
    def loss(self) -> LossFunction:
        """The loss as a function of log-probs."""
        correction = None if self.correction == "none" else partial(_corrected, name=self.correction, top=self.ceiling)
        parts = (self.unit, self.bound, self.surrogate, self.divergence)
        absolute = self.old == "none"
        return LossFunction(*parts, self.beta, self.over, correction, absolute=absolute, limit=self.ratio_limit)

    @torch.no_grad()
    def plan(
        self,
        policy: LogitSource,
        reference: LogitSource | None,
        trajectory: Trajectory,
        advantage: Credit | Tensor,
        *,
        rng: torch.Generator | None,
        sampler: Sampler,
        inner: tuple[int, int] = (0, 1),
    ) -> Plan:
        """Return the plan of a batch: views, weights, old and reference log-probs, and the global mass.

        `advantage` is `advantage_B`, or a Credit that tells steps or positions apart. A NaN in it marks a rollout whose
        rewards do not apply: no gradient and no mass. With beta 0 views of advantage 0 keep their mass, but no forward
        is spent on them. `inner` is (number, of how many) inner step this plan is for. Every rank must call this.
        Raises ValueError without a behaviour log-prob (temperature 0), without the reference that beta needs, or when
        the rollouts recorded no choice of positions.
        """
        credit = advantage if isinstance(advantage, Credit) else Credit(advantage)
        _check_inputs(self, reference, trajectory, credit, sampler)
        told = {"credit": credit} if wants(self.estimator, "credit") else {}
        views = self.estimator(trajectory, rng=rng, context=sampler, inner_step=inner, **told)
        views = replace(views, trajectory=trajectory.without_drafts())
        if self.old == "rollout" and not views.recorded:
            raise RecipeError("objective.old: an estimator has no log-probs of the rollout's; set recompute or none.")
        if views.clean and policy.family.attention == "full":
            raise RecipeError("objective.estimator: blocks behind clean blocks need a block-causal family.")
        views, weight_K, mass_B = weigh(self.weight, policy, views, self.chunk)
        mass_B = mass_B * credit.applies_B
        mass = total(float(mass_B.double().sum()))
        advantage_A = credit.of(views)
        active_N = self._active(views, advantage_A, credit)
        kept_K, kept_A = active_N[views.view_K], active_N[views.actions.view_A]
        divergence_K = None if self.divergence_weight is None else self.divergence_weight(views)[0][kept_K]
        views, weight_K, advantage_A = views.where(active_N), weight_K[kept_K], advantage_A[kept_A].nan_to_num(0.0)
        old_A, behaviour_A = self._old(policy, views)
        reference_K = None
        if self.beta > 0 and reference is policy and self.old != "none":
            reference_K = old_A[: len(weight_K)].clone()
        elif self.beta > 0:
            assert reference is not None
            reference_K = replay_all(reference, views, self.chunk).logprob_A[: len(weight_K)]
        return Plan(views, advantage_A, weight_K, mass_B, behaviour_A, old_A, mass, reference_K, divergence_K)

    def _active(self, views: Views, advantage_A: Tensor, credit: Credit) -> Tensor:
        """Return which views have an action that can have a gradient."""
        active_N = credit.applies_B[views.row_N]
        if self.beta == 0:
            moving_A = advantage_A.nan_to_num(0.0) != 0
            seen_N = torch.zeros_like(active_N, dtype=torch.long).index_add(0, views.actions.view_A, moving_A.long())
            active_N = active_N & (seen_N > 0)
        return active_N

    def _old(self, policy: LogitSource, views: Views) -> tuple[Tensor, Tensor]:
        """Return the log-probs that the ratio divides by, and the rollout's own (the old, where it has none)."""
        behaviour_A = _behaviour(views)
        if self.old == "none":
            old_A = torch.zeros_like(behaviour_A)
        elif self.old == "recompute":
            old_A = replay_all(policy, views, self.chunk).logprob_A
        else:
            old_A = behaviour_A.clone()
        return old_A, behaviour_A if views.recorded else old_A.clone()

    def backward(self, policy: LogitSource, plan: Plan) -> dict[str, float]:
        """Add this rank's share of the loss's gradient to the parameters' `.grad` and return statistics.

        Each chunk of views is one forward, and its graph is freed before the next: the gradient of the loss at the
        chunk's log-probs is a coefficient an action, and (coefficient x logprob).sum() is what is back-propagated.
        Where a unit spans views a first pass without grad gives the log-probs of all. Every rank must call this. Raises
        NonFiniteError or RatioError, before the backward of the chunk concerned, where a log-prob, loss or coefficient
        is not finite or a ratio exceeds the limit.
        """
        coefficient_A: Tensor | None = None
        if self.loss.spans_views(plan):
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
    section = {"divergence": "k3", "bound": "sum", **section}
    slots = ("estimator", "unit", "bound", "surrogate", "weight", "divergence")
    parts: dict[str, Any] = {slot: SLOTS[slot].build(section[slot], f"objective.{slot}") for slot in slots}
    also = section.get("divergence_weight")
    plain = ("beta", "over", "old", "redraw", "chunk", "ratio_limit")
    return Objective(
        **parts,
        correction=correction["name"],
        ceiling=correction.get("ceiling") or 2.0,
        divergence_weight=None if also is None else SLOTS["weight"].build(also, "objective.divergence_weight"),
        **{key: section[key] for key in plain if key in section},
    )


def _corrected(log_ratio_U: Tensor, *, name: str, top: float) -> Tensor:
    """Return the weight of each unit from the log-ratio of its recomputed and its rollout's probability."""
    if name == "truncated":
        return log_ratio_U.clamp(max=math.log(top)).exp()
    kept_U = log_ratio_U.abs() <= math.log(top)
    return torch.where(kept_U, log_ratio_U, 0.0).exp() * kept_U


def _check_inputs(
    objective: Objective, reference: LogitSource | None, trajectory: Trajectory, credit: Credit, sampler: Sampler
) -> None:
    """Raise ValueError for inputs that no plan can be made of."""
    if trajectory.temperature <= 0:
        raise RecipeError("rollout.temperature: 0 draws without a probability, so there is no ratio; set it above 0.")
    shape, infinite = tuple(credit.value.shape), credit.value.isinf()
    if shape[:1] != (len(trajectory),) or len(shape) != (1 if credit.by == "rollout" else 2):
        raise ValueError(f"advantage: shape {shape} does not fit {len(trajectory)} rollouts.")
    if bool(infinite.any()):
        row = int(infinite.nonzero()[0, 0])
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
