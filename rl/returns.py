"""Returns and advantages of a rollout's tokens, step by step, from a value of each; and the loss of these values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """`advantage_K` of each token, and `return_K`, what its value is to become; both float64."""

    advantage_K: Tensor
    return_K: Tensor


def step_targets(
    value_K: Tensor, reward_B: Tensor, row_K: Tensor, step_K: Tensor, *, discount: float = 1.0, decay: float = 1.0
) -> Targets:
    """Return advantages and returns of K tokens by generalised advantage estimation over denoising steps.

    The steps t of a rollout are the distinct `step_K` of its tokens in their order; its reward r is paid to the tokens
    of the last one, all others get 0. With means over a step's tokens marked *, g the discount and d the decay, all 0
    behind the last step, a token j of step t has

        R_j = r_j + g R*_{t+1}
        A_j = r_j - V_j + g V*_{t+1} + g d A*_{t+1}

    and R*_t, A*_t follow by taking the mean (TraceRL, arXiv 2509.06949; trajectory_rl.md section 6.6). At g = d = 1
    A_j = r - V_j. Steps are looped over, rollouts are not.
    """
    value_K, reward_B = value_K.double(), reward_B.double()
    if not len(value_K):
        return Targets(value_K, value_K)
    stride = int(step_K.max()) + 1
    key_U, index_K, size_U = torch.unique(row_K * stride + step_K, return_inverse=True, return_counts=True)
    row_U = key_U // stride
    count_B = torch.bincount(row_U, minlength=len(reward_B))
    place_U = torch.arange(len(key_U), device=key_U.device) - (count_B.cumsum(0) - count_B)[row_U]
    value_U = value_K.new_zeros(len(key_U)).index_add(0, index_K, value_K) / size_U
    reward_U = torch.where(place_U == count_B[row_U] - 1, reward_B[row_U], 0.0)
    steps = int(count_B.max())
    # One column more, of zeros, is what follows the last step.
    value_BT = value_K.new_zeros(len(reward_B), steps + 1)
    reward_BT, return_BT, advantage_BT = (torch.zeros_like(value_BT) for _ in range(3))
    value_BT[row_U, place_U], reward_BT[row_U, place_U] = value_U, reward_U
    for t in reversed(range(steps)):
        return_BT[:, t] = reward_BT[:, t] + discount * return_BT[:, t + 1]
        surprise_B = reward_BT[:, t] - value_BT[:, t] + discount * value_BT[:, t + 1]
        advantage_BT[:, t] = surprise_B + discount * decay * advantage_BT[:, t + 1]
    after_K = row_K, place_U[index_K] + 1
    reward_K = reward_U[index_K]
    later_K = discount * (value_BT[after_K] + decay * advantage_BT[after_K])
    return Targets(reward_K - value_K + later_K, reward_K + discount * return_BT[after_K])


def value_loss(value_K: Tensor, old_K: Tensor, return_K: Tensor, *, clip: float) -> Tensor:
    """Return 1/2 max((V - R)^2, (V' - R)^2) of each token, V' = V_old + clamp(V - V_old, -clip, clip).

    A value that has moved further than `clip` towards its return has no gradient (PPO's clipped value loss;
    trajectory_rl.md section 6.6).
    """
    held_K = old_K + (value_K - old_K).clamp(-clip, clip)
    return 0.5 * torch.maximum((value_K - return_K).square(), (held_K - return_K).square())
