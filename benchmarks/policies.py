"""Learned unmasking policies on the shipped model against heuristics, and what they do elsewhere than in training.

python benchmarks/policies.py [--seeds 3] [--steps 100] [--problems 512] [--folder DIR] [--json FILE] [--plot FILE.png]

The recipe `unmask_policy_tiny` (chains of operations, the denoiser frozen, no blocks), a planner a seed; each is told
five trade-offs. All decode the same held-out problems greedily, heuristics in blocks of 32
and without blocks. For the table of transfers two more planners are trained, in blocks of 16 and on sudoku, and every
planner is used in every setting. Runs that `--folder` holds are not trained again and rows that the result file holds
are not measured again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, mean_and_error, save
from learning import unmask

from unmask.rl.bench_policies import ALPHAS, Grid, bench_policies, line_of, plot

RECIPE, CANVAS = "unmask_policy_tiny", 64
TOLD = (0.1, 0.3, 1.0, 3.0, 10.0)
LEVELS = (0.5, 0.7, 0.9, 0.97)
COMMON = ["evaluation.problems=64"]
BLOCKS_16 = "rollout.sampler.schedule={name: blocks, size: 16, per_step: 1}"
SUDOKU = ["task={name: sudoku, clues: [6, 12]}", "rewards=[{name: sudoku, weight: 1.0}]", "rollout.canvas=48"]
# Planners for the table of transfers, beside those of the seeds.
OTHERS = {"blocks_16": [BLOCKS_16], "sudoku": SUDOKU}
# Where they are used: words that change the recipe, and the block length (the canvas: none).
SETTINGS: dict[str, tuple[list[str], int]] = {
    "chains, no blocks": ([], CANVAS),
    "chains, blocks of 16": ([], 16),
    "longer chains, no blocks": (["task={name: arithmetic, operations: [8, 9]}", "rollout.canvas=80"], 80),
    "sudoku, no blocks": (SUDOKU, 48),
    "sudoku, blocks of 16": (SUDOKU, 16),
}
ONLY_PLANNERS = Grid(blocks=(), alphas=TOLD)


def train(folder: Path, name: str, seed: int, steps: int, words: list[str]) -> str:
    """Return the run's folder, trained unless it is there."""
    if not (folder / name / "summary.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        knobs = [f"name={name}", f"run.seed={seed}", f"optim.steps={steps}", f"run.directory={folder}"]
        unmask(folder, "train", RECIPE, *COMMON, *words, *knobs)
    return str(folder / name)


class Table:
    """The result file: rows by setting, each measured once."""

    def __init__(self, path: Path | None, problems: int, overrides: list[str]) -> None:
        self.path, self.problems, self.overrides = path, problems, overrides
        self.settings: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            self.settings = json.loads(path.read_text())["result"]["settings"]

    def measure(self, setting: str, words: list[str], part: str, grid: Grid) -> None:
        """Add a grid's rows to a setting unless its part is there; planners go by their folders' names."""
        held = self.settings.setdefault(setting, {"parts": [], "rows": []})
        if part in held["parts"]:
            return
        words = [*words, *self.overrides]
        found = bench_policies(RECIPE, grid, problems=self.problems, overrides=words, progress=print)
        held |= {name: found[name] for name in ("target", "task", "canvas", "n")}
        held["parts"].append(part)
        held["rows"] += [
            row | {"kind": " ".join(Path(w).name for w in row["kind"].split(" ", 1))} for row in found["rows"]
        ]
        self.save({})

    def save(self, summary: dict[str, Any]) -> Path:
        """Write what there is."""
        result = {"settings": self.settings, "common": COMMON + self.overrides, **summary}
        return save("policies", result, self.path, seeds={"first": 0, "count": 3})


def compared(rows: list[dict[str, Any]], block: int) -> dict[str, Any]:
    """Return the planners' means over seeds at each trade-off told, and what heuristics do at no fewer calls."""
    heuristics = [row for row in rows if not row["kind"].startswith("planner")]
    found: dict[str, Any] = {}
    for alpha in TOLD:
        own = [row for row in rows if row["kind"].startswith("planner seed_") and row["block"] == block]
        own = [row for row in own if row["knob"] == alpha]
        exact, nfe = (mean_and_error([row[name] for row in own]) for name in ("exact", "nfe"))
        # A heuristic that takes as many calls or fewer; the best of them, whatever its block length.
        rivals = [row for row in heuristics if row["nfe"] <= nfe["mean"]]
        best = max(rivals, key=lambda row: row["exact"], default=None)
        found[f"{alpha:g}"] = {"exact": exact, "nfe": nfe, "best_heuristic_no_slower": best and named(best)}
    found["one_a_step"] = [named(row) for row in heuristics if row["kind"] == "top" and row["knob"] == 1]
    found["best_reward"] = {
        f"{a:g}": {
            "heuristic": named(max(heuristics, key=lambda row: row["reward"][f"{a:g}"]), f"{a:g}"),
            "planners": mean_and_error([best_of(rows, seed, block, f"{a:g}") for seed in seeds_of(rows)]),
        }
        for a in ALPHAS
    }
    return found


def seeds_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return the kinds of the planners that differ in their seed alone."""
    return list(dict.fromkeys(row["kind"] for row in rows if row["kind"].startswith("planner seed_")))


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
    parser.add_argument("--plot", type=Path, default=RESULTS / "policies.png")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    table = Table(arguments.json, arguments.problems, arguments.overrides)
    seeds = [
        train(arguments.folder, f"seed_{seed}", seed, arguments.steps, arguments.overrides)
        for seed in range(arguments.seeds)
    ]
    first = "chains, no blocks"
    for block in (32, CANVAS):
        table.measure(first, [], f"heuristics {block}", Grid(blocks=(block,), levels=LEVELS))
    for run in seeds:
        for block in (32, CANVAS):
            grid = replace(ONLY_PLANNERS, planners=(run,), planner_blocks=(block,))
            table.measure(first, [], f"{Path(run).name} {block}", grid)
    others = [train(arguments.folder, name, 0, arguments.steps, words) for name, words in OTHERS.items()]
    for setting, (words, block) in SETTINGS.items():
        threshold = Grid(blocks=(block,), levels=LEVELS, per_step=(), factors=(), nats=(), random=())
        if f"heuristics {block}" not in table.settings.get(setting, {}).get("parts", ()):
            table.measure(setting, words, f"thresholds {block}", threshold)
        for run in (seeds[0], *others):
            grid = replace(ONLY_PLANNERS, planners=(run,), planner_blocks=(block,))
            table.measure(setting, words, f"{Path(run).name} {block}", grid)
    held = table.settings[first]
    summary = {
        f"blocks of {block}" if block < CANVAS else "no blocks": compared(held["rows"], block) for block in (32, CANVAS)
    }
    for row in held["rows"]:
        print(line_of(row))
    for name, part in summary.items():
        for told in (f"{alpha:g}" for alpha in TOLD):
            exact, nfe, rival = (part[told][key] for key in ("exact", "nfe", "best_heuristic_no_slower"))
            other = f"{rival['kind']} {rival['knob']:g} in {rival['block']}: {rival['exact']:.3f}" if rival else "none"
            print(
                f"{name}, told {told}: {exact['mean']:.3f} ± {exact['stderr']:.3f} in {nfe['mean']:.2f} calls "
                f"(n={exact['n']} seeds); best heuristic no slower: {other}"
            )
    print(f"wrote {table.save(summary)}")
    pictured = [row for row in held["rows"] if row["block"] in (32, CANVAS) and row["kind"].split()[-1] not in OTHERS]
    plot({**held, "rows": pictured}, arguments.plot)


if __name__ == "__main__":
    main()
