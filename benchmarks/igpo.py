"""Hints where every rollout of a group fails: IGPO against the same GRPO without them, where the model seldom succeeds.

python benchmarks/igpo.py [--arms NAME ...] [--seeds 3] [--steps 40] [--problems 256] [--json FILE] [--plot FILE.png]

Both arms are the recipe `igpo_tiny_arithmetic` (chains of ten or eleven operations, decided in pairs: most groups of
eight hold no right rollout), one of them with `exploration.hints=null`: the same problems, updates and objective. IGPO
rolls failed groups out once more, so it draws more rollouts; `rollout_rows` tells how many rows of forwards. Finished
runs are read from the result file, so that an interrupted benchmark goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, mean_and_error, save, side_by_side, side_by_side_arguments, unmask

RECIPE = "igpo_tiny_arithmetic"
ROLLOUTS = 64  # of a batch, as the recipe has it
COMMON = ["run.log_rollouts_every=0"]
SHARES = ("zero_share", "exact", "failed_before", "failed_after", "first_exact")
ARMS: dict[str, list[str]] = {"igpo": [], "grpo": ["exploration.hints=null"]}


def before(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the held-out result that both arms of a seed start from."""
    with tempfile.TemporaryDirectory() as name:
        words = [*COMMON, f"run.seed={seed}", *arguments.overrides, "--problems", str(arguments.problems)]
        return unmask(Path(name), "evaluate", RECIPE, *words)


def run(arm: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once, evaluate, and return what results and metrics say."""
    with tempfile.TemporaryDirectory() as name:
        folder, words = Path(name), [*COMMON, *ARMS[arm], f"run.seed={seed}", f"optim.steps={arguments.steps}"]
        small = ["evaluation.problems=8", f"run.directory={folder}"]
        summary = unmask(folder, "train", RECIPE, *words, *small, *arguments.overrides)
        after = unmask(folder, "evaluate", str(folder / RECIPE), "--problems", str(arguments.problems))
        records = [json.loads(line) for line in (folder / RECIPE / "metrics.jsonl").open()]
    batches = [record for record in records if "rollout/nfe" in record]
    kept = {"zero_share": "advantage/zero_share", "exact": "outcome/ok"}
    if arm == "igpo":  # `first_exact` and `failed_before` are of its own rollouts, before hints have a say
        kept |= {"failed_before": "explore/failed_groups_before", "failed_after": "explore/failed_groups_after"}
        kept |= {"first_exact": "explore/first_exact", "hint_tokens": "explore/hint_tokens", "leak": "explore/leak"}
    return {
        "arm": arm,
        "seed": seed,
        "steps": arguments.steps,
        "after": after["exact"],
        "n": after["n"],
        **{short: [batch[long] for batch in batches] for short, long in kept.items()},
        "rollout_rows": sum(
            batch["rollout/nfe"] * ROLLOUTS * (1 + batch.get("explore/tried", 0.0)) for batch in batches
        ),
        "wall_s": summary["wall_s"],
    }


def table(runs: list[dict[str, Any]], base: dict[str, Any]) -> dict[str, Any]:
    """Return means and standard errors over seeds, a row an arm; shares of groups are those of the whole run."""
    rows = {}
    for arm in dict.fromkeys(entry["arm"] for entry in runs):
        own = [entry for entry in runs if entry["arm"] == arm]
        whole = {name: [sum(e[name]) / len(e[name]) for e in own] for name in own[0] if name in SHARES}
        rows[arm] = {
            "before": mean_and_error([base[str(entry["seed"])]["exact"] for entry in own]),
            "after": mean_and_error([entry["after"] for entry in own]),
            "gain": mean_and_error([entry["after"] - base[str(entry["seed"])]["exact"] for entry in own]),
            **{name: mean_and_error(values) for name, values in whole.items()},
            "rollout_rows": mean_and_error([entry["rollout_rows"] for entry in own]),
        }
        if arm == "igpo":
            pairs = zip(whole["failed_before"], whole["failed_after"], strict=True)
            rows[arm]["fall"] = mean_and_error([1 - after / before for before, after in pairs])
            rows[arm]["leak"] = max(max(entry["leak"]) for entry in own)
    return rows


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw right rollouts and failed groups before hints against batches, an arm a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = (
        (0, "igpo", "first_exact", "right rollouts, hints left out"),
        (0, "grpo", "exact", "right rollouts"),
        (1, "igpo", "failed_before", "failed groups"),
        (1, "igpo", "failed_after", "failed groups after hints"),
        (1, "grpo", "zero_share", "groups without signal"),
    )
    for place, arm, name, label in lines:
        own = [entry[name] for entry in runs if entry["arm"] == arm]
        mean = [sum(values) / len(values) for values in zip(*own, strict=True)]
        windows = [mean[max(0, i - 3) : i + 1] for i in range(len(mean))]
        axes[place].plot([sum(window) / len(window) for window in windows], label=f"{arm}: {label}")
    for ax in axes:
        ax.set(xlabel="batch", ylabel="share (mean of four batches)", ylim=(0, None))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def keep(runs: list[dict[str, Any]], base: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Write what has been run so far, and return its table."""
    rows = table(runs, base)
    result = {"recipe": RECIPE, "common": COMMON, "arms": ARMS, "base": base, "rows": rows, "runs": runs}
    save("igpo", result, arguments.json, seeds={"first": arguments.first, "count": arguments.seeds})
    return rows


def main() -> None:
    """Run what is missing, print the table, write results and plot."""
    parser = side_by_side_arguments(__doc__, "igpo", tuple(ARMS), called="arms", steps=40)
    parser.add_argument("--plot", type=Path, default=RESULTS / "igpo.png")
    arguments = parser.parse_args()
    runs, base = side_by_side(arguments, key="arm", run=run, keep=keep, before=before)
    for arm, row in keep(runs, base, arguments).items():
        gain, idle = row["gain"], row["zero_share"]
        print(
            f"{arm}: gain {gain['mean']:+.3f} ± {gain['stderr']:.3f} (n={gain['n']} seeds), "
            f"groups without signal {idle['mean']:.2f} ± {idle['stderr']:.2f}"
        )
        if "fall" in row:
            first, last, fall = (row[name]["mean"] for name in ("failed_before", "failed_after", "fall"))
            print(
                f"  failed groups {first:.2f} -> {last:.2f} with hints: {fall:.0%} ± {row['fall']['stderr']:.0%} fewer"
            )
    draw(runs, arguments.plot)
    print(f"wrote {arguments.json} and {arguments.plot}")


if __name__ == "__main__":
    main()
