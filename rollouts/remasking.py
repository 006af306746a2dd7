"""Remasking: which decided tokens a step takes back, and editing: which it replaces by the likeliest token.

A remasking sees the state, the positions chosen at this step and the scores, and returns the positions that are masked
again. What is chosen and taken back in one step was on no canvas: it is neither action nor lifetime. A remasking is a
rule, not a draw of the policy: what it takes back stays an action, and what replaces it is one. The engine protects
given tokens and takes nothing back at the last step allowed, so no remasking can hang the loop.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .measures import Statistics
from .ranking import rank
from .schedules import Quota
from .state import State
from .traits import traits

remasking = SLOTS["remasking"]
editing = SLOTS["editing"]
By = Literal["likeliest", "token"]


@remasking.register
@traits(drops=True)
def running_confidence(state: State, chosen_AL: Tensor, score_AL: Tensor, *, reopen: bool = False) -> Tensor:
    """RCR: of all tokens predicted so far, those of the lowest running confidence stay open (He et al. 2025, MDPO).

    For selection `all`: a step predicts every open position of the window, and as many tokens stay decided as the
    schedule has asked for up to this step. The running confidence of a position is the highest score it ever had,
    whatever its token (the released code overwrites it); so the choice depends on distributions alone and a rollout
    with score `confidence` keeps its exact log-probability. `reopen` lets tokens of finished blocks be taken back, as
    the released code does.
    """
    quota = _quota(state)
    best_AL = state.memory.get("running_confidence", torch.full_like(score_AL, -torch.inf))
    best_AL = torch.where(quota.window_BL, torch.maximum(best_AL, score_AL), best_AL)
    state.memory["running_confidence"] = best_AL
    stood_AL = state.stood_AL if reopen else state.stood_AL & _region(state)
    # Net progress is the schedule's count, however many come and go.
    return _all_but(chosen_AL | stood_AL, best_AL, stood_AL.sum(dim=1) + quota.count_B)


@remasking.register
@traits(canvas=True, local=True, needs=("current", "drawn"))
def backtrack(
    state: State, chosen_AL: Tensor, score_AL: Tensor, *, share: float = 0.125, by: By = "likeliest"
) -> Tensor:
    """Saber: after k commits, the max(n // 2, ceil(share k)) < k tokens whose probability rose least are taken back.

    n is the schedule's count. The rise is p now minus p at the step before, of the position's likeliest token, or with
    `by` token of the token that stands there (Dong et al. 2025). Both follow from the canvases seen, so the rule is no
    action; the released code compares drawn candidates, whose choice is random above temperature 0. A block that is
    full keeps its tokens.
    """
    if not 0 < share <= 1:
        raise RecipeError(f"remasking.share: {share} must lie in (0, 1], it is a share of a step's commits.")
    quota, region_AL, statistics = _quota(state), _region(state), _statistics(state)
    now_AL = _probability(state, by)
    if by == "token":
        assert statistics.drawn is not None
        now_AL = torch.where(chosen_AL, torch.sigmoid(statistics.drawn), now_AL)
    before_AL = state.memory.get("backtrack", torch.zeros_like(now_AL))
    seen_AL = statistics.confidence > -torch.inf
    state.memory["backtrack"] = torch.where(seen_AL, now_AL, before_AL)
    count_A = chosen_AL.sum(dim=1)
    many_A = torch.maximum(quota.count_B // 2, torch.ceil(count_A * share).long()).minimum(count_A - 1)
    open_A = (state.masked_AL & region_AL & ~chosen_AL).any(dim=1)
    return _lowest(state.stood_AL & region_AL, now_AL - before_AL, torch.where(open_A, many_A, 0))


@remasking.register
@traits(canvas=True, local=True, needs=("current",))
def doubt(state: State, chosen_AL: Tensor, score_AL: Tensor, *, level: float = 0.4, by: By = "likeliest") -> Tensor:
    """Hierarchical decoding's remasking: tokens whose probability is now below `level` are taken back, lowest first.

    Fewer are taken back than the step decided, so that the number of masks falls (Qi et al. 2026, who decide more
    instead). The probability is that of the position's likeliest token, or with `by` token of the token that stands.
    """
    _check_level(level)
    now_AL = _probability(state, by)
    doubtful_AL = state.stood_AL & _region(state) & (now_AL < level)
    return _lowest(doubtful_AL, now_AL, chosen_AL.sum(dim=1) - 1)


@remasking.register
@traits(canvas=True, local=True, shadow=True, needs=("current",))
def verify(state: State, chosen_AL: Tensor, score_AL: Tensor, *, level: float = 0.9) -> Tensor:
    """WINO: tokens to which the context without them gives less than `level` are taken back, lowest first.

    The probability of each comes from a shadow column that does not see it (`rollouts.shadow`). Fewer are taken back
    than the step decided, so that the number of masks falls (Hong et al. 2025, section 3.2).
    """
    _check_level(level)
    now_AL = _probability(state, "token")
    return _lowest(state.stood_AL & _region(state) & (now_AL < level), now_AL, chosen_AL.sum(dim=1) - 1)


@remasking.register
@traits(canvas=True, needs=("current",))
def sceptical(state: State, chosen_AL: Tensor, score_AL: Tensor, *, level: float = 0.5, by: By = "token") -> Tensor:
    """Draft tokens whose probability is below `level` are taken back, at every step and however many there are.

    For canvas `draft` (context-aware initialisation, arXiv 2512.19004). Tokens of the policy's own stay, and a draft
    token goes only once, so the loop ends.
    """
    _check_level(level)
    return state.draft_AL & state.exists_AL & (_probability(state, by) < level)


@remasking.register
@traits(drops=True)
def remdm(
    state: State, chosen_AL: Tensor, score_AL: Tensor, *, rule: Literal["cap", "rescale"] = "cap", eta: float = 0.02
) -> Tensor:
    """ReMDM: each decided token is taken back with probability sigma, and as many more are decided instead.

    For selection `all`. alpha is the decided share of the region, before the step (t) and after it (s);
    sigma_max = min(1, (1 - alpha_s) / alpha_t), and sigma is min(eta, sigma_max) (`cap`) or eta sigma_max (`rescale`;
    Wang et al. 2025, section 4.1). sigma knows nothing of the policy, so the draw is no action of it. Score `random`
    decides uniformly, as the paper does; the number decided is the schedule's, where the paper's is binomial around it.
    """
    if not 0 <= eta <= 1:
        raise RecipeError(f"remasking.eta: {eta} must lie in [0, 1], it is a probability or a factor of one.")
    most_A1 = _largest_sigma(state)
    sigma_A1 = most_A1.clamp(max=eta) if rule == "cap" else eta * most_A1
    return _renoised(state, chosen_AL, score_AL, sigma_A1)


@remasking.register
@traits(drops=True, needs=("drawn",), status="behaviour only", learns="its chance depends on the policy, unscored")
def remdm_confidence(state: State, chosen_AL: Tensor, score_AL: Tensor) -> Tensor:
    """ReMDM-conf: sigma_max of `remdm`, shared out by softmax(-p) over the decided tokens.

    p is the probability with which each was drawn (Wang et al. 2025, section 4.1), so one token a step is taken back at
    most on average, the unlikely ones first.
    """
    drawn = _statistics(state).drawn
    assert drawn is not None
    past_AL = state.memory.get("remdm_confidence", torch.zeros_like(drawn))
    stood_AL = state.stood_AL & _region(state)
    weight_AL = torch.where(stood_AL, -past_AL, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    state.memory["remdm_confidence"] = torch.where(chosen_AL, torch.sigmoid(drawn), past_AL)
    return _renoised(state, chosen_AL, score_AL, weight_AL * _largest_sigma(state))


@remasking.register
@traits(canvas=True, local=True, needs=("current",))
def planned(state: State, chosen_AL: Tensor, score_AL: Tensor) -> Tensor:
    """What a planner with distribution `remasking` takes back: the half of its draw that is not opened.

    One draw decides both, and takes back fewer tokens than it opens (`policies.planner_remasking`).
    """
    step = state.planned
    if step is None or step.draw is None or step.standing_AL is None:
        raise RecipeError("sampler.remasking: 'planned' is half of what a planner with distribution remasking decides.")
    return step.draw.chosen_BL & step.standing_AL


def _largest_sigma(state: State) -> Tensor:
    """Return sigma_max `[A, 1]` of the region, from the shares decided before the step and after it."""
    region_AL, quota = _region(state), _quota(state)
    decided_A = (state.stood_AL & region_AL).sum(dim=1)
    left_A = (state.masked_AL & region_AL).sum(dim=1) - quota.count_B
    return (left_A.clamp(min=0) / decided_A.clamp(min=1)).clamp(max=1.0)[:, None]


def _renoised(state: State, chosen_AL: Tensor, score_AL: Tensor, sigma_AL: Tensor) -> Tensor:
    """Return what is taken back with probability sigma, and the draws beyond the schedule's count and its number."""
    uniform_AL, count_A = state.uniform("remasking"), _quota(state).count_B
    taken_AL = state.stood_AL & _region(state) & (uniform_AL < sigma_AL)
    # No more than can be decided instead: the step's net progress is the schedule's count.
    taken_AL = _lowest(taken_AL, uniform_AL, chosen_AL.sum(dim=1) - count_A)
    return taken_AL | _all_but(chosen_AL, score_AL, count_A + taken_AL.sum(dim=1))


@editing.register
@traits(canvas=True, local=True)
def token_to_token(state: State, *, level: float = 0.9, post_steps: int = 16) -> Tensor:
    """LLaDA2.1: a decided token is replaced by a likelier one whose probability is above `level`.

    In the schedule's region alone. Once that is full, steps that only edit follow, until one of them edits nothing or
    there were `post_steps` (Bie et al. 2026, arXiv 2602.08676). Replacements follow from the distributions: they are no
    actions, and what they replace is.
    """
    _check_level(level, "editing")
    if post_steps < 0:
        raise RecipeError(f"editing.post_steps: {post_steps} must be at least 0.")
    statistics, quota, region_AL = _statistics(state), _quota(state), _region(state)
    edited_AL = state.stood_AL & region_AL & (statistics.best != state.canvas_AL)
    edited_AL &= statistics.confidence.exp() > level
    fills_A = quota.window_BL.any(dim=1)
    posts_A = state.memory.get("token_to_token", torch.zeros_like(state.step_A))
    state.memory["token_to_token"] = torch.where(fills_A, 0, posts_A + 1)
    # A step that filled the region is followed by one that edits; a step that only edits, if it edited.
    state.memory["lingering"] = region_AL & (fills_A | edited_AL.any(dim=1))[:, None]
    return edited_AL


def _lingers(memory: dict[str, Tensor], masked_AL: Tensor, *, post_steps: int = 16, **knobs: float) -> Tensor:
    region_AL = memory["lingering"]
    full_A = region_AL.any(dim=1) & ~(region_AL & masked_AL).any(dim=1)
    return full_A & (memory["token_to_token"] < post_steps)


token_to_token.lingers = _lingers  # type: ignore[attr-defined]


def _quota(state: State) -> Quota:
    assert state.quota is not None
    return state.quota


def _statistics(state: State) -> Statistics:
    assert state.statistics is not None
    return state.statistics


def _region(state: State) -> Tensor:
    """Return the positions that the schedule works on."""
    region_AL = _quota(state).region_BL
    return state.exists_AL if region_AL is None else region_AL & state.exists_AL


def _probability(state: State, by: By) -> Tensor:
    """Return p of each position's likeliest token, or of the token that stands there."""
    statistics = _statistics(state)
    if by == "likeliest":
        return statistics.confidence.exp()
    assert statistics.current is not None
    return statistics.current.exp()


def _lowest(pool_AL: Tensor, value_AL: Tensor, count_A: Tensor) -> Tensor:
    """Return the `count_A` positions of the pool with the lowest values."""
    return pool_AL & (rank(torch.where(pool_AL, -value_AL, -torch.inf)) < count_A[:, None])


def _all_but(pool_AL: Tensor, value_AL: Tensor, count_A: Tensor) -> Tensor:
    """Return the pool without the `count_A` positions of highest value."""
    finite_AL = value_AL.clamp(min=torch.finfo(value_AL.dtype).min)
    return pool_AL & (rank(torch.where(pool_AL, finite_AL, -torch.inf)) >= count_A[:, None])


def _check_level(level: float, slot: str = "remasking") -> None:
    if not 0 < level <= 1:
        raise RecipeError(f"{slot}.level: {level} must lie in (0, 1], it is compared with a probability.")
