"""Blocks whose lengths a planner draws, each at the block's first step, from the call that the step makes anyway.

A block begins at the first mask of a row. Its first step asks for the whole rest of the canvas; once that is measured,
the planner draws where the block ends and the window shrinks to it. Inside a block any score and selection decide.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..policies.planner_blocks import block_ends
from ..recipes.registry import SLOTS
from .features import NEEDS, observe, past_blocks
from .planned import Acting, Planned, acting_of, check_kind, check_knobs, drawn
from .schedules import Quota, check_count
from .state import State
from .traits import traits

START, END = "block_start", "block_end"  # in the state's memory: the present block, [start, end)


@SLOTS["schedule"].register
@traits(needs=NEEDS, plans=True, history=True)
def planned(
    masked_BL: Tensor,
    step_B: Tensor,
    open_B: Tensor,
    *,
    state: State | None = None,
    acting: Acting | None = None,
    path: str | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    decide: Literal["sample", "mode"] = "sample",
    per_step: int = 1,
) -> Quota:
    """Blocks from left to right, of lengths that a learned policy draws one by one; `per_step` tokens a step at least.

    `path` is a trained planner's folder or its run's (planner.distribution blocks); a run that trains one needs none.
    `alpha` is the trade-off that the policy is told, `temperature` divides its logits, `decide: mode` takes its
    likeliest length. Inside a block any score and selection decide. Only CtrlDiff's state is published (arXiv
    2505.14455, eq. 11); lengths, reward and training are ours.
    """
    check_count("per_step", per_step)
    check_knobs("schedule", alpha, temperature)
    first_B1, begins_B1, start_B1, end_B1 = _block(masked_BL, {} if state is None else state.memory)
    place_L = torch.arange(masked_BL.shape[1], device=masked_BL.device)
    inside_BL = begins_B1 | (place_L < end_B1)
    window_BL = masked_BL & inside_BL
    region_BL = (place_L >= torch.where(begins_B1, first_B1, start_B1)) & inside_BL
    return Quota(window_BL, window_BL.sum(dim=1).clamp(max=per_step), region_BL)


def _block(masked_BL: Tensor, memory: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `[B, 1]` each row's first mask, whether a block begins there, and the present block's start and end."""
    place_L = torch.arange(masked_BL.shape[1], device=masked_BL.device)
    first_B1 = torch.where(masked_BL, place_L, len(place_L)).amin(dim=1, keepdim=True)
    start_B1, end_B1 = (memory.get(name, torch.zeros_like(first_B1)) for name in (START, END))
    # A remasking may have opened tokens of an earlier block again: then the present one reaches back to them.
    return first_B1, first_B1 >= end_B1, torch.minimum(first_B1, start_B1), end_B1


def _narrows(
    state: State,
    quota: Quota,
    acts_A: Tensor,
    *,
    acting: Acting | None = None,
    path: str | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    decide: str = "sample",
    per_step: int = 1,
) -> Quota:
    """Draw the ends of the blocks that begin in rows `acts_A`, and return the quota with windows that keep to them."""
    acting = acting_of("schedule", state, acting, path, alpha)
    planner, spec, memory = acting.planner, acting.planner.spec, state.memory
    check_kind("schedule", spec)
    first_A1, begins_A1, start_A1, end_A1 = _block(state.masked_AL, memory)
    begins_A1 = begins_A1 & (acts_A & quota.window_BL.any(dim=1))[:, None]
    past_AMD = past_blocks(state, begins_A1, spec.past, spec.hidden) if spec.past else None
    # Rows inside a block are not asked, and the rest of their canvas is not measured.
    feature_ALF = observe(state, spec.features, acting.alpha(state)).masked_fill(~begins_A1[..., None], 0.0)
    place_L = torch.arange(state.masked_AL.shape[1], device=first_A1.device)
    candidate_AL = block_ends(first_A1, spec.lengths, len(place_L)) & begins_A1
    past = None if past_AMD is None else past_AMD.float()
    distribution = planner.distribution(feature_ALF.float(), candidate_AL, past_BMD=past, temperature=temperature)
    draw = drawn(distribution, state, decide)
    drawn_A1 = (draw.chosen_BL * (place_L + 1)).sum(dim=1, keepdim=True)
    start_A1, end_A1 = torch.where(begins_A1, first_A1, start_A1), torch.where(begins_A1, drawn_A1, end_A1)
    memory[START], memory[END] = start_A1, end_A1
    # A single end is no choice, and nothing is learned from it.
    open_AL = candidate_AL & (candidate_AL.sum(dim=1, keepdim=True) > 1)
    state.planned = Planned(
        feature_ALF, open_AL, distribution, acting, draw=draw, end_A=drawn_A1.squeeze(1).short(), past_AMD=past_AMD
    )
    here_AL = (place_L >= start_A1) & (place_L < end_A1)
    window_AL = quota.window_BL & (here_AL | ~begins_A1)
    count_A = torch.where(begins_A1.squeeze(1), window_AL.sum(dim=1).clamp(max=per_step), quota.count_B)
    assert quota.region_BL is not None
    return Quota(window_AL, count_A, torch.where(begins_A1, here_AL, quota.region_BL))


planned.narrows = _narrows  # type: ignore[attr-defined]
