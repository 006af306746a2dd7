"""Weights: what each scored token counts in the loss.

A weight function returns (`weight_K`, `mass_B`): the weight of each scored token, divided by the inclusion probability
of its view, and the exact weight of each rollout if the estimator kept all its views. E[sum of a rollout's weights] =
`mass_B`, and the loss is divided by the sum of `mass_B` over all rollouts of all ranks. Only those marked `scaled` add
up to something else: their method divides by a number that is no sum of weights.

Those marked `by_entropy` also read `entropy_K`, of the old policy, where there are hints; those marked `by_chance`
take `logprob_K`, the old policy's of every token, as second argument. Tokens to which they give weight 0 are taken out
of the views.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .views import Views

weight = SLOTS["weight"]


def times_scored(views: Views, kept_K: Tensor | None = None) -> Tensor:
    """Return on how many of the views each scored token is scored, of those `kept_K`."""
    place_K = views.row_K * views.trajectory.canvas + views.position_K
    place, index_K = torch.unique(place_K, return_inverse=True)
    kept_K = torch.ones_like(index_K) if kept_K is None else kept_K.long()
    return torch.zeros_like(place).index_add(0, index_K, kept_K)[index_K]


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


@weight.register
def per_step(views: Views) -> tuple[Tensor, Tensor]:
    """1 / n_{b,t}: a mean over the steps of all rollouts of the mean over a step's tokens (TraceRL, eq. 3).

    A rollout of many steps counts for more. Views of merged steps are steps.
    """
    count_N = torch.bincount(views.view_K, minlength=len(views))
    return (1.0 / (count_N * views.inclusion_N))[views.view_K], views.views_B.float()


@weight.register
def per_canvas(views: Views) -> tuple[Tensor, Tensor]:
    """1 / L: a mean over the views of all rollouts of the sum over a view's tokens, by the canvas's length.

    TraceRL's sliced training (trajectory_rl.md section 6.5): a normaliser that no completion's length changes.
    """
    share_N = 1.0 / (views.trajectory.canvas * views.inclusion_N)
    return share_N[views.view_K], views.views_B.float()


@weight.register
def drawn(views: Views, *, elbo: bool = True, confidence: bool = True) -> tuple[Tensor, Tensor]:
    """L / |M_t| p_old(x) / (n_t S_b): a mean over rollouts, their scored steps and a step's draws x (MDPO).

    L / |M_t|, by the masked positions of the canvas, is the weight of the ELBO (without `elbo`: 1); p_old(x), with
    which the rollout drew the token, makes uncertain draws count less (the released code's; without `confidence`: 1).
    """
    count_N = torch.bincount(views.view_K, minlength=len(views))
    weight_K = (1.0 / (count_N * views.views_B[views.row_N] * views.inclusion_N))[views.view_K]
    if elbo:
        assert views.factor_K is not None, "only drafts know how much of their canvas was masked"
        weight_K = weight_K * views.factor_K
    if confidence:
        weight_K = weight_K * views.behaviour_K.exp()
    return weight_K, (views.views_B > 0).float()


@weight.register
def per_step_sum(views: Views) -> tuple[Tensor, Tensor]:
    """1 / S_b: a mean over rollouts of the mean over steps of the sum over a step's tokens (AGRPO)."""
    share_N = 1.0 / (views.views_B[views.row_N] * views.inclusion_N)
    return share_N[views.view_K], (views.views_B > 0).float()


for other in (per_canvas, drawn, per_step_sum):
    other.scaled = True  # type: ignore[attr-defined]


@weight.register
def confident(views: Views, logprob_K: Tensor | None = None, *, level: float = 0.6) -> tuple[Tensor, Tensor]:
    """1 / (n_t S_b) for tokens that the old policy gives at least `level`, and those that the step decided (RLDF).

    A mean over rollouts, their scored steps and the n_t tokens that are kept of a step; the others have weight 0 and
    are taken out. On a rollout's own canvases each token is one that its step decided, and this is `per_step_mean`.
    """
    if not 0 <= level <= 1:
        raise RecipeError(f"weight.level: {level} must lie in [0, 1].")
    own_K = views.trajectory.born_BL[views.row_K, views.position_K] == views.step_N[views.view_K]
    kept_K = torch.ones_like(own_K) if logprob_K is None else own_K | (logprob_K >= math.log(max(level, 1e-30)))
    count_N = torch.zeros_like(views.inclusion_N).index_add(0, views.view_K, kept_K.to(views.inclusion_N.dtype))
    share_N = 1.0 / (count_N * views.views_B[views.row_N] * views.inclusion_N)
    return kept_K * share_N[views.view_K], (views.views_B > 0).float()


confident.by_chance = True  # type: ignore[attr-defined]


@weight.register
def source(views: Views, *, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """1 a token, and of each view's hints only for the `share` that the old policy is least sure of (IGPO).

    The other hints have weight 0 and are taken out of everything: neither a ratio nor a divergence sees them. At least
    one hint a view stays (none at `share` 0); ties go to the earlier position. The mass counts what stays. On the
    rollout's own canvases no hint is scored, and this is `uniform`.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"weight.share: {share} must lie in [0, 1].")
    if not views.estimated:
        return uniform(views)
    hint_K = views.hint_K
    kept_K = ~hint_K
    if views.entropy_K is not None and share > 0:
        hints, count_N = hint_K.nonzero().squeeze(1), torch.bincount(views.view_K[hint_K], minlength=len(views))
        # By view, then by falling entropy; both sorts are stable.
        order = hints[torch.argsort(views.entropy_K[hints], descending=True, stable=True)]
        order = order[torch.argsort(views.view_K[order], stable=True)]
        view = views.view_K[order]
        place = torch.arange(len(order), device=view.device) - (count_N.cumsum(0) - count_N)[view]
        kept_K = kept_K.index_put((order,), place < (share * count_N[view]).floor().clamp(min=1))
    share_K = kept_K / times_scored(views, kept_K).clamp(min=1)
    return share_K, torch.zeros_like(views.count_B, dtype=share_K.dtype).index_add(0, views.row_K, share_K)


source.by_entropy = True  # type: ignore[attr-defined]
