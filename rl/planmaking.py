"""The plans of a batch: one that every inner step reuses, or one for each where canvases are drawn anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..rollouts.noise import generator
from ..rollouts.trajectory import Trajectory
from .credit import Credit
from .joint import AnyPlan, JointCredit
from .objective import Objective

if TYPE_CHECKING:
    from .trainer import UnmaskTrainer


def plans_of(
    trainer: UnmaskTrainer,
    trajectory: Trajectory,
    credit: Credit | JointCredit,
    key: tuple[int, str, int],
    *,
    inner_steps: int,
) -> list[AnyPlan]:
    """Return the plans of a batch for `inner_steps`, their draws keyed by (seed, purpose, step) and inner step.

    Every rank must call this.
    """
    device, objective = trainer.denoiser.device, trainer.objective
    trajectory, credit = trajectory.to(device), credit.to(device)
    if trainer.critic is not None and isinstance(objective, Objective) and isinstance(credit, Credit):
        credit = trainer.critic.credit(trainer.denoiser, objective, trajectory, credit, trainer.sampler)
    return [
        objective.plan(
            trainer.denoiser,
            trainer.reference,
            trajectory,
            credit,
            rng=generator(*key, inner),
            sampler=trainer.sampler,
            inner=(inner, inner_steps),
        )
        for inner in range(inner_steps if objective.redraw else 1)
    ]
