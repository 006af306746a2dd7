"""Canvases: what stands on a canvas before the first step.

A canvas part sees a task row and a `Frame` and returns a `Start`. Given tokens are context, never actions of the policy
(`source` GIVEN); those of a draft may be taken back by a remasking or replaced by an editing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError

canvas = SLOTS["canvas"]
FIELD = re.compile(r"<mask:(\d+)>")


class Frame(NamedTuple):
    """A canvas of `length` positions to be filled, and with what.

    `encode` gives a text's ids, `ending` the id that ends a completion and the one that pads behind it (empty: the
    family has none). `uniform_L` are uniforms keyed by seed, batch and rollout. `offsets` gives the first and the last
    character (exclusive) of each of a text's tokens.
    """

    length: int
    mask_token_id: int
    ending: tuple[int, ...]
    encode: Callable[[str], list[int]]
    uniform_L: Tensor
    offsets: Callable[[str], list[tuple[int, int]]] | None = None

    def masks(self, count: int) -> list[int]:
        """Return open positions."""
        return [self.mask_token_id] * count

    def end(self, count: int) -> list[int]:
        """Return positions that end the completion."""
        if count and not self.ending:
            raise RecipeError("rollout.start: the family has no EOS to end the canvas with; fill it, or leave it open.")
        return [*self.ending[:1], *self.ending[-1:] * (count - 1)] if count else []


class Start(NamedTuple):
    """Ids of the canvas, the mask where it is open, and which of the others may be taken back (None: none).

    With `hints` the others come from a worked solution, and the trajectory marks them as such.
    """

    tokens: list[int]
    draft: list[bool] | None = None
    hints: bool = False


@canvas.register
def blank(row: dict[str, Any], frame: Frame) -> Start:
    """Masks alone."""
    return Start(frame.masks(frame.length))


@canvas.register
def template(
    row: dict[str, Any],
    frame: Frame,
    *,
    text: str | None = None,
    column: str | None = None,
    rest: Literal["end", "open"] = "end",
) -> Start:
    """A text with fields to fill, `<mask:16>` being 16 open positions (schema scaffolding, S3, arXiv 2507.04504).

    The text is a knob or, with `column`, that column of the task row. What lies behind it is ended, or left `open`.
    """
    if (text is None) == (column is None):
        raise RecipeError("rollout.start: template needs exactly one of text and column.")
    pieces = FIELD.split(_column(row, column) if column is not None else str(text))
    if len(pieces) == 1:
        raise RecipeError("rollout.start: the template has no field; write <mask:16> for 16 open positions.")
    tokens: list[int] = []
    for index, piece in enumerate(pieces):
        # The fields' sizes lie between the texts.
        tokens += frame.encode(piece) if index % 2 == 0 else frame.masks(int(piece))
    left = _room(len(tokens), frame, "template")
    return Start(tokens + (frame.end(left) if rest == "end" else frame.masks(left)))


@canvas.register
def infill(
    row: dict[str, Any], frame: Frame, *, prefix: str | None = "prefix", suffix: str | None = "suffix", gap: int = 0
) -> Start:
    """The columns `prefix` and `suffix` of the task row with `gap` open positions between them; null leaves one out.

    What lies behind is ended. With `gap` 0 the suffix ends the canvas and all between is open.
    """
    if gap < 0 or (prefix is None and suffix is None):
        raise RecipeError(f"rollout.start: infill needs a prefix or a suffix and a gap of at least 0, not {gap}.")
    before = [] if prefix is None else frame.encode(_column(row, prefix))
    after = [] if suffix is None else frame.encode(_column(row, suffix))
    left = _room(len(before) + gap + len(after), frame, "infill")
    if gap == 0:
        return Start(before + frame.masks(left) + after)
    return Start(before + frame.masks(gap) + after + frame.end(left))


@canvas.register
def draft(row: dict[str, Any], frame: Frame, *, column: str = "draft", share: float = 0.5) -> Start:
    """Each token of the column `draft` at its place with probability `share`, for a remasking to take back.

    Context-aware initialisation (arXiv 2512.19004), whose drafts an autoregressive model writes. What exceeds the
    canvas is cut. See remasking `sceptical`; without one the tokens stay.
    """
    if not 0 <= share <= 1:
        raise RecipeError(f"rollout.start: draft.share {share} must lie in [0, 1], it is a probability.")
    tokens = frame.encode(_column(row, column))[: frame.length]
    kept = (frame.uniform_L[: len(tokens)] < share).tolist()
    shown = [token if keep else frame.mask_token_id for token, keep in zip(tokens, kept, strict=True)]
    shown += frame.masks(frame.length - len(shown))
    return Start(shown, [token != frame.mask_token_id for token in shown])


def _column(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise RecipeError(f"rollout.start: the task row has no column '{name}' (it has {', '.join(map(str, row))}).")
    return str(row[name])


def _room(used: int, frame: Frame, name: str) -> int:
    """Return how many positions are left; RecipeError where there are too few."""
    if used > frame.length:
        raise RecipeError(
            f"rollout.start: {name} needs {used} positions, rollout.canvas has {frame.length}; raise it or give less."
        )
    return frame.length - used
