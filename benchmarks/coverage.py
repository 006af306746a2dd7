"""How often a 95 % interval of a paired difference holds the truth: ours, and the bootstrap without its two pairs.

Two policies answer the same simulated problems; a problem's hardness is shared, so their results are correlated.

python benchmarks/coverage.py [--repeats 2000] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import save
from torch import Tensor

from unmask.rl.intervals import paired_interval
from unmask.rollouts.noise import generator

RATES = ((0.5, 0.6), (0.9, 0.93), (0.05, 0.1), (0.97, 0.98))
RESAMPLES = 1000


def chances(rates: tuple[float, float], count: int, rng: torch.Generator) -> list[Tensor]:
    """Return each policy's chances of solving `count` problems of random hardness."""
    hardness = torch.randn(count, generator=rng, dtype=torch.float64)
    return [torch.sigmoid(1.3 * math.log(p / (1 - p)) + hardness) for p in rates]


def plain(difference_P: Tensor, rng: torch.Generator) -> tuple[float, float]:
    """Return the percentile bootstrap over the problems alone."""
    n = len(difference_P)
    means = difference_P[torch.randint(n, (RESAMPLES, n), generator=rng)].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def measure(n: int, samples: int, rates: tuple[float, float], repeats: int) -> dict[str, Any]:
    """Return the coverage of both intervals in one setting."""
    rng = generator(0, "coverage", n, samples)
    one, other = chances(rates, 4_000_000, rng)
    truth, hits, bare = (other - one).mean().item(), 0, 0
    for repeat in range(repeats):
        drawn = [
            (torch.rand(n, samples, generator=rng, dtype=torch.float64) < p[:, None]).double().mean(dim=1)
            for p in chances(rates, n, rng)
        ]
        found = paired_interval(drawn[1] - drawn[0], samples=samples, resamples=RESAMPLES, seed=repeat)
        hits += found.low <= truth <= found.high
        low, high = plain(drawn[1] - drawn[0], rng)
        bare += low <= truth <= high
    error = math.sqrt(0.95 * 0.05 / repeats)
    setting = {"n": n, "samples": samples, "rates": rates, "truth": truth}
    return {**setting, "coverage": hits / repeats, "without_pairs": bare / repeats, "stderr_at_95": error}


def main() -> None:
    """Measure all settings and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    settings = [(n, samples, rates) for rates in RATES for n in (50, 200) for samples in (1, 8)]
    rows = []
    print("| rates | problems | samples | coverage | without the two pairs |\n|---|---|---|---|---|")
    for n, samples, rates in settings:
        rows.append(row := measure(n, samples, rates, arguments.repeats))
        numbers = f"{100 * row['coverage']:.1f} % | {100 * row['without_pairs']:.1f} %"
        print(f"| {rates[0]}, {rates[1]} | {n} | {samples} | {numbers} |", flush=True)
    facts = {"repeats": arguments.repeats, "resamples": RESAMPLES, "rows": rows}
    print(f"wrote {save('coverage', facts, arguments.json, seeds={'simulation': 0}, dtype='float64')}")


if __name__ == "__main__":
    main()
