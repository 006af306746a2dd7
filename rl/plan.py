"""The plan: what a batch of rollouts fixes for all of its inner steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from .views import Views

VIEW_FIELDS = (
    *("row_N", "step_N", "inclusion_N", "view_K", "position_K", "target_K", "behaviour_K", "count_B", "views_B"),
)
PLAN_FIELDS = ("advantage_B", "weight_K", "mass_B", "behaviour_A", "old_A")


@dataclass(frozen=True)
class Plan:
    """Views with weights, advantages and log-probs; computed once a batch, reused by every inner step.

    Shapes: A actions (`Views.actions`), K scored tokens, B rollouts. `behaviour_A` are the rollout's own log-probs,
    `old_A` those that the ratio divides by (the same, or recomputed), `reference_K` those of the reference where a
    divergence is weighed. `mass` is the denominator of the loss: the sum of `mass_B` over all rollouts of all ranks.
    """

    views: Views
    advantage_B: Tensor
    weight_K: Tensor
    mass_B: Tensor
    behaviour_A: Tensor
    old_A: Tensor
    mass: float
    reference_K: Tensor | None = None

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
            weight_K=self.weight_K[kept_K],
            behaviour_A=self.behaviour_A[index_A],
            old_A=self.old_A[index_A],
            reference_K=None if self.reference_K is None else self.reference_K[kept_K],
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
        saved["mass"] = torch.tensor(self.mass, dtype=torch.float64)
        if self.reference_K is not None:
            saved["reference_K"] = self.reference_K
        return saved

    @staticmethod
    def from_tensors(trajectory: Trajectory, sampler: Sampler, saved: dict[str, Tensor]) -> Plan:
        """Return the plan that `tensors` saved; `trajectory` and `sampler` are those it was made with."""
        choices = len(saved["old_A"]) - len(saved["weight_K"])
        views = Views(trajectory, **{name: saved[name] for name in VIEW_FIELDS}, sampler=sampler if choices else None)
        mass, reference_K = float(saved["mass"]), saved.get("reference_K")
        return Plan(views, **{name: saved[name] for name in PLAN_FIELDS}, mass=mass, reference_K=reference_K)
