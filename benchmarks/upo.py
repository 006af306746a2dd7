"""UPO on 4x4 sudoku with the shipped model: learned orders of one position a step against max-confidence and random.

python benchmarks/upo.py [--seeds 3] [--steps 60] [--problems 512] [--folder DIR] [--json FILE] [KEY.PATH=VALUE ...]

The recipe `upo_sudoku` with batches of 64 rollouts, a planner a seed, the denoiser frozen. All orders decode the same
held-out problems greedily, one position a step; a planner nearly always takes its likeliest one (logits divided by
0.05). Runs that `--folder` holds are not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from common import RESULTS, by_folder, mean_and_error, save, trained

from unmask.rl.bench_policies import Grid, bench_policies

RECIPE, CANVAS = "upo_sudoku", 44
COMMON = [f"rollout.canvas={CANVAS}", "rollout.prompts=8", "objective.inner_steps=2", "optim.lr=1.0e-3"]
COMMON += ["optim.schedule=cosine", "evaluation.problems=8"]


def curve(run: Path) -> list[float]:
    """Return the share of right rollouts of each batch."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [record["outcome/ok"] for record in records if "rollout/nfe" in record]


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the planners over seeds, and its distance from each fixed order in standard errors."""
    planners = [row for row in rows if row["kind"].startswith("planner")]
    mean = sum(row["exact"] for row in planners) / len(planners)
    # The problems are the same for all seeds: their error is that of one rate, beside the spread over seeds.
    error = math.hypot(planners[0]["stderr"], mean_and_error([row["exact"] for row in planners])["stderr"])
    found: dict[str, Any] = {"planners": {"exact": mean, "stderr": error, "seeds": len(planners)}}
    for row in rows:
        if not row["kind"].startswith("planner") and row["knob"] == 1:
            gain, of_gain = mean - row["exact"], math.hypot(error, row["stderr"])
            found[row["kind"]] = {"exact": row["exact"], "gain": gain, "stderr": of_gain, "errors": gain / of_gain}
    return found


def main() -> None:
    """Train what is missing, decode, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/upo_sudoku_seeds"))
    parser.add_argument("--json", type=Path, default=RESULTS / "upo.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    words = [*COMMON, f"optim.steps={arguments.steps}", *arguments.overrides]
    runs = [
        trained(arguments.folder, RECIPE, f"seed_{seed}", f"run.seed={seed}", *words) for seed in range(arguments.seeds)
    ]
    grid = Grid(
        blocks=(CANVAS,),
        levels=(),
        per_step=(1,),
        factors=(),
        nats=(),
        random=(1,),
        planners=tuple(str(run) for run in runs),
        alphas=(0.0,),
        temperature=0.05,
    )
    overrides = [f"rollout.canvas={CANVAS}", *arguments.overrides]
    found = bench_policies(RECIPE, grid, problems=arguments.problems, overrides=overrides, progress=print)
    rows = by_folder(found["rows"])
    result = {
        **{name: found[name] for name in ("task", "canvas", "n", "temperature")},
        "steps": arguments.steps,
        "common": COMMON + arguments.overrides,
        "rows": rows,
        "compared": compared(rows),
        "curves": [curve(run) for run in runs],
    }
    for kind, row in result["compared"].items():
        if kind == "planners":
            print(f"learned orders: {row['exact']:.3f} ± {row['stderr']:.3f} ({row['seeds']} seeds)")
        else:
            print(f"against {kind} {row['exact']:.3f}: {row['gain']:+.3f} ± {row['stderr']:.3f}")
    print(f"wrote {save('upo', result, arguments.json, seeds={'first': 0, 'count': arguments.seeds})}")


if __name__ == "__main__":
    main()
