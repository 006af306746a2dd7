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


def times_scored(views: Views) -> Tensor:
    """Return on how many of the views each scored token is scored."""
    place_K = views.row_K * views.trajectory.canvas + views.position_K
    place, index_K = torch.unique(place_K, return_inverse=True)
    return torch.bincount(index_K, minlength=len(place))[index_K]


@weight.register
def uniform(views: Views) -> tuple[Tensor, Tensor]:
    """1 a token: the loss is a mean over tokens (DAPO's normaliser); long completions count for more.

    A token that an estimator scores on several canvases has its share on each.
    """
    share_K = 1.0 / views.inclusion_N[views.view_K]
    if views.estimated:
        share_K = share_K / times_scored(views)
    return share_K, views.count_B.float()


@weight.register
def scored_only(views: Views) -> tuple[Tensor, Tensor]:
    """1 a token that the estimator hid and scored: a mean over masked tokens (UniGRPO, likelihood_rl.md A2).

    On the rollout's own canvases every token is scored, and this is `uniform`.
    """
    if not views.estimated:
        return uniform(views)
    share_K = 1.0 / times_scored(views)
    return share_K, torch.zeros_like(views.count_B, dtype=share_K.dtype).index_add(0, views.row_K, share_K)


@weight.register
def per_rollout(views: Views) -> tuple[Tensor, Tensor]:
    """1 a rollout, shared evenly by its tokens: a mean over rollouts of the mean over their tokens (GRPO)."""
    share_K = 1.0 / (views.inclusion_N[views.view_K] * views.count_B[views.row_K])
    if views.estimated:
        share_K = share_K / times_scored(views)
    return share_K, (views.count_B > 0).float()


@weight.register
def per_step_mean(views: Views) -> tuple[Tensor, Tensor]:
    """1 / (n_{b,t} S_b): a mean over rollouts of the mean over steps of the mean over a step's tokens.

    CJ-GRPO's objective, "Taming Masked Diffusion Language Models", eq. 11 (trajectory_rl.md section 4.4): n_{b,t}
    tokens at step t of rollout b, S_b steps with any. The mass of a rollout is 1, and 0 without a scored token.
    """
    count_N = torch.bincount(views.view_K, minlength=len(views))
    share_N = 1.0 / (count_N * views.views_B[views.row_N] * views.inclusion_N)
    return share_N[views.view_K], (views.count_B > 0).float()
