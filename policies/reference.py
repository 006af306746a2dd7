"""Frozen companions of the policy: the same model with its adapter off, or a copy."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from .denoiser import Denoiser
from .layout import Family


@dataclass
class AdapterOff:
    """The policy's base model: its logits with the adapter disabled, at no extra memory."""

    policy: Denoiser
    family: Family

    @property
    def root(self) -> Any:
        """The policy's root module where its weights are sharded."""
        return self.policy.root

    @torch.no_grad()
    def logits(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
        """Return the base model's logits, as `Denoiser.logits`."""
        with self.policy.model.disable_adapter():
            return self.policy.logits(input_ids_BT, **options)


def build_reference(policy: Denoiser, kind: str, *, beta: float) -> AdapterOff | Denoiser | None:
    """Return the reference named `auto`, `adapter_off`, `frozen_copy`, `old` or `none`; None where beta is 0.

    `old` is the policy itself: what is planned before the first inner step is the old policy's.
    """
    adapted = hasattr(policy.model, "disable_adapter")
    if kind == "none" or beta == 0:
        return None
    if kind == "auto":
        kind = "adapter_off" if adapted else "frozen_copy"
    if kind == "old":
        return policy
    if kind == "adapter_off":
        if not adapted:
            raise RecipeError("objective.reference: adapter_off needs model.lora; use frozen_copy without an adapter.")
        return AdapterOff(policy, policy.family)
    if kind == "frozen_copy":
        model = copy.deepcopy(policy.model).eval().requires_grad_(False)
        return replace(policy, model=model)
    raise RecipeError(f"objective.reference: '{kind}' is not one of auto, adapter_off, frozen_copy, old, none.")
