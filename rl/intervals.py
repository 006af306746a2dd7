"""Numbers with their errors: pass@k, majority@k, standard errors, and intervals of paired differences."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recipes.registry import RecipeError
from ..rollouts.noise import generator

LEVEL = 0.95
RESAMPLES = 10_000
CHUNK = 4_000_000  # drawn indices held at a time


class Estimate(NamedTuple):
    """A mean and its standard error (None for a single value)."""

    mean: float
    stderr: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values and s / sqrt(n), s with n - 1 in its variance."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n))


def pass_at_k(right: int, drawn: int, k: int) -> float:
    """Return the chance that k of `drawn` completions, `right` of them right, hold a right one: without bias.

    1 - C(drawn - right, k) / C(drawn, k) (Chen et al. 2021, equation 1), in whole numbers until the last division.
    """
    if not 0 <= right <= drawn or not 1 <= k <= drawn:
        raise RecipeError(f"pass@k: k {k} and {right} right of {drawn} drawn do not fit; 1 <= k <= drawn is needed.")
    return 1.0 - math.comb(drawn - right, k) / math.comb(drawn, k)


def majority(answers: Sequence[str | None], right: Sequence[bool]) -> float:
    """Return whether the most frequent answer is right; among equally frequent ones, the share that is.

    Completions without an answer do not vote; without any vote it is 0. An answer counts as right in the share of its
    completions that were judged so (all or none, unless the judge looks at more than the answer).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    correct = Counter(answer for answer, good in zip(answers, right, strict=True) if good and answer is not None)
    return math.fsum(correct[answer] / votes[answer] for answer, count in votes.items() if count == most) / sum(
        count == most for count in votes.values()
    )


class Interval(NamedTuple):
    """A difference with the ends of its confidence interval."""

    difference: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval excludes zero, else `no difference shown`."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "no difference shown"


def paired_interval(
    difference_P: Tensor, *, samples: int = 1, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the mean of paired differences of rates, one a problem, and its bootstrap interval over problems.

    Percentile bootstrap (Efron and Tibshirani 1993, section 13.3) over the problems and two more whose differences are
    +1 and -1 over `samples`, the smallest step of a rate over that many completions: with few or no problems that
    differ, the resampled means alone would be surer than the data (Bonett and Price 2012 add the same two pairs). The
    difference itself is that of the problems alone.
    """
    if difference_P.ndim != 1 or not len(difference_P) or not 0 < level < 1:
        raise RecipeError(
            f"interval: {tuple(difference_P.shape)} differences at level {level} give none; pass one a problem and a "
            "level between 0 and 1."
        )
    values_P = difference_P.double()
    step = 1.0 / samples
    values_P = torch.cat([values_P, torch.tensor([step, -step], dtype=torch.float64)])
    count, rng = len(values_P), generator(seed, "bootstrap", 0)
    rows = max(1, CHUNK // count)
    means = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        means.append(values_P[torch.randint(count, (size, count), generator=rng)].mean(dim=1))
    tail = (1 - level) / 2
    low, high = torch.quantile(torch.cat(means), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(difference_P.double().mean().item(), low, high)
