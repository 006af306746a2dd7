"""Weights: what each scored token counts in the loss.

A weight function returns (`weight_K`, `mass_B`): the weight of each scored token, divided by the inclusion probability
of its view, and the exact weight of each rollout if the estimator kept all its views. E[sum of a rollout's weights] =
`mass_B`, and the loss is divided by the sum of `mass_B` over all rollouts of all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from .views import Views

weight = SLOTS["weight"]


@weight.register
def uniform(views: Views) -> tuple[Tensor, Tensor]:
    """1 a token: the loss is a mean over tokens (DAPO's normaliser); long completions count for more."""
    return 1.0 / views.inclusion_N[views.view_K], views.count_B.float()


@weight.register
def per_step_mean(views: Views) -> tuple[Tensor, Tensor]:
    """1 / (n_{b,t} S_b): a mean over rollouts of the mean over steps of the mean over a step's tokens.

    CJ-GRPO's objective, "Taming Masked Diffusion Language Models", eq. 11 (trajectory_rl.md section 4.4): n_{b,t}
    tokens at step t of rollout b, S_b steps with any. The mass of a rollout is 1, and 0 without a scored token.
    """
    count_N = torch.bincount(views.view_K, minlength=len(views))
    share_N = 1.0 / (count_N * views.views_B[views.row_N] * views.inclusion_N)
    return share_N[views.view_K], (views.count_B > 0).float()
