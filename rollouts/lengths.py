"""Lengths: how many positions a canvas has, changed while it is denoised.

A length part reads the state after its scores are known and returns a `Resize`. The engine keeps lengths between what
is decided and the allocated canvas, records every change, and replays it exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from .state import Record, State

length = SLOTS["length"]


class Resize(NamedTuple):
    """`grow_A`: masks added (or, negative, taken) at the end of each row's canvas; `insert_A` masks behind `after_A`.

    An `insert_A` of 0 inserts nothing, whatever `after_A` says.
    """

    grow_A: Tensor
    insert_A: Tensor | None = None
    after_A: Tensor | None = None


def resize(record: Record, alive_A: Tensor, change: Resize, allowed_A: Tensor, state: State) -> dict[str, Tensor]:
    """Apply a change of length to the rows where it is `allowed_A`; returns the parts' memory, moved along.

    The end never moves over a decided token, nor beyond the allocated canvas. Inserted positions take the place of
    those behind the end, which move no token that is seen.
    """
    tokens_AL, length_A = record.tokens_BL[alive_A], record.length_B[alive_A]
    room, place_L = tokens_AL.shape[1], torch.arange(tokens_AL.shape[1], device=tokens_AL.device)
    decided_AL = (tokens_AL != state.mask_token_id) & (place_L < length_A[:, None])
    least_A = torch.where(decided_AL, place_L + 1, 0).amax(dim=1).clamp(min=1)
    grow_A = torch.where(allowed_A, change.grow_A, 0)
    length_A = (length_A + grow_A).clamp(max=room).maximum(least_A)
    memory = state.memory
    if change.insert_A is not None and change.after_A is not None:
        insert_A = torch.where(allowed_A, change.insert_A, 0).minimum(room - length_A)
        after_A = change.after_A[:, None]
        # Where each position's content comes from; the inserted ones take unused positions from the end.
        moved_AL = place_L - insert_A[:, None]
        new_AL = (place_L > after_A) & (place_L <= after_A + insert_A[:, None])
        source_AL = torch.where(place_L <= after_A, place_L.expand_as(tokens_AL), moved_AL)
        source_AL = torch.where(new_AL, room - insert_A[:, None] + (place_L - after_A - 1), source_AL).clamp(
            0, room - 1
        )
        for name in ("tokens_BL", "source_BL", "born_BL", "rank_BL", "logprob_BL", "committed_BL", "appeared_BL"):
            table = getattr(record, name)
            table[alive_A] = table[alive_A].gather(1, source_AL)
        # A position exists from the step after the one that inserted it.
        appeared_AL = record.appeared_BL[alive_A]
        record.appeared_BL[alive_A] = torch.where(
            new_AL, (state.step_A[:, None] + 1).to(appeared_AL.dtype), appeared_AL
        )
        memory = {
            name: value.gather(1, source_AL) if value.shape == source_AL.shape else value
            for name, value in memory.items()
        }
        length_A = length_A + insert_A
    record.length_B[alive_A] = length_A
    return memory
