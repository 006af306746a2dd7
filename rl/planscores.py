"""What a planner's loss is made of, from recorded steps alone: log-probabilities, entropies, labels of a warm start."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..rollouts.trajectory import PAD, Trajectory
from . import orders

if TYPE_CHECKING:
    from .planning import Planning, StepPlan

UNLABELLED = -1
# Distributions in which a position's logit is that of its own chance, which a label of its own can teach.
LABELLED = ("bernoulli", "plackett_luce", "remasking")


def step_scores(planning: Planning, plan: StepPlan, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability, entropy and divergence from the order of some of the recorded choices.

    Where the plan has labels, the log-probability is that of the labels.
    """
    trajectory, row_N, step_N = plan.trajectory, plan.row_N[part], plan.step_N[part]
    assert trajectory.features_BSLF is not None and trajectory.candidate_BSL is not None
    spec = planning.planner.spec
    token_NL, rank_NL = trajectory.drawn_at(row_N, step_N)
    chosen_NL = token_NL != trajectory.mask_token_id
    feature_NLF = trajectory.features_BSLF[row_N, step_N].float()
    candidate_NL, standing_NL = trajectory.candidate_BSL[row_N, step_N], None
    if spec.remasks:
        decided_NL = trajectory.canvas_before(row_N, step_N) != trajectory.mask_token_id
        chosen_NL = chosen_NL | trajectory.taken_at(row_N, step_N)
        candidate_NL, standing_NL = candidate_NL & ~decided_NL, candidate_NL & decided_NL
    past_NMD = None
    if spec.sizes:
        assert trajectory.end_BS is not None
        place_L = torch.arange(trajectory.canvas, device=candidate_NL.device)
        chosen_NL = place_L + 1 == trajectory.end_BS[row_N, step_N][:, None]
        past_NMD = None if trajectory.past_BSMD is None else trajectory.past_BSMD[row_N, step_N].float()
    distribution = planning.planner.distribution(
        feature_NLF, candidate_NL, standing_NL, past_BMD=past_NMD, temperature=planning.temperature
    )
    logprob_N, entropy_N = (measure(chosen_NL, rank_NL) for measure in (distribution.log_prob, distribution.entropy))
    if plan.label_NL.shape[1]:
        logprob_N = label_logprob(distribution.logit_BL, plan.label_NL[part])
    if planning.order is None:
        return logprob_N, entropy_N, torch.zeros_like(logprob_N)
    odds_NL = 4 * feature_NLF[..., spec.features.index("odds")]  # as `observe` divides them
    return logprob_N, entropy_N, orders.pull(planning.order, distribution, odds_NL, candidate_NL)


def label_logprob(logit_NL: Tensor, label_NL: Tensor) -> Tensor:
    """Return sum [y log s + (1 - y) log(1 - s)], s = sigmoid(logit), over the labelled positions `[N]`."""
    each_NL = logsigmoid(torch.where(label_NL == 1, logit_NL, -logit_NL))
    return torch.where(label_NL == UNLABELLED, 0.0, each_NL).sum(dim=1)


def final_labels(trajectory: Trajectory, row_N: Tensor, step_N: Tensor) -> Tensor:
    """Return `label_NL` (int8): 1 where a step's draft of an open position is what the rollout ends with, else 0.

    -1 at positions that the step could not open or that stay undecided. At temperature 0 the draft is the likeliest
    token: Learn2PD's label of a token that may be decided already (arXiv 2509.25188).
    """
    assert trajectory.draft_BSL is not None and trajectory.draft_window_BSL is not None
    same_NL = trajectory.draft_BSL[row_N, step_N] == trajectory.tokens_BL[row_N]
    open_NL = trajectory.draft_window_BSL[row_N, step_N] & (trajectory.source_BL[row_N] != PAD)
    return torch.where(open_NL, same_NL, UNLABELLED).to(torch.int8)
