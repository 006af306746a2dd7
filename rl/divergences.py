"""Divergences: estimates of KL(policy || reference) at one sampled token, from d = log p - log p_ref (Schulman 2020).

They enter the loss with the gradient of the estimate itself: in expectation over tokens of the current policy that of
`k1` is 0 and that of `k2` is the gradient of the KL; that of `k3` is the gradient of the reverse direction,
KL(reference || policy). None is corrected for tokens that an older policy drew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS

divergence = SLOTS["divergence"]


@divergence.register
def k1(logprob_K: Tensor, reference_K: Tensor) -> Tensor:
    """d: unbiased, of either sign."""
    return logprob_K - reference_K


@divergence.register
def k2(logprob_K: Tensor, reference_K: Tensor) -> Tensor:
    """d^2 / 2: biased, small variance."""
    return 0.5 * (logprob_K - reference_K).square()


@divergence.register
def k3(logprob_K: Tensor, reference_K: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative."""
    gap_K = reference_K - logprob_K
    return torch.expm1(gap_K) - gap_K
