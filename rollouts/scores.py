"""Scores: which open position to commit first.

A score sees the statistics of every asked position (`Statistics`), its place on the canvas and a keyed uniform, all of
one shape, and returns a table of that shape; one that declares `state` gets the `State` too. All scores are log-like,
higher first and at most 0, so that `threshold` compares any of them with log(level). Scores read the distribution and
never a drawn token, but for `sampled_confidence`.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..recipes.registry import SLOTS, RecipeError
from .measures import Statistics
from .state import State
from .traits import traits

score = SLOTS["score"]


@score.register
def confidence(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """max_v log p(v): the log-probability of the likeliest token, precise where p rounds to 1, so that none tie."""
    return statistics.confidence


@score.register
@traits(needs=("drawn",), status="exact with tail mass", learns="the drawn tokens decide the positions")
def sampled_confidence(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """log p of the *drawn* token: LLaDA's rule, which draws everywhere and keeps the likeliest draws.

    A step's log-probability then has a term for the positions too (samplers.md section 1.3), which is recorded and
    replayed; with `exact: false` it is the naive sum over tokens, which is no distribution.
    """
    assert statistics.drawn is not None
    return torch.nn.functional.logsigmoid(statistics.drawn)


@score.register
@traits(needs=("entropy",))
def entropy(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """-H(p) in nats; exp of it is the inverse perplexity, so `threshold` reads as an effective probability."""
    assert statistics.entropy is not None
    return -statistics.entropy


@score.register
@traits(needs=("second",))
def margin(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """log(p_1 - p_2): the gap between the two likeliest tokens (Kim et al. 2025, top probability margin)."""
    assert statistics.second is not None
    fall = statistics.second - statistics.confidence
    # log(p1 - p2) = log p1 + log(1 - p2/p1); expm1 keeps small gaps, log1p gaps near 1.
    near = -torch.expm1(fall).clamp(max=-torch.finfo(fall.dtype).tiny)
    gap = torch.where(fall > -math.log(2), near.log(), torch.log1p(-fall.exp()))
    return statistics.confidence + gap


@score.register
@traits(history=True)
def random(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """log u with u uniform, keyed by rollout, step and position."""
    return noise.log().to(statistics.confidence.dtype)


@score.register
def left_to_right(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """-position: the leftmost open position first."""
    return -position.to(statistics.confidence.dtype)


@score.register
def eoser(
    statistics: Statistics,
    position: Tensor,
    noise: Tensor,
    *,
    state: State,
    low: float = 0.4,
    high: float = 1.0,
    steps: int | None = None,
    growth: Literal["linear", "doubling"] = "linear",
) -> Tensor:
    """`confidence`, times a factor where the likeliest token is an EOS: ends are not decided early (EOSER).

    The factor goes from `low` to `high` over the rollout's steps t = 0 .. S - 1 (not a block's): `linear` is
    low + (high - low) t / (S - 1), `doubling` low + (high - low)(2^(t+1) - 1) / 2^S, for schedule `ascending`. `steps`
    is S, by default one a position open at the start, with `doubling` the log2 of their number (CJ-GRPO, section 4).
    """
    return _early(statistics.confidence, statistics.best, state, _eos_factor(state, low, high, steps, growth))


@score.register
@traits(needs=("drawn",), status="exact with tail mass", learns="the drawn tokens decide the positions")
def sampled_eoser(
    statistics: Statistics,
    position: Tensor,
    noise: Tensor,
    *,
    state: State,
    low: float = 0.4,
    high: float = 1.0,
    steps: int | None = None,
    growth: Literal["linear", "doubling"] = "linear",
) -> Tensor:
    """`eoser` on the drawn token and its probability: the released rule, see `sampled_confidence`."""
    drawn = sampled_confidence(statistics, position, noise)
    return _early(drawn, statistics.token, state, _eos_factor(state, low, high, steps, growth))


def _eoser_tokens(
    score_KV: Tensor,
    *,
    state: State,
    row_K: Tensor,
    low: float = 0.4,
    high: float = 1.0,
    steps: int | None = None,
    growth: str = "linear",
) -> Tensor:
    """Return the score of every token, from its log-probability."""
    factor_K = _eos_factor(state, low, high, steps, growth)[row_K]
    eos = list(state.eos_token_ids)
    score_KV[:, eos] += factor_K[:, None]
    return score_KV


sampled_eoser.tokens = _eoser_tokens  # type: ignore[attr-defined]


def _eos_factor(state: State, low: float, high: float, steps: int | None, growth: str) -> Tensor:
    """Return the log of each row's factor."""
    if not 0 < low <= high <= 1:
        raise RecipeError(f"score.low, score.high: {low} and {high} must satisfy 0 < low <= high <= 1.")
    if steps is not None and steps < 1:
        raise RecipeError(f"score.steps: {steps} must be at least 1.")
    open_A, step_A = state.open_A.clamp(min=1), state.step_A
    if growth == "linear":
        total_A = open_A if steps is None else torch.full_like(open_A, steps)
        share_A = step_A / (total_A - 1).clamp(min=1)
        share_A = torch.where(total_A == 1, 1.0, share_A)
    else:
        total_A = torch.frexp(open_A.double()).exponent - 1 if steps is None else torch.full_like(open_A, steps)
        share_A = 2.0 ** (step_A + 1 - total_A) - 2.0**-total_A
    return (low + (high - low) * share_A.clamp(max=1.0)).log().float()


def _early(score: Tensor, token: Tensor, state: State, factor_A: Tensor) -> Tensor:
    """Return the score with the factor where the token is an EOS."""
    ends = functools.reduce(
        torch.logical_or, [token == eos for eos in state.eos_token_ids], torch.zeros_like(token) > 0
    )
    return torch.where(ends, score + factor_A[:, None].to(score.dtype), score)


@score.register
def calibrated(
    statistics: Statistics,
    position: Tensor,
    noise: Tensor,
    *,
    decay: float = 0.25,
    ceiling: float = 10.0,
    frequencies: str | None = None,
) -> Tensor:
    """log of exp(-decay x position) min(-p ln f, ceiling) / ceiling, p of the likeliest token, f its frequency.

    Trivial tokens wait and the left comes first (PC-Sampler, arXiv 2508.13021). `frequencies` is a JSON file
    {"num_token": N, "p_baseline_dict": {"token id": count}}; a token it does not list counts once in N. Without a file
    -ln f is 1 for all. Sources: decay 0.25, 0 for Sudoku, 1 for Countdown.
    """
    if decay < 0 or not ceiling > 0:
        raise RecipeError(f"score.decay, score.ceiling: {decay} and {ceiling} must be at least 0 and above 0.")
    log_information: Tensor | float = 0.0
    if frequencies is not None:
        table_V, rare = _surprise(frequencies, statistics.best.device)
        known = statistics.best.clamp(max=len(table_V) - 1)
        log_information = torch.where(statistics.best < len(table_V), table_V[known], rare)
    value = (statistics.confidence + log_information).clamp(max=math.log(ceiling)) - math.log(ceiling)
    return value - decay * position


@functools.cache
def _surprise(path: str, device: torch.device) -> tuple[Tensor, float]:
    """Return log(-ln f) of every token of a frequency file, and of one that it does not list."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        total = float(data["num_token"])
        counts = {int(key): float(value) for key, value in data["p_baseline_dict"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"score.frequencies: '{path}' is no file of counts ({type(error).__name__}: {error}); "
            'write {"num_token": N, "p_baseline_dict": {"id": count}}.'
        ) from error
    if not counts or min(counts) < 0 or not all(0 < count < total for count in counts.values()):
        raise RecipeError(f"score.frequencies: every count of '{path}' must lie between 0 and num_token {total:g}.")
    frequency_V = torch.full((max(counts) + 1,), 1 / total, dtype=torch.float64)
    frequency_V[list(counts)] = torch.tensor(list(counts.values()), dtype=torch.float64) / total
    return (-frequency_V.log()).log().float().to(device), math.log(math.log(total))
