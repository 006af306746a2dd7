"""What taking tokens back is worth: the exchangeable problem of policy_toys.py with early tokens that are often wrong.

python benchmarks/policy_remasking.py [--seeds 3] [--json FILE]

A token decided when n of 8 stand is right with probability 1 - 0.3 (1 - n/8)^2; once it stands, the denoiser gives it
the same probability as before, so that a wrong one is told from a right one. Dynamic programming gives the best value
of all policies that only open, and of all that may take back besides.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import save
from policy_toys import Exchangeable, measure, planning_of, train

from unmask.policies.planner import PlannerSpec

WRONG_AT_FIRST = 0.3


def regret(seed: int, *, distribution: str = "remasking", alpha: float = 0.3, batches: int = 80) -> dict[str, Any]:
    """Train one policy; compare it with the best of those that only open, and of those that may take tokens back."""
    toy, kind = Exchangeable(WRONG_AT_FIRST), dict[str, Any](distribution=distribution)
    features: tuple[str, ...] = ("masked", "time", "left", "candidate")
    if distribution == "remasking":
        features, kind["back_bias"] = (*features, "standing", "current"), -4.0
    spec = PlannerSpec(features=features, network="linear", **kind)
    planning = planning_of(spec, seed, group=16, alpha=(alpha, alpha))
    train(toy, planning, batches=batches, prompts=16, lr=0.05, temperature=1.0)
    found = measure(toy, planning.planner, alpha, temperature=1.0, sharp=0.5)
    best = {"best_opening": toy.best(alpha), "best_with_remasking": toy.best(alpha, spec.budget)}
    return {"seed": seed, "distribution": distribution, "alpha": alpha, **found, **best}


def main() -> None:
    """Train both kinds with every seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    for seed in range(arguments.seeds):
        for distribution in ("remasking", "bernoulli"):
            rows.append(regret(seed, distribution=distribution))
            print(rows[-1], flush=True)
    seeds = {"training": list(range(arguments.seeds)), "evaluation": 99}
    print(f"wrote {save('policy_remasking', {'rows': rows}, arguments.json, seeds=seeds)}")


if __name__ == "__main__":
    main()
