"""Remasking: which decided tokens a step takes back, and editing: which it replaces by the likeliest token.

A remasking sees the state, the positions chosen at this step and the scores, and returns the positions that are masked
again. What is chosen and taken back in one step was on no canvas: it is neither action nor lifetime. A remasking is a
rule, not a draw of the policy: what it takes back stays an action, and what replaces it is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from .selection import rank
from .state import State

remasking = SLOTS["remasking"]
editing = SLOTS["editing"]


@remasking.register
def running_confidence(state: State, chosen_AL: Tensor, score_AL: Tensor, *, reopen: bool = False) -> Tensor:
    """RCR: of all tokens predicted so far, those of the lowest running confidence stay open (He et al. 2025, MDPO).

    For selection `all`: a step predicts every open position of the window, and as many tokens stay decided as the
    schedule has asked for up to this step. The running confidence of a position is the highest score it ever had,
    whatever its token (the released code overwrites it); so the choice depends on distributions alone and a rollout
    with score `confidence` keeps its exact log-probability. `reopen` lets tokens of finished blocks be taken back, as
    the released code does.
    """
    assert state.quota is not None
    window_AL = state.quota.window_BL
    best_AL = state.memory.get("running_confidence", torch.full_like(score_AL, -torch.inf))
    best_AL = torch.where(window_AL, torch.maximum(best_AL, score_AL), best_AL)
    state.memory["running_confidence"] = best_AL
    decided_AL = ~state.masked_AL & ~state.given_AL & state.exists_AL
    region_AL = state.quota.region_BL
    pool_AL = chosen_AL | (decided_AL if reopen or region_AL is None else decided_AL & region_AL)
    # Net progress is the schedule's count, however many come and go.
    keep_A = (pool_AL & decided_AL).sum(dim=1) + state.quota.count_B
    place_AL = rank(torch.where(pool_AL, best_AL.clamp(min=torch.finfo(best_AL.dtype).min), -torch.inf))
    return pool_AL & (place_AL >= keep_A[:, None])
