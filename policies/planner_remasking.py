"""Opening and taking back as one draw: independent decisions, conditioned on net progress.

A step opens the set U of masked candidates and takes back the set W of decided ones, with |W| < |U| and |W| <= budget:

    P(U, W) = exp(sum_U z + sum_W z) / Z,    Z = sum over the pairs allowed

which is what independent decisions of probability sigmoid(z) do, given that more is opened than taken back. Every step
leaves fewer masks than it found, so that their number bounds the steps, and one opens something at least.

Z needs no list of pairs. With e_a the mass of all sets of a positions, Z = sum_a e_a(open) sum_{b < a} e_b(decided).
Numbers above the budget are told apart from no other, so budget + 2 numbers are enough, and those of neighbours
join: a tree of depth log L over the positions gives Z, and the way back down a draw, in log L parts each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .planner_distributions import FAR, Draw, Noise

MOST = 8  # tokens that a step may be allowed to take back: a join looks at (budget + 2)^2 numbers


@dataclass(frozen=True)
class Remasking:
    """Which of `candidate_BL` are opened and which of `standing_BL` taken back, at most `budget` and fewer than opened.

    A choice is one table: opened positions are those of the candidates, taken back ones those that stand. The order
    plays no part. A row without candidates has one outcome, which does nothing.
    """

    logit_BL: Tensor
    candidate_BL: Tensor
    standing_BL: Tensor
    budget: int

    @property
    def chance_BL(self) -> Tensor:
        """log sigmoid(logit): the chance before the condition."""
        return logsigmoid(self.logit_BL)

    @property
    def may_be_empty(self) -> bool:
        """Never."""
        return False

    def sample(self, noise: Noise) -> Draw:
        """Return a draw: how many of both first, then which, half by half."""
        opened, taken = self._trees
        joint_BX = self._joint
        pair_B = _drawn(joint_BX.T, noise.row_B)
        count_B, back_B = pair_B // (self.budget + 2), pair_B % (self.budget + 2)
        chosen_BL = _members(opened, count_B, noise.unit_BL) | _members(taken, back_B, noise.order_BL)
        return Draw(chosen_BL, self.logit_BL)

    def mode(self) -> Draw:
        """Return the likeliest outcome: the best of each kind, in the best pair of numbers."""
        (open_BL, place_BL), (back_BL, where_BL) = (_best_sums(self.logit_BL, kind_BL) for kind_BL in self._kinds)
        back_BL = torch.cat([torch.zeros_like(back_BL[:, :1]), back_BL], dim=1)[:, : self.budget + 1]
        number_L = torch.arange(open_BL.shape[1], device=open_BL.device) + 1
        number_K = torch.arange(back_BL.shape[1], device=open_BL.device)
        total_BLK = open_BL[:, :, None] + back_BL[:, None, :]
        total_BLK = total_BLK.masked_fill(number_K >= number_L[:, None], -torch.inf)
        index_B = total_BLK.flatten(1).argmax(dim=1)
        count_B1, many_B1 = (index_B // len(number_K) + 1)[:, None], (index_B % len(number_K))[:, None]
        chosen_BL = (place_BL < count_B1) & self.candidate_BL | (where_BL < many_B1) & self.standing_BL
        return Draw(chosen_BL & self.candidate_BL.any(dim=1, keepdim=True), self.logit_BL)

    def log_prob(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `logprob_B`; `FAR` for a choice that makes no progress or exceeds the budget."""
        count_B, back_B = ((chosen_BL & kind_BL).sum(dim=1) for kind_BL in self._kinds)
        acts_BL = chosen_BL & (self.candidate_BL | self.standing_BL)
        energy_B = torch.where(acts_BL, self.logit_BL.double(), 0.0).sum(dim=1)
        value_B = energy_B - self._joint.logsumexp(dim=1)
        value_B = torch.where((back_B < count_B) & (back_B <= self.budget), value_B, FAR)
        return torch.where(self.candidate_BL.any(dim=1), value_B, 0.0).to(self.logit_BL.dtype)

    def entropy(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `entropy_B`, exact: log Z - E[sum_U z + sum_W z]."""
        opened_CB, taken_CB = (
            _means(levels, self.logit_BL, kind_BL) for levels, kind_BL in zip(self._trees, self._kinds, strict=True)
        )
        mean_BX = (opened_CB[:, None] + taken_CB).flatten(0, 1).T
        value_B = self._joint.logsumexp(dim=1) - (self._joint.softmax(dim=1) * mean_BX).sum(dim=1)
        return torch.where(self.candidate_BL.any(dim=1), value_B, 0.0).to(self.logit_BL.dtype)

    @property
    def _kinds(self) -> tuple[Tensor, Tensor]:
        return self.candidate_BL, self.standing_BL

    @cached_property
    def _trees(self) -> tuple[list[Tensor], list[Tensor]]:
        opened, taken = (_tree(self.logit_BL, kind_BL, self.budget) for kind_BL in self._kinds)
        return opened, taken

    @cached_property
    def _joint(self) -> Tensor:
        """Log weights of the pairs of numbers (opened, taken back) `[B, C C]`, `FAR` where they are not allowed."""
        opened_CB, taken_CB = (levels[-1].squeeze(2) for levels in self._trees)
        number_C = torch.arange(self.budget + 2, device=opened_CB.device)
        allowed_CC = (number_C < number_C[:, None]) & (number_C <= self.budget)
        # Nothing to open, nothing done: the one outcome of a row without candidates.
        nothing_CC = (number_C == 0) & (number_C[:, None] == 0)
        allowed_CCB = torch.where(self.candidate_BL.any(dim=1), allowed_CC[..., None], nothing_CC[..., None])
        return (opened_CB[:, None] + taken_CB).masked_fill(~allowed_CCB, FAR).flatten(0, 1).T


def _tree(logit_BL: Tensor, kind_BL: Tensor, budget: int) -> list[Tensor]:
    """Return fp64 log masses `[C, B, nodes]` of how many positions under a node are chosen, leaves first.

    C = budget + 2 numbers, the last of them for all above; they come first because sums go over them.
    """
    none_BL = torch.zeros_like(logit_BL, dtype=torch.float64)
    one_BL = torch.where(kind_BL, logit_BL.double(), FAR)
    levels = [torch.stack([none_BL, one_BL, *[torch.full_like(none_BL, FAR)] * budget])]
    while levels[-1].shape[2] > 1:
        left_CBN, right_CBN = _halves(levels[-1])
        flipped_CBN = right_CBN.flip(0)
        joined = [(left_CBN[: n + 1] + flipped_CBN[-n - 1 :]).logsumexp(dim=0) for n in range(budget + 1)]
        joined.append((left_CBN + flipped_CBN.logcumsumexp(dim=0)).logsumexp(dim=0))
        levels.append(_carried(torch.stack(joined), levels[-1]))
    return levels


def _means(levels: list[Tensor], logit_BL: Tensor, kind_BL: Tensor) -> Tensor:
    """Return the mean sum of the chosen logits at the root, for every number `[C, B]`."""
    numbers = len(levels[0])
    one_BL = torch.where(kind_BL, logit_BL.double(), 0.0)
    mean_CBN = torch.stack([one_BL if number == 1 else torch.zeros_like(one_BL) for number in range(numbers)])
    for level in levels[:-1]:
        weight_XBN, (left_CBN, right_CBN) = _pairs(level), _halves(mean_CBN)
        both_XBN = (left_CBN[:, None] + right_CBN).flatten(0, 1)
        sum_X = _sums(numbers)
        joined = [
            (weight_XBN[sum_X == number].softmax(dim=0) * both_XBN[sum_X == number]).sum(dim=0)
            for number in range(numbers)
        ]
        mean_CBN = _carried(torch.stack(joined), mean_CBN)
    return mean_CBN.squeeze(2)


def _halves(level_CBN: Tensor) -> tuple[Tensor, Tensor]:
    """Return the left and the right one of every two neighbours."""
    even = level_CBN.shape[2] // 2 * 2
    return level_CBN[..., :even:2], level_CBN[..., 1:even:2]


def _pairs(level_CBN: Tensor) -> Tensor:
    """Return log masses `[C C, B, N // 2]` of the pairs of numbers of two neighbours."""
    left_CBN, right_CBN = _halves(level_CBN)
    return (left_CBN[:, None] + right_CBN).flatten(0, 1)


@cache
def _sums(numbers: int) -> Tensor:
    """Return the sum `[C C]` of every pair of numbers; the last number stands for all above."""
    number_C = torch.arange(numbers)
    return (number_C[:, None] + number_C).clamp(max=numbers - 1).flatten()


def _carried(joined_CBN: Tensor, level_CBN: Tensor) -> Tensor:
    """Return a level with the last node of an odd one below it, which has no neighbour."""
    return torch.cat([joined_CBN, level_CBN[..., level_CBN.shape[2] // 2 * 2 :]], dim=2)


def _members(levels: list[Tensor], count_B: Tensor, uniform_BL: Tensor) -> Tensor:
    """Return `count_B` positions drawn from the leaves, halving the number at every node on the way down."""
    count_BN, used, numbers = count_B[:, None], 0, len(levels[0])
    sum_X11 = _sums(numbers).to(count_B.device)[:, None, None]
    for level in reversed(levels[:-1]):
        pairs = level.shape[2] // 2
        mass_XBN = _pairs(level).masked_fill(sum_X11 != count_BN[:, :pairs], FAR)
        index_BN = _drawn(mass_XBN, uniform_BL[:, used : used + pairs])
        halves_BN = torch.stack([index_BN // numbers, index_BN % numbers], dim=2).flatten(1)
        count_BN, used = torch.cat([halves_BN, count_BN[:, pairs:]], dim=1), used + pairs
    return count_BN == 1


def _drawn(logmass_XB: Tensor, uniform_B: Tensor) -> Tensor:
    """Return an index of the first dimension, drawn in proportion to the masses."""
    reach_XB = logmass_XB.softmax(dim=0).cumsum(dim=0)
    return (reach_XB < uniform_B * reach_XB[-1]).sum(dim=0)


def _best_sums(logit_BL: Tensor, kind_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of the 1, 2, ... highest logits of a kind (-inf beyond it), and each position's place."""
    value_BL, order_BL = logit_BL.masked_fill(~kind_BL, -torch.inf).sort(dim=1, descending=True, stable=True)
    place_L = torch.arange(logit_BL.shape[1], device=logit_BL.device).expand_as(order_BL)
    return value_BL.cumsum(dim=1), torch.empty_like(order_BL).scatter_(1, order_BL, place_L)
