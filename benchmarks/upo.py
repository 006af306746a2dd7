"""UPO on 4x4 sudoku with the shipped model: learned orders of one position a step against max-confidence and random.

python benchmarks/upo.py [--seeds 3] [--steps 60] [--problems 256] [--folder DIR] [--json FILE] [KEY.PATH=VALUE ...]

The recipe `upo_sudoku` with batches of 64 rollouts, a planner a seed, the denoiser frozen, on a canvas that the answers
fill and on a longer one. All orders decode the same held-out problems greedily, one position a step; a planner nearly
always takes its likeliest one (logits divided by 0.05). Runs that `--folder` holds are not trained again, and what the
result file holds of a canvas is not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, by_folder, held, mean_and_error, paired_gain, save, trained

from unmask.rl.bench_policies import Grid, bench_policies

RECIPE = "upo_sudoku"
COMMON = ["rollout.prompts=8", "objective.inner_steps=2", "optim.lr=1.0e-3", "optim.schedule=cosine"]
COMMON += ["evaluation.problems=8"]
# Canvases, and words of theirs: answers have 42 tokens, the end of the text included.
CANVASES: dict[int, list[str]] = {44: [], 64: ["planner.expert={levels: [1.0], warmup: 4}"]}


def curve(run: Path) -> list[float]:
    """Return the share of right rollouts of each batch."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [record["outcome/ok"] for record in records if "rollout/nfe" in record]


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of the planners over seeds, and by how much it is above each fixed order on the same problems."""
    planners = [row for row in rows if row["kind"].startswith("planner")]
    found: dict[str, Any] = {"planners": mean_and_error([row["exact"] for row in planners])}
    for row in rows:
        if not row["kind"].startswith("planner") and row["knob"] == 1:
            found[row["kind"]] = {"exact": row["exact"], "gain": paired_gain(planners, row)}
    return found


def measured(canvas: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the planners of a canvas and return what all orders solve there."""
    words = [f"rollout.canvas={canvas}", *arguments.overrides]
    knobs = [*COMMON, *CANVASES[canvas], *words, f"optim.steps={arguments.steps}"]
    runs = [
        trained(arguments.folder, RECIPE, f"canvas_{canvas}_{seed}", f"run.seed={seed}", *knobs)
        for seed in range(arguments.seeds)
    ]
    grid = Grid(
        blocks=(canvas,),
        levels=(),
        per_step=(1,),
        factors=(),
        nats=(),
        random=(1,),
        planners=tuple(str(run) for run in runs),
        alphas=(0.0,),
        temperature=0.05,
    )
    found = bench_policies(RECIPE, grid, problems=arguments.problems, overrides=words, progress=print)
    rows = by_folder(found["rows"])
    about = {name: found[name] for name in ("task", "n", "temperature")} | {"steps": arguments.steps, "words": knobs}
    return {**about, "rows": rows, "compared": compared(rows), "curves": [curve(run) for run in runs]}


def main() -> None:
    """Train what is missing, decode, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--folder", type=Path, default=Path("runs/upo_sudoku_seeds"))
    parser.add_argument("--json", type=Path, default=RESULTS / "upo.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    result = held(arguments.json)
    for canvas in CANVASES:
        if str(canvas) not in result:
            result[str(canvas)] = measured(canvas, arguments)
            save("upo", result, arguments.json, seeds={"first": 0, "count": arguments.seeds})
        own = result[str(canvas)]["compared"]["planners"]
        print(f"canvas {canvas}, learned orders: {own['mean']:.3f} ± {own['stderr']:.3f} (n={own['n']} seeds)")
        for kind in ("top", "random"):
            row = result[str(canvas)]["compared"][kind]
            gain = row["gain"]
            print(f"against {kind} {row['exact']:.3f}: {gain['mean']:+.3f} ± {gain['stderr']:.3f}, in pairs")


if __name__ == "__main__":
    main()
