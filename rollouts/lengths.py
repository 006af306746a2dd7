"""Lengths: how many positions a canvas has, changed while it is denoised.

A length part reads the state after a step's choice is known and returns a `Resize`. The engine keeps lengths between
what is decided and the allocated canvas, records every change, and replays it exactly. With an attribute `waits`
(state, knobs -> bool a row) a part has rows commit nothing at a step, because it wants to see a longer canvas first.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .measures import Statistics
from .state import Record, State
from .traits import traits

length = SLOTS["length"]
TABLES = (
    *("tokens_BL", "source_BL", "draft_BL", "born_BL", "rank_BL"),
    *("logprob_BL", "committed_BL", "appeared_BL"),
)


class Resize(NamedTuple):
    """`grow_A`: masks added (or, negative, taken) at the end of each row's canvas; `insert_A` masks behind `after_A`.

    An `insert_A` of 0 inserts nothing, whatever `after_A` says; an `after_A` of -1 inserts at the very front.
    """

    grow_A: Tensor
    insert_A: Tensor | None = None
    after_A: Tensor | None = None


@length.register
@traits(everywhere=True, needs=("eos",))
def eos_density(
    state: State,
    *,
    start: int = 64,
    low: float = 0.4,
    high: float = 0.6,
    by: int = 8,
    steps: int = 64,
    density: Literal["masked", "tail"] = "masked",
    check: int = 32,
) -> Resize:
    """rho-EOS: the canvas grows while few of its masks predict EOS, and shrinks while many do (arXiv 2601.22527).

    rho is the share of open positions whose likeliest token is EOS (`masked`, as the paper writes), or the sum of
    p(EOS) over the last `check` positions that predict EOS, divided by `check` (`tail`, as the first released code
    computes). With gap = low - rho or rho - high, by x min(2^(ceil(gap / 0.1) - 1), 8) masks are put before the first
    EOS, or at the end where there is none, or taken from the end. A row that reached the whole canvas stays, and after
    `steps` steps all do.
    """
    _check_start(start, by)
    if not 0 <= low <= high <= 1:
        raise RecipeError(f"length: low {low} and high {high} must be shares in ascending order, 0 to 1.")
    statistics, eos_AL = _statistics(state), _predicts_eos(state)
    rho_A = eos_tail(state, check) if density == "tail" else _share(eos_AL & state.masked_AL, state.masked_AL)
    gap_A = torch.maximum(low - rho_A, rho_A - high)
    # A hair less: 0.4 - 0.3 is a little more than 0.1, and would be a second segment.
    factor_A = (2.0 ** ((gap_A / 0.1 - 1e-6).ceil() - 1).clamp(min=0, max=3)).long()
    full_A = state.exists_AL.all(dim=1)
    done_A = state.memory.get("eos_density", torch.zeros_like(full_A)) | full_A
    state.memory["eos_density"] = done_A
    change_A = torch.where((gap_A > 0) & ~done_A & (state.step_A < steps), by * factor_A, 0)
    assert state.chosen_AL is not None
    token_AL = torch.where(state.chosen_AL, statistics.token, state.canvas_AL)
    ends_AL = _is_eos(state, token_AL) & state.exists_AL
    first_A, inserts_A = ends_AL.to(torch.int8).argmax(dim=1), (rho_A < low) & ends_AL.any(dim=1)
    return Resize(
        grow_A=torch.where(rho_A < low, torch.where(inserts_A, 0, change_A), -change_A),
        insert_A=torch.where(inserts_A, change_A, 0),
        after_A=first_A - 1,
    )


@length.register
@traits(everywhere=True, needs=("eos",))
def insertion(
    state: State,
    *,
    start: int = 64,
    by: int = 8,
    enough: float = 0.5,
    margin: int = 16,
    full: float = 0.9,
    low: float = 0.1,
    check: int = 32,
) -> Resize:
    """DAEDAL: the canvas grows to a fitting length before anything is decided, then where the model is unsure.

    Stage 1: `by` masks are added at the end, and nothing is decided, until the sum of p(EOS) over the last `check`
    positions that predict EOS, divided by `check`, reaches `enough`; then `margin` more. Stage 2: while that number is
    below `full`, each step replaces the least confident open position of its window by `by` masks if its confidence is
    below `low` (Li et al. 2025, arXiv 2508.00819). Nothing is added beyond the canvas.
    """
    _check_start(start, by)
    statistics, quota = _statistics(state), state.quota
    assert quota is not None and state.chosen_AL is not None
    tail_A, known_A = eos_tail(state, check), state.memory.get("insertion")
    begun_A = torch.zeros_like(state.step_A, dtype=torch.bool) if known_A is None else known_A
    room_A = ~state.exists_AL.all(dim=1)
    short_A = ~begun_A & (tail_A < enough) & room_A
    grow_A = torch.where(short_A, by, torch.where(begun_A, 0, margin))
    state.memory["insertion"] = ~short_A
    left_AL = quota.window_BL & ~state.chosen_AL & (statistics.confidence.exp() < low)
    unsure_AL = torch.where(left_AL, statistics.confidence, torch.inf)
    inserts_A = begun_A & left_AL.any(dim=1) & (tail_A < full)
    return Resize(grow_A, torch.where(inserts_A, by - 1, 0), unsure_AL.argmin(dim=1))


def _not_begun(state: State, **knobs: float) -> Tensor:
    begun_A = state.memory.get("insertion")
    return torch.ones_like(state.step_A, dtype=torch.bool) if begun_A is None else ~begun_A


insertion.waits = _not_begun  # type: ignore[attr-defined]


def eos_tail(state: State, check: int) -> Tensor:
    """Return sum p(EOS) / check over the last `check` positions whose likeliest token is EOS, from the end."""
    eos_AL = _predicts_eos(state)
    behind_AL = eos_AL.flip(1).cumsum(dim=1).flip(1)
    eos = _statistics(state).eos
    if eos is None:
        return torch.zeros(len(eos_AL), device=eos_AL.device)
    return torch.where(eos_AL & (behind_AL <= check), eos.exp(), 0.0).sum(dim=1) / check


def _statistics(state: State) -> Statistics:
    assert state.statistics is not None
    return state.statistics


def _is_eos(state: State, token_AL: Tensor) -> Tensor:
    return torch.isin(token_AL, torch.tensor(state.eos_token_ids, device=token_AL.device))


def _predicts_eos(state: State) -> Tensor:
    """Return where the likeliest token is EOS, of all positions that exist."""
    seen_AL = _statistics(state).confidence > -torch.inf
    return _is_eos(state, _statistics(state).best) & seen_AL & state.exists_AL


def _share(part_AL: Tensor, whole_AL: Tensor) -> Tensor:
    return part_AL.sum(dim=1).double() / whole_AL.sum(dim=1).clamp(min=1)


def _check_start(start: int, by: int) -> None:
    for name, value in (("start", start), ("by", by)):
        if value < 1:
            raise RecipeError(f"length.{name}: {value} must be at least 1 position.")


def resize(record: Record, alive_A: Tensor, change: Resize, allowed_A: Tensor, state: State) -> dict[str, Tensor]:
    """Apply a change of length to the rows where it is `allowed_A`; returns the parts' memory, moved along.

    The end never moves over a decided token, nor beyond the allocated canvas. Inserted positions take the place of
    unused ones behind the end, which move no token that is seen.
    """
    tokens_AL, length_A = record.tokens_BL[alive_A], record.length_B[alive_A]
    room, place_L = tokens_AL.shape[1], torch.arange(tokens_AL.shape[1], device=tokens_AL.device)
    decided_AL = (tokens_AL != state.mask_token_id) & (place_L < length_A[:, None])
    least_A = torch.where(decided_AL, place_L + 1, 0).amax(dim=1).clamp(min=1)
    grow_A = torch.where(allowed_A, change.grow_A, 0)
    length_A = (length_A + grow_A).clamp(max=room).maximum(least_A)
    longest_A, memory = record.longest_B[alive_A].maximum(length_A), state.memory
    if change.insert_A is not None and change.after_A is not None:
        # Positions that any earlier canvas had must stay where they were: only never used ones are moved.
        insert_A = torch.where(allowed_A, change.insert_A, 0).minimum(room - longest_A)
        source_AL, new_AL = _moved(room, insert_A, change.after_A)
        for name in TABLES:
            table = getattr(record, name)
            table[alive_A] = table[alive_A].gather(1, source_AL)
        # A position exists from the step after the one that inserted it.
        appeared_AL = record.appeared_BL[alive_A]
        born_AL = (state.step_A[:, None] + 1).to(appeared_AL.dtype)
        record.appeared_BL[alive_A] = torch.where(new_AL, born_AL, appeared_AL)
        memory = {name: _gathered(value, source_AL) for name, value in memory.items()}
        length_A, longest_A = length_A + insert_A, longest_A + insert_A
    record.length_B[alive_A], record.longest_B[alive_A] = length_A, longest_A
    return memory


def _moved(room: int, insert_A: Tensor, after_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each position's content comes from, and which positions are new: those take the last ones."""
    place_L, after_A1, insert_A1 = torch.arange(room, device=insert_A.device), after_A[:, None], insert_A[:, None]
    new_AL = (place_L > after_A1) & (place_L <= after_A1 + insert_A1)
    source_AL = torch.where(place_L <= after_A1, place_L, place_L - insert_A1)
    source_AL = torch.where(new_AL, room - insert_A1 + (place_L - after_A1 - 1), source_AL)
    return source_AL.clamp(0, room - 1), new_AL


def _gathered(value: Tensor, source_AL: Tensor) -> Tensor:
    """Return a part's table with its positions moved; what is no table of positions stays."""
    if value.shape[:2] != source_AL.shape:
        return value
    index = source_AL.view(*source_AL.shape, *[1] * (value.dim() - 2)).expand_as(value)
    return value.gather(1, index)
