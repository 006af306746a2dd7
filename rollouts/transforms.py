"""Transforms: what is done to logits before anything reads them.

A transform sees a chunk of logits (`[k, V]`, its own to overwrite), the state, and the row and place of each position,
and returns logits. One whose traits say `whole` gets all positions of a step at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor

from ..recipes.registry import SLOTS
from .forward import Rows
from .state import State
from .traits import traits_of

transform = SLOTS["transform"]


def apply(part: Callable[..., Tensor], rows: Rows, state: State, flat_K: Tensor) -> Rows:
    """Return rows whose logits pass through `part`."""
    length = state.canvas_AL.shape[1]
    row_K, place_K = flat_K // length, flat_K % length
    if not traits_of(part).whole:

        def chunk(start: int, stop: int) -> Tensor:
            return part(rows.logits(start, stop), state, row_K[start:stop], place_K[start:stop])

        return Rows(chunk, rows.vocabulary)

    @cache
    def everything() -> Tensor:
        return part(rows.logits(0, len(flat_K)), state, row_K, place_K)

    return Rows(lambda start, stop: everything()[start:stop].clone(), rows.vocabulary)
