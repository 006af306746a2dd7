"""Scores: which open position to commit first, from the distributions alone (never from a drawn token).

All scores are log-like, higher first and at most 0, so that `threshold` compares any of them with log(level).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..recipes.registry import SLOTS
from .categorical import best_logprob

score = SLOTS["score"]


@score.register
def confidence(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """max_v log p(v): the log-probability of the likeliest token, precise where p rounds to 1, so that none tie."""
    return best_logprob(logp_KV)


@score.register
def entropy(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """-H(p) in nats; exp of it is the inverse perplexity, so `threshold` reads as an effective probability."""
    return torch.special.xlogy(logp_KV.exp(), logp_KV.exp()).sum(dim=-1)


@score.register
def margin(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """log(p_1 - p_2): the gap between the two likeliest tokens (Kim et al. 2025, top probability margin)."""
    top_K2 = logp_KV.topk(2, dim=-1).values
    fall_K = top_K2[:, 1] - top_K2[:, 0]
    # log(p1 - p2) = log p1 + log(1 - p2/p1); expm1 keeps small gaps, log1p gaps near 1.
    near_K = -torch.expm1(fall_K).clamp(max=-torch.finfo(fall_K.dtype).tiny)
    gap_K = torch.where(fall_K > -math.log(2), near_K.log(), torch.log1p(-fall_K.exp()))
    return best_logprob(logp_KV) + gap_K


@score.register
def random(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """log u with u uniform, keyed by rollout, step and position."""
    return noise_K.log().to(logp_KV.dtype)


@score.register
def left_to_right(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """-position: the leftmost open position first."""
    return -position_K.to(logp_KV.dtype)
