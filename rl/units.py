"""Units: the actions that share one importance ratio.

A unit function maps the actions to one integer a unit; a unit's actions belong to one rollout. `spans_views` marks
units whose actions may lie in several views: where they do, their ratio needs all of these, and the objective makes two
passes. Units
marked `whole` share the weight of their rollout evenly; others weigh the sum of their tokens' weights.
`single_draw` marks units that hold one of the estimator's draws; others average over all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from .views import Actions

unit = SLOTS["unit"]


@unit.register
def token(actions: Actions) -> Tensor:
    """A ratio for every action (PPO, GRPO); the choice of a step's positions is an action of its own."""
    return torch.arange(len(actions.view_A), device=actions.view_A.device)


@unit.register
def step(actions: Actions) -> Tensor:
    """A ratio for the actions of one denoising step, tokens and choice together: p(step | canvas) now / then."""
    return actions.view_A


@unit.register
def position(actions: Actions) -> Tensor:
    """A ratio for a canvas position, over all canvases of an estimator that score it (coupled-GRPO)."""
    return actions.place_A


@unit.register
def sample(actions: Actions) -> Tensor:
    """A ratio for each of an estimator's draws of a rollout (BGPO)."""
    return actions.row_A * actions.draws + actions.sample_A


@unit.register
def rollout(actions: Actions) -> Tensor:
    """A ratio for a whole rollout; with bound `mean` that of GSPO (Zheng et al. 2025, eq. 7)."""
    return actions.row_A


for several in (position, sample, rollout):
    several.spans_views = True  # type: ignore[attr-defined]
for complete in (sample, rollout):
    complete.whole = True  # type: ignore[attr-defined]
sample.single_draw = True  # type: ignore[attr-defined]
