"""Distributions over the positions that a step reveals: one object that samples, scores and measures its entropy.

All are built from `logit_BL` (one number a position), `candidate_BL` (the positions that may be chosen) and whatever
else they need; a row without candidates has one outcome, of probability 1. `Noise` is keyed by the caller. Methods:

* `sample(noise)` and `mode()` give a `Draw`;
* `log_prob(chosen_BL, rank_BL)` is the log-probability of a draw, `rank_BL` the order inside it where order matters;
* `entropy(chosen_BL, rank_BL)` is exact where a closed form exists, else the sum of the exact conditional entropies
  along the given draw, whose mean over draws is the entropy;
* `chance_BL` is a log-probability a position, by which other selections may rank.

Equations: unmasking_policies notes, Bernoulli and Plackett-Luce policies of Jazbec et al. (arXiv 2512.09106), with the
fallback counted in the likelihood, which the published code leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad, softplus

FAR = -1e30  # nats: so unlikely that it does not count, and no infinity, whose gradient is NaN
FALLBACKS = ("sampled", "argmax", "none")


class Noise(NamedTuple):
    """fp64 uniforms in (0, 1): two a position, one a row."""

    unit_BL: Tensor
    order_BL: Tensor
    row_B: Tensor


class Draw(NamedTuple):
    """The chosen positions, and keys whose falling order is the order in which they were drawn."""

    chosen_BL: Tensor
    key_BL: Tensor


class Distribution(Protocol):
    """What every distribution offers; see the module."""

    @property
    def logit_BL(self) -> Tensor: ...

    @property
    def chance_BL(self) -> Tensor: ...

    @property
    def may_be_empty(self) -> bool: ...

    def sample(self, noise: Noise) -> Draw: ...

    def mode(self) -> Draw: ...

    def log_prob(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor: ...

    def entropy(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Bernoulli:
    """Each candidate by itself with probability sigmoid(logit); what happens when none comes up is `fallback`.

    `sampled`: one position from softmax(logit); `argmax`: the one with the highest logit; `none`: an empty step. With
    keep = sum_C log(1 - s_j), log P(u) = keep + sum u_j z_j, and a single position k has besides (log) `sampled`
    softplus(-LSE(z)), `argmax` softplus(-z_k) at the highest: the forced and the drawn event are one outcome.
    """

    logit_BL: Tensor
    candidate_BL: Tensor
    fallback: str = "sampled"

    @property
    def chance_BL(self) -> Tensor:
        """log sigmoid(logit)."""
        return logsigmoid(self.logit_BL)

    @property
    def may_be_empty(self) -> bool:
        """Whether a step may reveal nothing."""
        return self.fallback == "none"

    def sample(self, noise: Noise) -> Draw:
        """Return a draw."""
        drawn_BL = (torch.logit(noise.unit_BL) < self.logit_BL.double()) & self.candidate_BL
        if self.fallback == "none":
            return Draw(drawn_BL, self.logit_BL)
        key_BL = self.logit_BL if self.fallback == "argmax" else _gumbel(self.logit_BL, noise.order_BL)
        return self._filled(drawn_BL, key_BL)

    def mode(self) -> Draw:
        """Return every candidate whose probability is above 1/2, the likeliest where there is none."""
        return self._filled((self.logit_BL > 0) & self.candidate_BL, self.logit_BL)

    def _filled(self, drawn_BL: Tensor, key_BL: Tensor) -> Draw:
        first_BL = _best(key_BL, self.candidate_BL)
        return Draw(drawn_BL | (first_BL & ~drawn_BL.any(dim=1, keepdim=True)), self.logit_BL)

    def log_prob(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `logprob_B`; the order plays no part."""
        each_BL = logsigmoid(torch.where(chosen_BL, self.logit_BL, -self.logit_BL))
        total_B = torch.where(self.candidate_BL, each_BL, 0.0).sum(dim=1)
        if self.fallback == "none":
            return total_B
        count_B = chosen_BL.sum(dim=1)
        alone_B = torch.where(chosen_BL, self._forced(), 0.0).sum(dim=1)
        total_B = total_B + torch.where(count_B == 1, alone_B, 0.0)
        return torch.where((count_B == 0) & self.candidate_BL.any(dim=1), FAR, total_B)

    def _forced(self) -> Tensor:
        """Return what the fallback adds to the log-probability of each position alone."""
        if self.fallback == "sampled":
            return softplus(-_lse(self.logit_BL, self.candidate_BL))[:, None].expand_as(self.logit_BL)
        return torch.where(_best(self.logit_BL, self.candidate_BL), softplus(-self.logit_BL), 0.0)

    def entropy(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `entropy_B`, exact: the mass of the empty step goes to single positions."""
        z_BL, candidate_BL = self.logit_BL, self.candidate_BL
        each_BL = -torch.sigmoid(z_BL) * logsigmoid(z_BL) - torch.sigmoid(-z_BL) * logsigmoid(-z_BL)
        total_B = torch.where(candidate_BL, each_BL, 0.0).sum(dim=1)
        if self.fallback == "none":
            return total_B
        keep_B1 = torch.where(candidate_BL, logsigmoid(-z_BL), 0.0).sum(dim=1, keepdim=True)
        before_BL, after_BL = keep_B1 + z_BL, keep_B1 + z_BL + self._forced()
        moved_BL = before_BL.exp() * before_BL - after_BL.exp() * after_BL
        empty_B = (keep_B1.exp() * keep_B1).squeeze(1)
        return total_B + empty_B + torch.where(candidate_BL, moved_BL, 0.0).sum(dim=1)


@dataclass(frozen=True)
class PlackettLuce:
    """Positions one after the other from softmax(logit) of those left; from the second on a stop of logit 0 competes.

    Never empty. The probability is that of the ordered draw.
    """

    logit_BL: Tensor
    candidate_BL: Tensor

    @property
    def chance_BL(self) -> Tensor:
        """log sigmoid(logit): the chance against the stop alone."""
        return logsigmoid(self.logit_BL)

    @property
    def may_be_empty(self) -> bool:
        """Never."""
        return False

    def sample(self, noise: Noise) -> Draw:
        """Return a draw; the first position has noise of its own, since the stop does not compete with it."""
        first_BL = _best(_gumbel(self.logit_BL, noise.unit_BL), self.candidate_BL)
        key_BL = _gumbel(self.logit_BL, noise.order_BL)
        stop_B1 = _gumbel(torch.zeros_like(noise.row_B), noise.row_B)[:, None]
        chosen_BL = (first_BL | (key_BL > stop_B1)) & self.candidate_BL
        return Draw(chosen_BL, torch.where(first_BL, torch.finfo(key_BL.dtype).max, key_BL))

    def mode(self) -> Draw:
        """Return every candidate above the stop, the best in any case."""
        above_BL = (self.logit_BL > 0) & self.candidate_BL
        return Draw(above_BL | _best(self.logit_BL, self.candidate_BL), self.logit_BL)

    def log_prob(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `logprob_B` of the ordered draw."""
        weight_BL, left_BL, place_BL, count_B1 = self._ordered(chosen_BL, rank_BL)
        stop_BL = torch.logaddexp(left_BL, torch.zeros_like(left_BL))
        below_BL = torch.where(place_BL == 0, left_BL, stop_BL)
        drawn_B = torch.where(place_BL < count_B1, weight_BL - below_BL, 0.0).sum(dim=1)
        stopped_B = torch.where(place_BL == count_B1, stop_BL, 0.0).sum(dim=1)
        some_B = self.candidate_BL.any(dim=1)
        return torch.where(some_B, torch.where(count_B1.squeeze(1) > 0, drawn_B - stopped_B, FAR), 0.0)

    def entropy(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return the sum of the conditional entropies along the draw `[B]`."""
        weight_BL, left_BL, place_BL, count_B1 = self._ordered(chosen_BL, rank_BL)
        stop_BL = torch.logaddexp(left_BL, torch.zeros_like(left_BL))
        below_BL = torch.where(place_BL == 0, left_BL, stop_BL)
        step_BL = _softmax_entropy(weight_BL, left_BL, below_BL)
        some_B1 = self.candidate_BL.any(dim=1, keepdim=True)
        return torch.where((place_BL <= count_B1) & some_B1, step_BL, 0.0).sum(dim=1)

    def _ordered(self, chosen_BL: Tensor, rank_BL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight_BL, left_BL = _in_order(self.logit_BL, self.candidate_BL, chosen_BL, rank_BL)
        # One place more, where nothing is left: a row that chose everything stops there.
        weight_BL, left_BL = (pad(value, (0, 1), value=FAR) for value in (weight_BL, left_BL))
        place_BL = torch.arange(weight_BL.shape[1], device=weight_BL.device).expand_as(weight_BL)
        return weight_BL, left_BL, place_BL, chosen_BL.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Count:
    """First how many, K from `counts` by softmax(`count_logit_BC`), then K positions as Plackett-Luce draws them.

    Counts above the number of candidates have probability 0; the smallest of `counts` must be 1.
    """

    logit_BL: Tensor
    candidate_BL: Tensor
    count_logit_BC: Tensor
    counts: tuple[int, ...]

    @property
    def chance_BL(self) -> Tensor:
        """log softmax(logit)."""
        return self.logit_BL - _lse(self.logit_BL, self.candidate_BL)[:, None]

    @property
    def may_be_empty(self) -> bool:
        """Never."""
        return False

    def sample(self, noise: Noise) -> Draw:
        """Return a draw."""
        reach_BC = self._count_logprob().exp().double().cumsum(dim=1)
        index_B = (reach_BC < noise.row_B[:, None] * reach_BC[:, -1:]).sum(dim=1)
        return self._first(index_B, _gumbel(self.logit_BL, noise.order_BL))

    def mode(self) -> Draw:
        """Return the likeliest number of the best positions."""
        return self._first(self._count_logprob().argmax(dim=1), self.logit_BL)

    def _first(self, index_B: Tensor, key_BL: Tensor) -> Draw:
        number_B = self._table()[index_B.clamp(max=len(self.counts) - 1)]
        masked_BL = torch.where(self.candidate_BL, key_BL, -torch.inf)
        order_BL = masked_BL.argsort(dim=1, descending=True, stable=True)
        place_L = torch.arange(masked_BL.shape[1], device=masked_BL.device).expand_as(order_BL)
        place_BL = torch.empty_like(order_BL).scatter_(1, order_BL, place_L)
        return Draw((place_BL < number_B[:, None]) & self.candidate_BL, key_BL)

    def _table(self) -> Tensor:
        return torch.tensor(self.counts, device=self.logit_BL.device)

    def _count_logprob(self) -> Tensor:
        """Return log P(K) `[B, C]`, `FAR` where K exceeds the candidates."""
        possible_BC = self._table() <= self.candidate_BL.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.log_softmax(self.count_logit_BC.masked_fill(~possible_BC, FAR), dim=1)

    def log_prob(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `logprob_B` of the number and of the ordered draw; `FAR` for a number that is none of `counts`."""
        weight_BL, left_BL = _in_order(self.logit_BL, self.candidate_BL, chosen_BL, rank_BL)
        number_B1 = chosen_BL.sum(dim=1, keepdim=True)
        drawn_BL = torch.arange(weight_BL.shape[1], device=weight_BL.device) < number_B1
        order_B = torch.where(drawn_BL, weight_BL - left_BL, 0.0).sum(dim=1)
        which_BC = number_B1 == self._table()
        count_B = torch.where(which_BC, self._count_logprob(), 0.0).sum(dim=1)
        count_B = torch.where(which_BC.any(dim=1), count_B, FAR)
        return torch.where(self.candidate_BL.any(dim=1), count_B + order_B, 0.0)

    def entropy(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return the entropy of the number and the conditional entropies along the draw `[B]`."""
        weight_BL, left_BL = _in_order(self.logit_BL, self.candidate_BL, chosen_BL, rank_BL)
        drawn_BL = torch.arange(weight_BL.shape[1], device=weight_BL.device) < chosen_BL.sum(dim=1, keepdim=True)
        order_B = torch.where(drawn_BL, _softmax_entropy(weight_BL, left_BL, left_BL), 0.0).sum(dim=1)
        logprob_BC = self._count_logprob()
        count_B = -(logprob_BC.exp() * logprob_BC).sum(dim=1)
        return torch.where(self.candidate_BL.any(dim=1), count_B + order_B, 0.0)


@dataclass(frozen=True)
class Categorical:
    """One position a step, from softmax(logit) over the candidates (UPO, arXiv 2510.05725)."""

    logit_BL: Tensor
    candidate_BL: Tensor

    @property
    def chance_BL(self) -> Tensor:
        """log softmax(logit)."""
        return self.logit_BL - _lse(self.logit_BL, self.candidate_BL)[:, None]

    @property
    def may_be_empty(self) -> bool:
        """Never."""
        return False

    def sample(self, noise: Noise) -> Draw:
        """Return a draw."""
        return Draw(_best(_gumbel(self.logit_BL, noise.order_BL), self.candidate_BL), self.logit_BL)

    def mode(self) -> Draw:
        """Return the likeliest position."""
        return Draw(_best(self.logit_BL, self.candidate_BL), self.logit_BL)

    def log_prob(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `logprob_B`; `FAR` unless exactly one position is chosen."""
        value_B = torch.where(chosen_BL, self.chance_BL, 0.0).sum(dim=1)
        value_B = torch.where(chosen_BL.sum(dim=1) == 1, value_B, FAR)
        return torch.where(self.candidate_BL.any(dim=1), value_B, 0.0)

    def entropy(self, chosen_BL: Tensor, rank_BL: Tensor) -> Tensor:
        """Return `entropy_B`, exact."""
        chance_BL = self.chance_BL
        return -torch.where(self.candidate_BL, chance_BL.exp() * chance_BL, 0.0).sum(dim=1)


def _gumbel(logit: Tensor, uniform: Tensor) -> Tensor:
    """Return fp64 logits with Gumbel noise: the place of the maximum is a draw from their softmax."""
    return logit.double() - torch.log(-torch.log(uniform))


def _best(key_BL: Tensor, candidate_BL: Tensor) -> Tensor:
    """Return the one candidate with the highest key; none where there is no candidate."""
    floor = torch.finfo(key_BL.dtype).min
    masked_BL = torch.where(candidate_BL, key_BL.clamp(min=floor), -torch.inf)
    place_L = torch.arange(key_BL.shape[1], device=key_BL.device)
    return (place_L == masked_BL.argmax(dim=1, keepdim=True)) & candidate_BL


def _lse(logit_BL: Tensor, candidate_BL: Tensor) -> Tensor:
    # A row without candidates gets a constant: its outcome is certain, and exp(-FAR) is no number.
    none_B1 = ~candidate_BL.any(dim=1, keepdim=True)
    return logit_BL.masked_fill(~candidate_BL, FAR).masked_fill(none_B1, 0.0).logsumexp(dim=1)


def _in_order(logit_BL: Tensor, candidate_BL: Tensor, chosen_BL: Tensor, rank_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits in the order of the draw, what was not drawn last, and the LSE of each with all that follow."""
    weight_BL = logit_BL.clamp(min=FAR).masked_fill(~candidate_BL, FAR)
    order_BL = torch.where(chosen_BL, rank_BL, logit_BL.shape[1]).argsort(dim=1, stable=True)
    weight_BL = weight_BL.gather(1, order_BL)
    return weight_BL, weight_BL.flip(1).logcumsumexp(dim=1).flip(1)


def _softmax_entropy(weight_BL: Tensor, left_BL: Tensor, lse_BL: Tensor) -> Tensor:
    """Return at every place the entropy of a softmax over it and all that follow, of normaliser `lse_BL`.

    `left_BL` is the LSE of the weights alone; what the normaliser has besides is a stop of logit 0.
    """
    # E[w] = c P(no stop) - E[c - w]; with c above all weights the second sum has positive terms, and is a suffix LSE.
    above_B1 = weight_BL.amax(dim=1, keepdim=True) + 1
    gap_BL = (weight_BL + (above_B1 - weight_BL).log()).flip(1).logcumsumexp(dim=1).flip(1)
    return lse_BL - above_B1 * (left_BL - lse_BL).exp() + (gap_BL - lse_BL).exp()
