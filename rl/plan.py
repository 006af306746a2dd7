"""The plan: what a batch of rollouts fixes for all of its inner steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from .views import TOKEN_TABLES, VIEW_TABLES, Views

VIEW_FIELDS = (
    *("row_N", "step_N", "inclusion_N", "view_K", "position_K", "target_K", "behaviour_K", "count_B", "views_B"),
)
TERMS = ("reference_K", "divergence_K")  # of the divergence, where one is weighed
PLAN_FIELDS = ("advantage_A", "weight_K", "mass_B", "behaviour_A", "old_A")


@dataclass(frozen=True)
class Plan:
    """Views with weights, advantages and log-probs; computed once a batch, reused by every inner step.

    Shapes: A actions (`Views.actions`), K scored tokens, B rollouts. `advantage_A` is that of each action,
    `behaviour_A` are the rollout's own log-probs, `old_A` those that the ratio divides by (the same, recomputed, or 0),
    `reference_K` those of the reference where a divergence is weighed, by `divergence_K` or else `weight_K`. `mass` is
    the denominator of the loss: the sum of `mass_B` over all rollouts of all ranks.
    """

    views: Views
    advantage_A: Tensor
    weight_K: Tensor
    mass_B: Tensor
    behaviour_A: Tensor
    old_A: Tensor
    mass: float
    reference_K: Tensor | None = None
    divergence_K: Tensor | None = None

    @property
    def divergence_weight_K(self) -> Tensor:
        """What each scored token counts in the divergence."""
        return self.weight_K if self.divergence_K is None else self.divergence_K

    @property
    def trajectory(self) -> Trajectory:
        """The rollouts."""
        return self.views.trajectory

    def part(self, start: int, stop: int) -> Plan:
        """Return the plan of the views `start` to `stop`."""
        index_A = self.action_index(start, stop)
        kept_K = self.views.tokens(start, stop)
        return replace(
            self,
            views=self.views.part(start, stop),
            advantage_A=self.advantage_A[index_A],
            weight_K=self.weight_K[kept_K],
            behaviour_A=self.behaviour_A[index_A],
            old_A=self.old_A[index_A],
            reference_K=None if self.reference_K is None else self.reference_K[kept_K],
            divergence_K=None if self.divergence_K is None else self.divergence_K[kept_K],
        )

    def action_index(self, start: int, stop: int) -> Tensor:
        """Return the indices of the actions of the views `start` to `stop`, tokens first."""
        kept_K, device = self.views.tokens(start, stop), self.weight_K.device
        index_K = torch.arange(kept_K.start, kept_K.stop, device=device)
        if self.views.sampler is None:
            return index_K
        return torch.cat([index_K, torch.arange(start, stop, device=device) + len(self.weight_K)])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything but the trajectory as named tensors, for a checkpoint."""
        saved = {name: getattr(self.views, name) for name in VIEW_FIELDS}
        saved |= {name: getattr(self, name) for name in PLAN_FIELDS}
        saved |= self.views.optional(VIEW_TABLES + TOKEN_TABLES)
        saved |= {name: torch.tensor(getattr(self.views, name)) for name in ("clean", "draws", "recorded")}
        saved["mass"] = torch.tensor(self.mass, dtype=torch.float64)
        saved |= {name: value for name in TERMS if (value := getattr(self, name)) is not None}
        return saved

    @staticmethod
    def from_tensors(trajectory: Trajectory, sampler: Sampler, saved: dict[str, Tensor]) -> Plan:
        """Return the plan that `tensors` saved; `trajectory` and `sampler` are those it was made with."""
        choices = len(saved["old_A"]) - len(saved["weight_K"])
        names = (*VIEW_FIELDS, *VIEW_TABLES, *TOKEN_TABLES)
        tables: dict[str, Any] = {name: saved[name] for name in names if name in saved}
        tables |= {"clean": bool(saved["clean"]), "draws": int(saved["draws"]), "recorded": bool(saved["recorded"])}
        views = Views(trajectory, **tables, sampler=sampler if choices else None)
        terms: dict[str, Any] = {name: saved.get(name) for name in TERMS}
        return Plan(views, **{name: saved[name] for name in PLAN_FIELDS}, **terms, mass=float(saved["mass"]))
