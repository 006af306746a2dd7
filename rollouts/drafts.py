"""Drafts: the complete prediction that each step makes of a canvas, of which it commits a few tokens.

A step draws a token at every masked position and keeps those that the selection chose; its draft is the canvas with all
of them in place. Rewards of drafts tell how a rollout came to its answer (MDPO), and the log-probability of all of a
step's draws is that of the augmented trajectory. A draft costs no forward: the LM head runs at every masked position
instead of the schedule's window. It is kept as 9 bytes a position and step, whatever the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .state import Record, State

if TYPE_CHECKING:
    from .trajectory import Trajectory

TABLES = ("draft_BSL", "draft_logprob_BSL", "draft_window_BSL")  # fields of Trajectory


def note_draft(record: Record, state: State, alive_A: Tensor, live_A: Tensor) -> None:
    """Add what a step drew at the masked positions of the live rows to the record, before anything is committed."""
    table, window_AL = state.statistics, state.window_AL
    assert table is not None and window_AL is not None
    drawn_AL = state.masked_AL & live_A[:, None]
    token_AL = torch.where(drawn_AL, table.token, state.mask_token_id).to(torch.int32)
    logprob_AL = torch.where(drawn_AL, table.logprob, 0.0)
    empty_BL = torch.full_like(record.tokens_BL, state.mask_token_id, dtype=torch.int32)
    record.drafts.append(
        (
            empty_BL.index_copy(0, alive_A, token_AL),
            torch.zeros_like(record.logprob_BL).index_copy(0, alive_A, logprob_AL.to(record.logprob_BL.dtype)),
            torch.zeros_like(empty_BL, dtype=torch.bool).index_copy(0, alive_A, window_AL & drawn_AL),
        )
    )


def drafts_by_step(record: Record) -> dict[str, Tensor]:
    """Return the tables of all steps as the fields of a trajectory; empty where no draft was recorded."""
    if not record.drafts:
        return {}
    return {
        name: torch.stack(steps, dim=1) for name, steps in zip(TABLES, zip(*record.drafts, strict=True), strict=True)
    }


def draft_canvases(trajectory: Trajectory, row_N: Tensor, step_N: Tensor) -> Tensor:
    """Return `canvas_NL`, the drafts of steps `step_N` of rollouts `row_N`: what the step saw, no position open."""
    assert trajectory.draft_BSL is not None, "the rollout recorded no drafts"
    token_NL = trajectory.draft_BSL[row_N, step_N].long()
    seen_NL = trajectory.canvas_before(row_N, step_N)
    return torch.where(seen_NL == trajectory.mask_token_id, token_NL, seen_NL)
