"""pass@k, majority@k, standard errors and intervals against computations that share nothing with ours."""

from __future__ import annotations

import itertools
import math
import statistics
from fractions import Fraction

import numpy
import pytest
import torch

from unmask.recipes.registry import RecipeError
from unmask.rl.intervals import estimate, majority, paired_interval, pass_at_k


@pytest.mark.parametrize("drawn", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_all_subsets(drawn: int) -> None:
    for right, k in itertools.product(range(drawn + 1), range(1, drawn + 1)):
        subsets = list(itertools.combinations([True] * right + [False] * (drawn - right), k))
        assert pass_at_k(right, drawn, k) == pytest.approx(float(Fraction(sum(map(any, subsets)), len(subsets))))


def test_pass_at_k_is_unbiased() -> None:
    # Sums over what k' of 6 completions can be right at chance 0.3 each: the mean is 1 - 0.7^k exactly.
    p, drawn = 0.3, 6
    for k in range(1, drawn + 1):
        chance = [math.comb(drawn, c) * p**c * (1 - p) ** (drawn - c) for c in range(drawn + 1)]
        mean = sum(chance[c] * pass_at_k(c, drawn, k) for c in range(drawn + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    with pytest.raises(RecipeError, match="1 <= k <= drawn"):
        pass_at_k(1, 4, 5)


def test_large_counts_stay_exact() -> None:
    assert pass_at_k(1, 1000, 10) == pytest.approx(0.01) and pass_at_k(0, 1000, 10) == 0.0
    assert pass_at_k(991, 1000, 10) == 1.0


def test_majority() -> None:
    assert majority(["4", "4", "5"], [True, True, False]) == 1.0
    assert majority(["4", "5", "5"], [True, False, False]) == 0.0
    # Two answers share the most votes: one of them, drawn fairly, is right half of the time.
    assert majority(["4", "5", "6", "4", "5"], [True, False, False, True, False]) == 0.5
    # What has no answer does not vote, not even as the most frequent.
    assert majority([None, None, "7"], [False, False, True]) == 1.0
    assert majority([None, None], [False, False]) == 0.0


def test_estimate_is_that_of_the_standard_library() -> None:
    values = [0.25, 1.0, 0.5, 0.0, 0.75, 0.75]
    found = estimate(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    assert estimate([0.5]) == (0.5, None)


def independent_interval(difference: list[float], step: float, resamples: int) -> tuple[float, float]:
    rng = numpy.random.default_rng(11)
    values = numpy.array([*difference, step, -step])
    counts = rng.multinomial(len(values), [1 / len(values)] * len(values), size=resamples)
    low, high = numpy.percentile(counts @ values / len(values), [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("samples", [1, 4])
def test_interval_is_that_of_an_independent_bootstrap(samples: int) -> None:
    rng = torch.Generator().manual_seed(5)
    a, b = (torch.rand(80, samples, generator=rng) < p for p in (0.4, 0.55))
    difference_P = (b.double() - a.double()).mean(dim=1)
    found = paired_interval(difference_P, samples=samples, resamples=40_000)
    low, high = independent_interval(difference_P.tolist(), 1 / samples, 40_000)
    # The ends of 40,000 resamples have a standard error of about 1 % of the width.
    assert found.low == pytest.approx(low, abs=0.05 * (high - low))
    assert found.high == pytest.approx(high, abs=0.05 * (high - low))
    assert found.difference == pytest.approx(difference_P.mean().item())
    # The bootstrap's own theory, for differences as tame as these: 1.96 standard deviations of the mean on each side.
    values = torch.cat([difference_P, torch.tensor([1.0, -1.0], dtype=torch.float64) / samples])
    width = 2 * 1.96 * values.std(correction=0).item() / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(width, rel=0.05)


def test_verdicts() -> None:
    def verdict(ups: int, downs: int, ties: int) -> str:
        return paired_interval(torch.tensor([1.0] * ups + [-1.0] * downs + [0.0] * ties)).verdict

    assert verdict(40, 5, 100) == "better" and verdict(5, 40, 100) == "worse"
    assert verdict(10, 9, 100) == "no difference shown"
    # All problems alike, and a few that all say the same: an interval without width would be surer than the data.
    assert verdict(0, 0, 50) == verdict(2, 0, 50) == verdict(3, 0, 0) == "no difference shown"


def test_interval_is_a_function_of_its_arguments() -> None:
    difference_P = torch.linspace(-0.7, 1.0, 23) ** 3
    assert paired_interval(difference_P) == paired_interval(difference_P)
    assert paired_interval(difference_P).low != paired_interval(difference_P, seed=1).low
    wide, narrow = (paired_interval(difference_P, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high
    for values, level in ((torch.zeros(0), 0.95), (torch.zeros(3), 1.0)):
        with pytest.raises(RecipeError, match="pass one a problem"):
            paired_interval(values, level=level)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "samples", "rates"), [(50, 1, (0.5, 0.6)), (200, 1, (0.9, 0.93)), (50, 8, (0.05, 0.1)), (200, 4, (0.3, 0.3))]
)
def test_coverage(n: int, samples: int, rates: tuple[float, float]) -> None:
    """95 % intervals hold the truth in 93 to 97 % of simulated comparisons of two policies on the same problems."""
    rng = torch.Generator().manual_seed(n + samples)

    def chances(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        hardness = torch.randn(count, generator=rng, dtype=torch.float64)
        one, other = (torch.sigmoid(1.3 * math.log(p / (1 - p)) + hardness) for p in rates)
        return one, other

    one, other = chances(4_000_000)
    truth, hits, repeats = (other - one).mean().item(), 0, 3000
    for repeat in range(repeats):
        shares = [
            (torch.rand(n, samples, generator=rng, dtype=torch.float64) < p[:, None]).double().mean(dim=1)
            for p in chances(n)
        ]
        found = paired_interval(shares[1] - shares[0], samples=samples, resamples=1000, seed=repeat)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / repeats <= 0.97, hits / repeats
