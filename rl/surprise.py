"""Weighing views by what the old policy is unsure of, so that hints which it knows already teach nothing (IGPO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..rollouts.forward import LogitSource
from .losses import mark_of
from .replay import replay_all
from .views import Views


def weigh(
    weight: Callable[..., tuple[Tensor, Tensor]], policy: LogitSource, views: Views, chunk: int
) -> tuple[Views, Tensor, Tensor]:
    """Return (views, `weight_K`, `mass_B`); weights by entropy or chance leave no token of weight 0 in the views.

    What is not in the views has no gradient, also where a ratio is that of a whole rollout; the released code masks its
    loss only, and the sum over the sequence brings the gradient back (trajectory_rl.md section 5.6). `by_entropy`
    costs a forward for each view that shows a hint, `by_chance` one for every view. Every rank must call this.
    """
    if mark_of(weight, "by_chance"):
        logprob_K = replay_all(policy, views, chunk).logprob_A[: len(views.view_K)]
        return _without_nothing(views, *weight(views, logprob_K))
    if not mark_of(weight, "by_entropy"):
        return views, *weight(views)
    hinted_N = torch.zeros_like(views.row_N, dtype=torch.bool)
    hinted_N[views.view_K[views.hint_K]] = True
    entropy_K = torch.zeros(len(views.view_K), device=views.view_K.device)
    entropy_K[hinted_N[views.view_K]] = replay_all(policy, views.where(hinted_N), chunk).entropy_K.float()
    views = replace(views, entropy_K=entropy_K)
    return _without_nothing(views, *weight(views))


def _without_nothing(views: Views, weight_K: Tensor, mass_B: Tensor) -> tuple[Views, Tensor, Tensor]:
    """Return the views without the tokens of weight 0."""
    kept_K = weight_K != 0
    if bool(kept_K.all()):
        return views, weight_K, mass_B
    return views.only(kept_K), weight_K[kept_K], mass_B
