"""Scores: which open position to commit first, from the distributions alone (never from a drawn token).

All scores are log-like, higher first and at most 0, so that `threshold` compares any of them with log(level).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..recipes.registry import SLOTS

score = SLOTS["score"]


@score.register
def confidence(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """max_v log p(v): the log-probability of the likeliest token (log, so that values near 1 do not tie)."""
    return logp_KV.amax(dim=-1)


@score.register
def entropy(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """-H(p) in nats; exp of it is the inverse perplexity, so `threshold` reads as an effective probability."""
    return torch.special.xlogy(logp_KV.exp(), logp_KV.exp()).sum(dim=-1)


@score.register
def margin(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """log(p_1 - p_2): the gap between the two likeliest tokens (Kim et al. 2025, top probability margin)."""
    top_K2 = logp_KV.topk(2, dim=-1).values
    # log(p1 - p2) = log p1 + log(1 - p2/p1), stable where both are small.
    gap_K = -torch.expm1(top_K2[:, 1] - top_K2[:, 0])
    return top_K2[:, 0] + gap_K.clamp(min=torch.finfo(gap_K.dtype).tiny).log()


@score.register
def random(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """log u with u uniform, keyed by rollout, step and position."""
    return noise_K.log().to(logp_KV.dtype)


@score.register
def left_to_right(logp_KV: Tensor, position_K: Tensor, noise_K: Tensor) -> Tensor:
    """-position: the leftmost open position first."""
    return -position_K.to(logp_KV.dtype)
