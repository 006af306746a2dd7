"""Scores: which open position to commit first.

A score sees the statistics of every asked position (`Statistics`), its place on the canvas and a keyed uniform, all of
one shape, and returns a table of that shape; one that declares `state` gets the `State` too. All scores are log-like,
higher first and at most 0, so that `threshold` compares any of them with log(level). Scores read the distribution and
never a drawn token, but for `sampled_confidence`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from .measures import Statistics
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
def random(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """log u with u uniform, keyed by rollout, step and position."""
    return noise.log().to(statistics.confidence.dtype)


@score.register
def left_to_right(statistics: Statistics, position: Tensor, noise: Tensor) -> Tensor:
    """-position: the leftmost open position first."""
    return -position.to(statistics.confidence.dtype)
