"""Units: the actions that share one importance ratio.

A unit function maps the actions to one integer a unit; a unit's actions belong to one rollout. `spans_views` marks
units that are all of a rollout's actions: their ratio needs every view, so the objective makes two passes.
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
def rollout(actions: Actions) -> Tensor:
    """A ratio for a whole rollout; with bound `mean` that of GSPO (Zheng et al. 2025, eq. 7)."""
    return actions.row_A


rollout.spans_views = True  # type: ignore[attr-defined]
