"""Learned unmasking policies on the shipped model against heuristics, and what they do elsewhere than in training.

python benchmarks/policies.py [--seeds 3] [--steps 100] [--problems 512] [--folder DIR] [--json FILE] [--plot STEM]

The recipe `unmask_policy_tiny` (the denoiser frozen, no blocks) on chains of operations and on sudoku, a planner a
seed; each is told five trade-offs. All decode the same held-out problems greedily, heuristics and planners in blocks
and without them. For the table of transfers one more planner is trained in blocks of 16, and the first of each kind is
used in every setting. Runs that `--folder` holds are not trained again, and rows that the result file holds are not
measured again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, by_folder, held, mean_and_error, save, trained

from unmask.rl.bench_policies import ALPHAS, Grid, bench_policies, plot

RECIPE = "unmask_policy_tiny"
TOLD = (0.1, 0.3, 1.0, 3.0, 10.0)
LEVELS = (0.5, 0.7, 0.9, 0.97)
COMMON = ["evaluation.problems=64"]
BLOCKS_16 = "rollout.sampler.schedule={name: blocks, size: 16, per_step: 1}"
# In blocks, thresholds solve hardly a sudoku: the expert that is imitated at first has none there.
SUDOKU = ["task={name: sudoku, clues: [6, 12]}", "rewards=[{name: sudoku, weight: 1.0}]", "rollout.canvas=48"]
SUDOKU += ["planner.expert={levels: [0.6, 0.9], warmup: 12}"]
# What planners are trained on: words that change the recipe, the canvas, and the blocks that they are used in besides.
TASKS: dict[str, tuple[list[str], int, int]] = {"chains": ([], 64, 32), "sudoku": (SUDOKU, 48, 16)}
# Where the first of each, and one trained in blocks, are used: words, and the block length (the canvas: none).
SETTINGS: dict[str, tuple[list[str], int]] = {
    "chains": ([], 64),
    "chains, blocks of 16": ([], 16),
    "longer chains": (["task={name: arithmetic, operations: [8, 9]}", "rollout.canvas=80"], 80),
    "sudoku": (SUDOKU, 48),
}
ONLY_PLANNERS = Grid(blocks=(), alphas=TOLD)


class Table:
    """The result file: rows by setting, each measured once."""

    def __init__(self, path: Path, problems: int, seeds: int, overrides: list[str]) -> None:
        self.path, self.problems, self.seeds, self.overrides = path, problems, seeds, overrides
        self.settings: dict[str, dict[str, Any]] = held(path).get("settings", {})
        self.summary: dict[str, Any] = {}

    def measure(self, setting: str, words: list[str], part: str, grid: Grid) -> None:
        """Add a grid's rows to a setting unless its part is there."""
        have = self.settings.setdefault(setting, {"parts": [], "rows": []})
        if part in have["parts"]:
            return
        words = [*words, *self.overrides]
        found = bench_policies(RECIPE, grid, problems=self.problems, overrides=words, progress=print)
        have |= {name: found[name] for name in ("target", "task", "canvas", "n")}
        have["parts"].append(part)
        have["rows"] += by_folder(found["rows"])
        self.save()

    def save(self) -> Path:
        """Write what there is."""
        result = {"settings": self.settings, "common": COMMON + self.overrides, **self.summary}
        return save("policies", result, self.path, seeds={"first": 0, "count": self.seeds})


def compared(rows: list[dict[str, Any]], task: str, block: int, *, whole: bool) -> dict[str, Any]:
    """Return the planners' means over seeds at each trade-off told, and what heuristics do at no fewer calls."""
    heuristics = [row for row in rows if not row["kind"].startswith("planner")]
    kinds = seeds_of(rows, task)
    found: dict[str, Any] = {}
    for alpha in TOLD:
        own = [row for row in rows if row["kind"] in kinds and (row["block"], row["knob"]) == (block, alpha)]
        exact, nfe = (mean_and_error([row[name] for row in own]) for name in ("exact", "nfe"))
        # Heuristics that take as many calls or fewer: in blocks those of the same ones, else all.
        rivals = [row for row in heuristics if row["nfe"] <= nfe["mean"] and (whole or row["block"] == block)]
        best = max(rivals, key=lambda row: row["exact"], default=None)
        found[f"{alpha:g}"] = {"exact": exact, "nfe": nfe, "best_heuristic_no_slower": best and named(best)}
    found["one_a_step"] = [named(row) for row in heuristics if row["kind"] == "top" and row["knob"] == 1]
    found["best_reward"] = {
        f"{a:g}": {
            "heuristic": named(max(heuristics, key=lambda row: row["reward"][f"{a:g}"]), f"{a:g}"),
            "planners": mean_and_error([best_of(rows, seed, block, f"{a:g}") for seed in kinds]),
        }
        for a in ALPHAS
    }
    return found


def seeds_of(rows: list[dict[str, Any]], task: str) -> list[str]:
    """Return the kinds of the planners of a task, which differ in their seed alone."""
    return list(dict.fromkeys(row["kind"] for row in rows if row["kind"].startswith(f"planner {task}_")))


def best_of(rows: list[dict[str, Any]], kind: str, block: int, alpha: str) -> float:
    """Return a planner's best reward at a trade-off over what it was told."""
    return max(row["reward"][alpha] for row in rows if row["kind"] == kind and row["block"] == block)


def named(row: dict[str, Any], alpha: str | None = None) -> dict[str, Any]:
    """Return what tells a row, and its numbers."""
    kept = {name: row[name] for name in ("kind", "block", "knob", "exact", "stderr", "nfe")}
    return kept if alpha is None else kept | {"reward": row["reward"][alpha]}


def main() -> None:
    """Train and measure what is missing, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/policies"))
    parser.add_argument("--json", type=Path, default=RESULTS / "policies.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "policies", help="the pictures' names, without task")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    table = Table(arguments.json, arguments.problems, arguments.seeds, arguments.overrides)
    summary, firsts = table.summary, []

    def train(name: str, seed: int, words: list[str]) -> str:
        knobs = [f"run.seed={seed}", f"optim.steps={arguments.steps}"]
        return str(trained(arguments.folder, RECIPE, name, *COMMON, *words, *knobs))

    for task, (words, canvas, size) in TASKS.items():
        runs = [train(f"{task}_{seed}", seed, words) for seed in range(arguments.seeds)]
        firsts.append(runs[0])
        for block in (canvas, size):
            table.measure(task, words, f"heuristics {block}", Grid(blocks=(block,), levels=LEVELS))
            for run in runs:
                grid = replace(ONLY_PLANNERS, planners=(run,), planner_blocks=(block,))
                table.measure(task, words, f"{Path(run).name} {block}", grid)
            place = task if block == canvas else f"{task}, blocks of {block}"
            summary[place] = compared(table.settings[task]["rows"], task, block, whole=block == canvas)
            table.save()
    firsts.append(train("blocks_16", 0, [BLOCKS_16]))
    for setting, (words, block) in SETTINGS.items():
        if f"heuristics {block}" not in table.settings.get(setting, {}).get("parts", ()):
            threshold = Grid(blocks=(block,), levels=LEVELS, per_step=(), factors=(), nats=(), random=())
            table.measure(setting, words, f"thresholds {block}", threshold)
        for run in firsts:
            grid = replace(ONLY_PLANNERS, planners=(run,), planner_blocks=(block,))
            table.measure(setting, words, f"{Path(run).name} {block}", grid)
    show(summary)
    print(f"wrote {table.save()}")
    for task in TASKS:
        whole = table.settings[task]
        own = seeds_of(whole["rows"], task)
        rows = [row for row in whole["rows"] if not row["kind"].startswith("planner") or row["kind"] in own]
        plot({**whole, "rows": rows}, arguments.plot.with_name(f"{arguments.plot.name}_{task}.png"))


def show(summary: dict[str, Any]) -> None:
    """Print what the planners do at each trade-off beside the best heuristic that is no slower."""
    for name, part in summary.items():
        for told in (f"{alpha:g}" for alpha in TOLD):
            exact, nfe, rival = (part[told][key] for key in ("exact", "nfe", "best_heuristic_no_slower"))
            other = f"{rival['kind']} {rival['knob']:g} in {rival['block']}: {rival['exact']:.3f}" if rival else "none"
            print(
                f"{name}, told {told}: {exact['mean']:.3f} ± {exact['stderr']:.3f} in {nfe['mean']:.2f} calls "
                f"(n={exact['n']} seeds); best heuristic no slower: {other}"
            )


if __name__ == "__main__":
    main()
