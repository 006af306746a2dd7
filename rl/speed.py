"""Speed: from the truth of a rollout and its number of denoiser calls to one reward.

Shapes: `reward_B`, `steps_B` calls, `length_B` positions that were open at the start, `alpha_B` trade-offs (0: speed
does not count).
"""

from __future__ import annotations

from torch import Tensor

from ..recipes.registry import SLOTS

speed = SLOTS["speed"]


@speed.register
def multiplicative(reward_B: Tensor, steps_B: Tensor, length_B: Tensor, alpha_B: Tensor) -> Tensor:
    """r ((L - N + 1)/L)^alpha for N calls, at most L counted: 1 at one call, L^-alpha at one a position.

    Wrong answers gain nothing by being fast (arXiv 2512.09106, eq. 3.1, as its code has it).
    """
    share_B = (length_B - steps_B.minimum(length_B) + 1) / length_B.clamp(min=1)
    return reward_B * share_B.pow(alpha_B)


@speed.register
def additive(reward_B: Tensor, steps_B: Tensor, length_B: Tensor, alpha_B: Tensor) -> Tensor:
    """r - alpha N/L: where answers are seldom right, deciding all at once is its optimum (reward hacking)."""
    return reward_B - alpha_B * steps_B / length_B.clamp(min=1)
