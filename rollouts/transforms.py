"""Transforms: what is done to logits before anything reads them.

A transform sees a chunk of logits (`[k, V]`, its own to overwrite), the state, and the row and place of each position,
and returns logits. It may be called twice in a step and for a position that nobody asked for (the padding of static
shapes), so what it remembers must follow from the step alone. One whose traits say `whole` gets the `Rows` of a step in
place of the chunk, from which it may compute all logits, again where it needs them again, and returns others. An
attribute `bans` (knobs -> ids) names tokens that it forbids, which are then recorded as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .forward import Rows
from .measures import chunks
from .state import State
from .traits import traits, traits_of

transform = SLOTS["transform"]


def apply(part: Callable[..., Any], rows: Rows, state: State, flat_K: Tensor) -> Rows:
    """Return rows whose logits pass through `part`."""
    length = state.canvas_AL.shape[1]
    row_K, place_K = flat_K // length, flat_K % length
    if traits_of(part).whole:
        return part(rows, state, row_K, place_K)

    def chunk(start: int, stop: int) -> Tensor:
        return part(rows.logits(start, stop), state, row_K[start:stop], place_K[start:stop])

    return Rows(chunk, rows.vocabulary)


@transform.register
def suppress(logits_KV: Tensor, state: State, row_K: Tensor, place_K: Tensor, *, ids: list[int]) -> Tensor:
    """The tokens `ids` are never drawn; training leaves them out too, so log-probabilities stay exact.

    For EOS there is `eos.suppress`.
    """
    if any(not 0 <= token < logits_KV.shape[1] for token in ids):
        raise RecipeError(f"transforms: suppress.ids {ids} must lie between 0 and {logits_KV.shape[1] - 1}.")
    return logits_KV.index_fill_(1, torch.tensor(ids, dtype=torch.long, device=logits_KV.device), -torch.inf)


def _suppressed(ids: list[int]) -> tuple[int, ...]:
    return tuple(ids)


suppress.bans = _suppressed  # type: ignore[attr-defined]


class Credit(NamedTuple):
    """What `credit` remembers of A x L positions: tokens with their credit, before and after the step `seen`."""

    token_ALS: Tensor
    value_ALS: Tensor
    next_token_ALS: Tensor
    next_value_ALS: Tensor
    seen_AL: Tensor


@transform.register
@traits(status="behaviour only", learns="the draw depends on earlier predictions, the trainer recomputes one")
def credit(
    logits_KV: Tensor,
    state: State,
    row_K: Tensor,
    place_K: Tensor,
    *,
    weight: float = 0.7,
    power: float = 0.2,
    decay: float = 0.8,
    slots: int = 8,
) -> Tensor:
    """Credit decoding: tokens that were likeliest at a position at earlier steps are raised (Wang et al. 2025).

    At every step of an open position C <- decay C, then C[v*] += p(v*)^power for the likeliest token v*, and the logits
    become l + weight log(1 + C). C is kept for the `slots` tokens of most credit of each position (released: for all
    tokens, B x L x V numbers).
    """
    if slots < 1 or not 0 <= decay <= 1:
        raise RecipeError(f"transforms: credit needs slots of at least 1 and decay in [0, 1], not {slots} and {decay}.")
    known = _credit(state, slots, logits_KV.device)
    logits_KV[:, state.mask_token_id] = -torch.inf
    top_K, best_K = logits_KV.max(dim=1)
    gain_K = (top_K - logits_KV.logsumexp(dim=1)).exp() ** power
    place = row_K, place_K
    # A position that was already seen at this step starts from what it had before.
    again_K1 = (known.seen_AL[place] == state.step_A[row_K])[:, None]
    token_KS = torch.where(again_K1, known.token_ALS[place], known.next_token_ALS[place])
    value_KS = torch.where(again_K1, known.value_ALS[place], known.next_value_ALS[place])
    known.token_ALS[place], known.value_ALS[place] = token_KS, value_KS
    assert state.window_AL is not None
    open_K = state.window_AL[place]
    found_KS = (token_KS == best_K[:, None]) & (value_KS > 0)
    new_value_KS = value_KS * decay
    # The slot of the likeliest token, or the one of least credit.
    slot_K = torch.where(found_KS.any(dim=1), found_KS.to(torch.int8).argmax(dim=1), new_value_KS.argmin(dim=1))[
        :, None
    ]
    kept_K = torch.where(found_KS.any(dim=1), new_value_KS.gather(1, slot_K).squeeze(1), 0.0)
    new_value_KS = new_value_KS.scatter(1, slot_K, (kept_K + gain_K.to(value_KS.dtype))[:, None])
    new_token_KS = token_KS.scatter(1, slot_K, best_K[:, None])
    token_KS = torch.where(open_K[:, None], new_token_KS, token_KS)
    value_KS = torch.where(open_K[:, None], new_value_KS, value_KS)
    known.next_token_ALS[place], known.next_value_ALS[place] = token_KS, value_KS
    known.seen_AL[place] = state.step_A[row_K]
    raised_KS = (weight * torch.log1p(value_KS) * open_K[:, None]).to(logits_KV.dtype)
    return logits_KV.scatter_add_(1, token_KS, raised_KS)


def _credit(state: State, slots: int, device: torch.device) -> Credit:
    """Return the tables of `credit`, empty ones at first."""
    names = [f"credit_{name}" for name in Credit._fields]
    if names[0] not in state.memory:
        shape = (*state.canvas_AL.shape, slots)
        ids, values = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, device=device)
        tables = (ids, values, ids.clone(), values.clone(), torch.full(shape[:2], -1, device=device))
        state.memory |= dict(zip(names, tables, strict=True))
    return Credit(*(state.memory[name] for name in names))


@transform.register
@traits(
    whole=True, group=True, status="behaviour only", learns="the draw depends on the group's other rollouts, unscored"
)
def odd(rows: Rows, state: State, row_K: Tensor, place_K: Tensor, *, strength: float = 16.0) -> Rows:
    """ODD: each rollout of a group is pushed away from what the ones before it are about to say.

    Feature v: the largest softmax(l) that each token has on the canvas (1 for decided ones), of length 1. r: v without
    its parts along earlier rollouts' r (Gram-Schmidt in group order), of length 1; 0 where less than a hundredth is
    left. q: the mean over open positions of the largest probability. The logits become l - a g with g the gradient of
    -q (v . r) in them, r and q held fixed, zero at EOS, over the largest norm of a position's g in the rollout; a is
    `strength` times the share of the start's open positions that are open now. The first of a group is left alone, and
    open positions outside the step's window are not looked at. Logits are computed three times, chunk by chunk: for the
    features, for the norms and for the draw.
    """
    if strength < 0:
        raise RecipeError(f"transforms: odd.strength {strength} must be at least 0.")
    spans = chunks(len(row_K), rows.vocabulary, row_K.device)
    peak_AV, sure_A = _features(rows, state, row_K, place_K, spans)
    slope_AV = _slopes(peak_AV, sure_A, state)

    def gradient(start: int, stop: int) -> tuple[Tensor, Tensor]:
        logits_KV, p_KV = _open_softmax(rows, state, row_K, place_K, start, stop)
        row_k = row_K[start:stop]
        # A hair: another chunk's product may round the same probability otherwise.
        peaks_KV = (p_KV >= peak_AV[row_k] * (1 - 1e-4)) & (p_KV > 0)
        slope_KV = torch.where(peaks_KV, slope_AV[row_k], 0.0)
        # Through the softmax: dl = p (s - p . s).
        slope_KV = p_KV * (slope_KV - (p_KV * slope_KV).sum(dim=1, keepdim=True))
        if state.eos_token_ids:
            slope_KV[:, list(state.eos_token_ids)] = 0.0
        return logits_KV, slope_KV

    size_A = torch.zeros_like(sure_A)
    for start, stop in spans:
        size_A.scatter_reduce_(0, row_K[start:stop], gradient(start, stop)[1].norm(dim=1), "amax")
    share_A = state.masked_AL.sum(dim=1) / state.open_A.clamp(min=1)
    scale_A = torch.where(size_A > 0, strength * share_A / size_A, 0.0)

    def moved(start: int, stop: int) -> Tensor:
        logits_KV, slope_KV = gradient(start, stop)
        return logits_KV.sub_(slope_KV.mul_(scale_A[row_K[start:stop]][:, None]))

    return Rows(moved, rows.vocabulary)


def _open_softmax(
    rows: Rows, state: State, row_K: Tensor, place_K: Tensor, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Return a chunk's logits and their softmax, 0 where the position is not in the window."""
    assert state.window_AL is not None
    logits_KV = rows.logits(start, stop)
    logits_KV[:, state.mask_token_id] = -torch.inf
    open_K = state.window_AL[row_K[start:stop], place_K[start:stop]]
    return logits_KV, logits_KV.softmax(dim=1).masked_fill_(~open_K[:, None], 0.0)


def _features(
    rows: Rows, state: State, row_K: Tensor, place_K: Tensor, spans: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return of each rollout the largest probability of every token on open positions, and the mean of the largest."""
    assert state.window_AL is not None
    tables: tuple[Tensor, Tensor] | None = None
    for start, stop in spans:
        _, p_KV = _open_softmax(rows, state, row_K, place_K, start, stop)
        if tables is None:
            tables = p_KV.new_zeros(len(state.canvas_AL), rows.vocabulary), p_KV.new_zeros(state.canvas_AL.shape)
        tables[0].scatter_reduce_(0, row_K[start:stop, None].expand_as(p_KV), p_KV, "amax")
        # In a table a position that padding repeats counts once.
        tables[1].index_put_((row_K[start:stop], place_K[start:stop]), p_KV.amax(dim=1))
    assert tables is not None
    return tables[0], tables[1].sum(dim=1) / state.window_AL.sum(dim=1).clamp(min=1)


def _slopes(peak_AV: Tensor, sure_A: Tensor, state: State) -> Tensor:
    """Return the gradient of -q (v . r) in the largest probability of every token, 0 where a decided one has it."""
    decided_AL = ~state.masked_AL & state.exists_AL
    decided_AV = torch.zeros_like(peak_AV).scatter_reduce_(1, state.canvas_AL, decided_AL.to(peak_AV.dtype), "amax")
    norm_A1 = torch.maximum(peak_AV, decided_AV).norm(dim=1, keepdim=True).clamp(min=1e-12)
    feature_AV = torch.maximum(peak_AV, decided_AV) / norm_A1
    residual_AV, first_A = _residuals(feature_AV, state.group_A)
    # d(v . r) / du with v = u / |u|, where u is a position's own probability.
    along_A1 = (feature_AV * residual_AV).sum(dim=1, keepdim=True)
    slope_AV = (-sure_A * ~first_A)[:, None] * (residual_AV - along_A1 * feature_AV) / norm_A1
    return slope_AV.masked_fill_(peak_AV <= decided_AV, 0.0)


def _residuals(feature_AV: Tensor, group_A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the normalised residuals of Gram-Schmidt in each group, by row, and which rows are a group's first.

    With the Gram matrix of a group's features V V' = L L', they are the rows of L^-1 V.
    """
    same_AA = group_A[:, None] == group_A[None]
    gram_AA = torch.where(same_AA, feature_AV @ feature_AV.T, 0.0).double()
    gram_AA.diagonal().add_(1e-8)
    lower_AA = torch.linalg.cholesky_ex(gram_AA).L
    inverse_AA = torch.linalg.solve_triangular(lower_AA, torch.eye(len(group_A)).to(lower_AA), upper=False)
    # What is left of a row that repeats earlier ones is rounding.
    inverse_AA.masked_fill_((lower_AA.diagonal() < 1e-2)[:, None], 0.0)
    return inverse_AA.to(feature_AV.dtype) @ feature_AV, ~same_AA.tril(-1).any(dim=1)
