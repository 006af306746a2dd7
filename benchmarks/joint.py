"""Planner alone, denoiser alone and both in one run on the shipped model: held-out exact rate against denoiser calls.

python benchmarks/joint.py [--arms NAME ...] [--seeds 3] [--steps 60] [--problems 256] [--json FILE]

Each arm is `joint_tiny` with what it does not train left out: the same batches, updates and full diffusion. The
denoiser alone rolls out by a confidence threshold of 0.9, and of 0.3; a planner alone sees the likeliest tokens, as its
own recipe has it. Every arm is decoded greedily on the same held-out problems, planners at several trade-offs, the
denoiser at several thresholds. Finished runs are read from the result file, so that an interrupted benchmark goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import mean_and_error, save, side_by_side, side_by_side_arguments, unmask

from unmask.rl.bench_policies import Grid, bench_policies

RECIPE, CANVAS = "joint_tiny", 64
ALPHAS, LEVELS = (0.3, 1.0, 3.0), (0.3, 0.5, 0.9)
COMMON = ["rollout.prompts=8", "evaluation.problems=16"]
ALONE = ["planner=null", "objective.actions=[tokens]", "evaluation.sampler=null"]


def threshold(level: float) -> str:
    """Return the word that rolls out by a threshold."""
    selection = f"{{name: threshold, level: {level}}}"
    return f"rollout.sampler={{schedule: {{name: whole, per_step: 1}}, score: confidence, selection: {selection}}}"


ARMS: dict[str, list[str]] = {
    "planner": [
        *("method=unmask_policy", "model.lora=null", "rollout.temperature=0.0"),
        *("planner.lr=null", "optim.lr=1.0e-3"),
    ],
    "denoiser": [*ALONE, threshold(0.9)],
    "denoiser_low": [*ALONE, threshold(0.3)],
    "joint": [],
}


def run(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once in a process of its own and return what the metrics say, and how the result decodes."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*COMMON, *arguments.overrides, *ARMS[arm], f"run.seed={seed}", f"optim.steps={arguments.steps}"]
        words += [f"run.directory={folder}"]
        wall_s = unmask(Path(folder), "train", RECIPE, *words)["wall_s"]
        trained = Path(folder) / RECIPE
        records = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
        rows = decoded(arm, str(trained), arguments.problems)
    batches = [record for record in records if "rollout/nfe" in record]
    return {
        "arm": arm,
        "seed": seed,
        "steps": arguments.steps,
        "rows": rows,
        "reward": [record["reward/total"] for record in batches],
        "nfe": [record["rollout/nfe"] for record in batches],
        "wall_s": wall_s,
    }


def decoded(arm: str, trained: str, problems: int) -> list[dict[str, Any]]:
    """Return held-out rows of a run: of its planner where there is one, and of thresholds where the denoiser learned.

    All arms and seeds decode the same problems.
    """
    grid = Grid(
        blocks=() if arm == "planner" else (CANVAS,),
        levels=LEVELS,
        per_step=(),
        factors=(),
        nats=(),
        random=(),
        planners=() if arm.startswith("denoiser") else (trained,),
        alphas=ALPHAS,
    )
    found = bench_policies(trained, grid, problems=problems, overrides=["run.seed=0"])["rows"]
    kept = ("knob", "exact", "stderr", "nfe", "nfe_stderr", "reward")
    return [{"kind": row["kind"].split()[0], **{name: row[name] for name in kept}} for row in found]


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means and standard errors over seeds, a row for each arm and way to decode it."""
    cells: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for entry in runs:
        for row in entry["rows"]:
            cells.setdefault((entry["arm"], row["kind"], row["knob"]), []).append(row)
    return [
        {"arm": arm, "kind": kind, "knob": knob}
        | {name: mean_and_error([row[name] for row in own]) for name in ("exact", "nfe")}
        | {"reward": {a: mean_and_error([row["reward"][a] for row in own]) for a in own[0]["reward"]}}
        for (arm, kind, knob), own in cells.items()
    ]


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each trade-off the joint run's reward minus that of its better half, paired by seed.

    Each arm decodes at the knob, what its planner is told or its threshold, that earns most on the mean of its seeds.
    """
    found = []
    for alpha in ALPHAS:
        best: dict[str, tuple[float, dict[int, float]]] = {}
        for row in table(runs):
            if (row["arm"], row["kind"]) == ("joint", "threshold"):
                continue
            own = {entry["seed"]: _reward(entry, row, alpha) for entry in runs if entry["arm"] == row["arm"]}
            if row["arm"] not in best or sum(own.values()) > sum(best[row["arm"]][1].values()):
                best[row["arm"]] = row["knob"], own
        means = {arm: mean_and_error(list(own.values())) | {"knob": knob} for arm, (knob, own) in best.items()}
        halves = [arm for arm in best if arm != "joint"]
        if "joint" not in best or not halves:
            continue
        better = max(halves, key=lambda arm: means[arm]["mean"])
        joint, half = best["joint"][1], best[better][1]
        gain = mean_and_error([joint[seed] - half[seed] for seed in sorted(joint.keys() & half.keys())])
        found.append({"alpha": alpha, "better_half": better, "reward": means, "gain": gain})
    return found


def _reward(entry: dict[str, Any], like: dict[str, Any], alpha: float) -> float:
    (row,) = [row for row in entry["rows"] if (row["kind"], row["knob"]) == (like["kind"], like["knob"])]
    return row["reward"][f"{alpha:g}"]


def show(runs: list[dict[str, Any]]) -> None:
    """Print the table and the comparison."""
    print(f"{'arm':12} {'decoded by':12} {'knob':>5} {'exact':>15} {'NFE':>14}  reward at alpha {ALPHAS}")
    for row in table(runs):
        exact, nfe = (f"{row[k]['mean']:.3f} ± {row[k]['stderr']:.3f}" for k in ("exact", "nfe"))
        rewards = "  ".join(f"{row['reward'][f'{alpha:g}']['mean']:.3f}" for alpha in ALPHAS)
        print(f"{row['arm']:12} {row['kind']:12} {row['knob']:5g} {exact:>15} {nfe:>14}  {rewards}")
    for row in compared(runs):
        gain = row["gain"]
        means = ", ".join(f"{arm} {value['mean']:.3f}" for arm, value in row["reward"].items())
        print(
            f"alpha {row['alpha']:g}: joint - {row['better_half']} = {gain['mean']:+.3f} ± {gain['stderr']:.3f} "
            f"(n={gain['n']} seeds; {means})"
        )


def keep(runs: list[dict[str, Any]], base: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write what has been run so far."""
    result = {"runs": runs, "rows": table(runs), "compared": compared(runs), "problems": arguments.problems}
    result |= {"common": COMMON, "arms": ARMS, "overrides": arguments.overrides}
    save("joint", result, arguments.json, seeds={"first": arguments.first, "count": arguments.seeds})


def main() -> None:
    """Run what is missing, print the table, write the results."""
    arguments = side_by_side_arguments(__doc__, "joint", tuple(ARMS), called="arms", steps=60).parse_args()

    runs, base = side_by_side(arguments, key="arm", run=run, keep=keep)
    keep(runs, base, arguments)
    show(runs)
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
