"""Methods side by side on the shipped model: held-out exact rate after equally many updates, and their forwards.

python benchmarks/learning.py [--methods NAME ...] [--seeds 3] [--steps 16] [--json FILE] [--plot FILE.png]

Every method gets the same task, sampler, batches, optimizer and learning rate, and about three canvases a rollout and
update where its estimator has a number to set (some 24 calls make a rollout); none was tuned. Finished runs are read
from the result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, mean_and_error, save, side_by_side, side_by_side_arguments, unmask

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
}
COMMON = ["rollout.prompts=8", "rollout.group=8", "run.log_rollouts_every=0"]


def before(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the held-out result that every method of a seed starts from."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["quickstart", f"run.seed={seed}", *COMMON, *arguments.overrides, "--problems", str(arguments.problems)]
        return unmask(Path(folder), "evaluate", *words)


def run(method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once, evaluate, and return what results and metrics say."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [f"method={method}", f"objective={{inner_steps: 2, beta: 0.0, estimator: {BUDGET[method]}}}"]
        words += [
            f"run.seed={seed}",
            f"optim.steps={arguments.steps}",
            f"run.directory={folder}",
            *COMMON,
            *arguments.overrides,
        ]
        # The run's own two evaluations are kept small: one of the trained model follows, one of the base is shared.
        summary = unmask(folder, "train", "quickstart", *words, "evaluation.problems=8")
        after = unmask(folder, "evaluate", str(folder / "quickstart"), "--problems", str(arguments.problems))
        records = [json.loads(line) for line in (folder / "quickstart" / "metrics.jsonl").open()]
    nfe = [record["rollout/nfe"] for record in records if "rollout/nfe" in record]
    return {
        "method": method,
        "seed": seed,
        "steps": arguments.steps,
        "after": after["exact"],
        "n": after["n"],
        "reward": [record["reward/total"] for record in records if "reward/total" in record],
        # Rows of forwards: rollouts are drawn once a batch, views scored with a gradient in each update.
        "rollout_rows": sum(nfe) * 64,
        "scored_rows": sum(record["train/views"] for record in records if "train/views" in record),
        "calls_a_rollout": sum(nfe) / len(nfe),
        "wall_s": summary["wall_s"],
    }


def table(runs: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Return means and standard errors over seeds, a row a method."""
    rows = {}
    for method in dict.fromkeys(entry["method"] for entry in runs):
        own = [entry for entry in runs if entry["method"] == method]
        gains = [entry["after"] - base[str(entry["seed"])]["exact"] for entry in own]
        rows[method] = {
            "before": mean_and_error([base[str(entry["seed"])]["exact"] for entry in own]),
            "after": mean_and_error([entry["after"] for entry in own]),
            "gain": mean_and_error(gains),
            "scored_rows": mean_and_error([entry["scored_rows"] for entry in own])["mean"],
            "rollout_rows": mean_and_error([entry["rollout_rows"] for entry in own])["mean"],
        }
    return rows


def draw(runs: list[dict[str, Any]], rows: dict[str, Any], path: Path) -> None:
    """Draw the mean reward of a batch against updates, a line a method, and the held-out gain as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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


def keep(runs: list[dict[str, Any]], base: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Write what has been run so far, and return its table."""
    rows = table(runs, base)
    result = {"runs": runs, "base": base, "rows": rows, "common": COMMON, "estimators": BUDGET}
    save("learning", result, arguments.json, seeds={"first": arguments.first, "count": arguments.seeds})
    return rows


def main() -> None:
    """Run what is missing, print the table, write results and plot."""
    parser = side_by_side_arguments(__doc__, "learning", tuple(BUDGET), called="methods", steps=16)
    parser.add_argument("--plot", type=Path, default=RESULTS / "learning.png")
    arguments = parser.parse_args()
    runs, base = side_by_side(arguments, key="method", run=run, keep=keep, before=before)
    rows = keep(runs, base, arguments)
    for method, row in rows.items():
        gain = row["gain"]
        words = f"gain {gain['mean']:+.3f} ± {gain['stderr']:.3f} (n={gain['n']} seeds)"
        print(f"{method:14} {row['after']['mean']:.3f}  {words}")
    draw(runs, rows, arguments.plot)
    print(f"wrote {arguments.json} and {arguments.plot}")


if __name__ == "__main__":
    main()
