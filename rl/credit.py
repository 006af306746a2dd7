"""Credit: which advantage an action of a rollout has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .views import Views


@dataclass(frozen=True)
class Credit:
    """Advantages by rollout (`value` is `[B]`), by denoising step (`[B, S]`) or by canvas position (`[B, L]`).

    A rollout without a number that is not NaN does not apply: its actions have no gradient, and it has no mass.
    """

    value: Tensor
    by: Literal["rollout", "step", "position"] = "rollout"

    @property
    def applies_B(self) -> Tensor:
        """Which rollouts apply."""
        known = ~self.value.isnan()
        return known if self.by == "rollout" else known.any(dim=1)

    def of(self, views: Views) -> Tensor:
        """Return `advantage_A`, that of each action of `views`; a choice of positions has its step's."""
        actions = views.actions
        if self.by == "rollout":
            return self.value[actions.row_A]
        if self.by == "step":
            return self.value[actions.row_A, views.step_N[actions.view_A]]
        if len(actions.row_A) > len(views.position_K):
            raise ValueError("credit: choices of positions have no position; give them a step's advantage.")
        return self.value[actions.row_A, views.position_K]

    def to(self, device: torch.device | str) -> Credit:
        """Return the credit on `device`."""
        return Credit(self.value.to(device), self.by)
