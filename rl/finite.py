"""The refusal of a gradient that is not finite, before anything is stepped or saved."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .losses import NonFiniteError


def require_finite_gradient(parameters: Iterable[nn.Parameter], step: int) -> None:
    """Raise NonFiniteError when the norm of the gradient, summed over ranks, is NaN or infinite."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not bool(norm.isfinite()):
        raise NonFiniteError(
            f"update {step + 1}: the norm of the gradient is {norm.item()}; nothing was stepped. Lower optim.lr, and "
            "resume from the last checkpoint."
        )
