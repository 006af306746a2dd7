"""Methods side by side on the shipped model: held-out exact rate after equally many updates, and their forwards.

python benchmarks/learning.py [--methods NAME ...] [--seeds 3] [--steps 24] [--json FILE] [--plot FILE.png]

Every method gets the same task, sampler, batches, optimizer and learning rate, and about three canvases a rollout and
update where its estimator has a number to set (some 24 calls make a rollout); none was tuned. Finished runs are read
from the result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, mean_and_error, save

BUDGET: dict[str, str] = {
    "cj_grpo": "{name: trace, steps: uniform_k, k: 3}",
    "mdpo": "{name: drafts, steps: top_k, k: 3, within: window}",
    "tracerl": "{name: trace, steps: all, merge: 8, tokens: until_eos}",
    "diffu_grpo": "{name: fully_masked, prompt_drop: 0.15}",
    "wd1": "{name: fully_masked, prompt_drop: 0.15}",
    "unigrpo": "{name: random_mask, draws: 3, draw: ladder, start: 0.1}",
    "coupled_grpo": "{name: coupled}",
    "spg": "{name: blockwise, size: 16, draws: 3, drop: 0.15}",
    "espo": "{name: antithetic, draws: 2}",
    "bgpo": "{name: random_mask, draws: 3}",
    "gdpo": "{name: quadrature, nodes: 3}",
}
COMMON = ["rollout.prompts=8", "rollout.group=8", "evaluation.problems=256", "run.log_rollouts_every=0"]


def run(method: str, seed: int, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Train once in a process of its own and return what the summary and the metrics say."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "summary.json"
        objective = f"objective={{inner_steps: 2, beta: 0.0, estimator: {BUDGET[method]}}}"
        command = [sys.executable, "-m", "unmask.rl.cli", "train", "quickstart", f"method={method}", objective]
        command += [f"run.seed={seed}", f"optim.steps={steps}", f"run.directory={folder}", *COMMON, *overrides]
        subprocess.run([*command, "--json", str(output)], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads(output.read_text())
        records = [json.loads(line) for line in (Path(folder) / "quickstart" / "metrics.jsonl").open()]
    nfe = [record["rollout/nfe"] for record in records if "rollout/nfe" in record]
    scored = [record["train/views"] for record in records if "train/views" in record]
    return {
        "method": method,
        "seed": seed,
        "steps": steps,
        "before": summary["before"]["exact"],
        "after": summary["after"]["exact"],
        "n": summary["n"],
        "reward": [record["reward/total"] for record in records if "reward/total" in record],
        # Rows of forwards: rollouts are drawn once a batch, views scored with a gradient in each update.
        "rollout_rows": sum(nfe) * 64,
        "scored_rows": sum(scored),
        "calls_a_rollout": sum(nfe) / len(nfe),
        "wall_s": summary["wall_s"],
    }


def table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and standard errors over seeds, a row a method."""
    rows = {}
    for method in dict.fromkeys(entry["method"] for entry in runs):
        own = [entry for entry in runs if entry["method"] == method]
        gains = [entry["after"] - entry["before"] for entry in own]
        rows[method] = {
            "before": mean_and_error([entry["before"] for entry in own]),
            "after": mean_and_error([entry["after"] for entry in own]),
            "gain": mean_and_error(gains),
            "scored_rows": mean_and_error([entry["scored_rows"] for entry in own])["mean"],
            "rollout_rows": mean_and_error([entry["rollout_rows"] for entry in own])["mean"],
        }
    return rows


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean reward of a batch against updates, a line a method, and the held-out gain as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = table(runs)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for method in rows:
        curves = [entry["reward"] for entry in runs if entry["method"] == method]
        left.plot(
            [2 * i for i in range(len(curves[0]))], [sum(c) / len(c) for c in zip(*curves, strict=True)], label=method
        )
    left.set(xlabel="updates", ylabel="mean reward of a batch")
    left.legend(fontsize=8)
    names = sorted(rows, key=lambda name: rows[name]["gain"]["mean"])
    right.barh(names, [rows[n]["gain"]["mean"] for n in names], xerr=[rows[n]["gain"]["stderr"] for n in names])
    right.set(xlabel="gain of the held-out exact rate (standard error over seeds)")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run what is missing, print the table, write results and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(BUDGET), choices=list(BUDGET))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--json", type=Path, default=RESULTS / "learning.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "learning.png")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if arguments.json.is_file():
        runs = json.loads(arguments.json.read_text())["result"]["runs"]
    for seed in range(arguments.seeds):
        for method in arguments.methods:
            if any(
                (entry["method"], entry["seed"], entry["steps"]) == (method, seed, arguments.steps) for entry in runs
            ):
                continue
            runs.append(run(method, seed, arguments.steps, arguments.overrides))
            last = runs[-1]
            print(
                f"{method} seed {seed}: {last['before']:.3f} -> {last['after']:.3f} in {last['wall_s']:.0f} s",
                flush=True,
            )
            result = {"runs": runs, "rows": table(runs), "common": COMMON, "estimators": BUDGET}
            save("learning", result, arguments.json, seeds={"first": 0, "count": arguments.seeds})
    for method, row in table(runs).items():
        gain = row["gain"]
        words = f"gain {gain['mean']:+.3f} ± {gain['stderr']:.3f} (n={gain['n']} seeds)"
        print(f"{method:14} {row['after']['mean']:.3f}  {words}")
    draw(runs, arguments.plot)
    print(f"wrote {arguments.json} and {arguments.plot}")


if __name__ == "__main__":
    main()
