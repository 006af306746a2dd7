"""Learned unmasking policies on the shipped model against heuristics, and what they do elsewhere than in training.

python benchmarks/policies.py [--seeds 3] [--problems 512] [--places NAME ...] [--folder DIR] [--json FILE]

The recipe `unmask_policy_tiny` (the denoiser frozen) on chains of operations, on the same in blocks of 32, on a canvas
of 128, longer than any that the model was trained on, and on sudoku: a planner a seed, each told five trade-offs. All
decode the same held-out problems greedily. The first planner of each kind is used in the places of the others besides,
and on longer chains: the table of transfers. Runs that `--folder` holds are not trained again, and rows that the result
file holds are not measured again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import RESULTS, by_folder, held, mean_and_error, paired_gain, save, trained

from unmask.rl.bench_policies import ALPHAS, Grid, bench_policies, plot

RECIPE = "unmask_policy_tiny"
TOLD = (0.1, 0.3, 1.0, 3.0, 10.0)
ELSEWHERE = (1.0,)  # what planners are told away from home
# As far as 1 - 1e-4: in blocks of 32 thresholds that are worth anything lie above 0.97.
LEVELS = (0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.999, 0.9999)
COMMON = ["evaluation.problems=64"]
BLOCKS_32 = ["rollout.sampler.schedule={name: blocks, size: 32, per_step: 1}"]
BLOCKS_32 += ["planner.expert={levels: [0.999, 0.97], block: 32, by_alpha: true, warmup: 12}"]
SUDOKU = ["task={name: sudoku, clues: [6, 12]}", "rewards=[{name: sudoku, weight: 1.0}]", "rollout.canvas=48"]
# Batches of twice the size and a third of the rate.
SLOWER = ["planner.expert={levels: [0.97, 0.5], by_alpha: true, warmup: 30}", "rollout.prompts=16", "optim.lr=3e-4"]
WIDE = ["rollout.canvas=128"]
LONGER = ["task={name: arithmetic, operations: [8, 9]}", "rollout.canvas=80"]
# Where policies are used: words that change the recipe, the canvas (which stands for no blocks) and blocks, and what
# is tried there besides thresholds.
USUAL = Grid(blocks=(), levels=LEVELS, per_step=(1, 4), random=(4,))
FAST = replace(USUAL, per_step=(), random=())  # one a step would be 128 calls a problem
NONE = replace(FAST, levels=(0.5, 0.9, 0.99), factors=(), nats=())
PLACES: dict[str, tuple[list[str], tuple[int, ...], Grid]] = {
    "chains": ([], (64, 32), USUAL),
    "wide chains": (WIDE, (128,), FAST),
    "sudoku": (SUDOKU, (48,), USUAL),
    "longer chains": (LONGER, (80,), NONE),
}
# What planners are trained on: the place, the block, words besides, updates and seeds at most.
KINDS: dict[str, tuple[str, int, list[str], int, int]] = {
    "chains": ("chains", 64, [], 100, 3),
    "blocks_32": ("chains", 32, BLOCKS_32, 100, 3),
    "wide": ("wide chains", 128, [*WIDE, "planner.expert={levels: [0.999, 0.5], by_alpha: true, warmup: 12}"], 100, 3),
    "sudoku": ("sudoku", 48, SUDOKU + SLOWER, 300, 1),
}


class Table:
    """The result file: rows by setting, each measured once."""

    def __init__(self, path: Path, problems: int, seeds: int, overrides: list[str]) -> None:
        self.path, self.problems, self.seeds, self.overrides = path, problems, seeds, overrides
        self.settings: dict[str, dict[str, Any]] = held(path).get("settings", {})
        self.measured: set[str] = set()
        self.summary: dict[str, Any] = held(path).get("summary", {})

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
        self.measured.add(setting)
        self.save()

    def save(self) -> Path:
        """Write what there is, beside what other processes have written of other settings."""
        own = {name: self.settings[name] for name in self.measured}
        self.settings = self.settings | held(self.path).get("settings", {}) | own
        result = {"settings": self.settings, "common": COMMON + self.overrides, "summary": self.summary}
        return save("policies", result, self.path, seeds={"first": 0, "count": self.seeds})


def compared(rows: list[dict[str, Any]], kind: str, block: int, *, whole: bool) -> dict[str, Any]:
    """Return the planners' means over seeds at each trade-off told, and what heuristics do at no more calls."""
    # In blocks the rivals are those in the same ones, without blocks all.
    rivals = [row for row in rows if "planner" not in row["kind"] and (whole or row["block"] == block)]
    own = [row for row in rows if row["kind"].startswith(f"planner {kind}_") and row["block"] == block]
    told: dict[str, Any] = {}
    for alpha in TOLD:
        at = [row for row in own if row["knob"] == alpha]
        exact, nfe = (mean_and_error([row[name] for row in at]) for name in ("exact", "nfe"))
        best = max((row for row in rivals if row["nfe"] <= nfe["mean"]), key=lambda row: row["exact"], default=None)
        told[f"{alpha:g}"] = {"exact": exact, "nfe": nfe, "best_heuristic_no_slower": best and named(best)}
        if best is not None:
            told[f"{alpha:g}"]["gain"] = paired_gain(at, best)
    one = [named(row) for row in rivals if row["kind"] == "top" and row["knob"] == 1]
    return {
        "told": told,
        "one_a_step": one,
        "best_reward": {f"{a:g}": best_reward(rivals, own, f"{a:g}") for a in ALPHAS},
    }


def best_reward(rivals: list[dict[str, Any]], own: list[dict[str, Any]], alpha: str) -> dict[str, Any]:
    """Return the heuristic of the most reward at a trade-off, and the planners at the best of what they were told."""
    best: dict[str, float] = {}
    for row in own:
        best[row["kind"]] = max(best.get(row["kind"], 0.0), row["reward"][alpha])
    rival = max(rivals, key=lambda row: row["reward"][alpha])
    return {"heuristic": named(rival, alpha), "planners": mean_and_error(list(best.values()))}


def named(row: dict[str, Any], alpha: str | None = None) -> dict[str, Any]:
    """Return what tells a row, and its numbers."""
    kept = {name: row[name] for name in ("kind", "block", "knob", "exact", "stderr", "nfe")}
    return kept if alpha is None else kept | {"reward": row["reward"][alpha]}


def main() -> None:
    """Train and measure what is missing, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--places", nargs="+", default=list(PLACES), choices=list(PLACES), help="to measure now")
    parser.add_argument("--folder", type=Path, default=Path("runs/policies"))
    parser.add_argument("--json", type=Path, default=RESULTS / "policies.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "policies", help="the pictures' names, without kind")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    table = Table(arguments.json, arguments.problems, arguments.seeds, arguments.overrides)
    runs = {
        kind: [
            trained(arguments.folder, RECIPE, f"{kind}_{seed}", *COMMON, *words, f"run.seed={seed}", f"optim.steps={n}")
            for seed in range(min(most, arguments.seeds))
        ]
        for kind, (_, _, words, n, most) in KINDS.items()
    }
    for place in arguments.places:
        words, blocks, heuristics = PLACES[place]
        for block in blocks:
            table.measure(place, words, f"heuristics {block}", replace(heuristics, blocks=(block,)))
            for kind, own in runs.items():
                at_home = KINDS[kind][:2] == (place, block)
                for run in own if at_home else own[:1]:
                    told = TOLD if at_home else ELSEWHERE
                    grid = replace(NONE, levels=(), planners=(str(run),), planner_blocks=(block,), alphas=told)
                    table.measure(place, words, f"{run.name} {block}", grid)
    kinds = {kind: where for kind, where in KINDS.items() if where[0] in arguments.places}
    for kind, (place, block, *_) in kinds.items():
        whole = block == max(PLACES[place][1])
        table.summary[kind] = compared(table.settings[place]["rows"], kind, block, whole=whole)
    show({kind: table.summary[kind] for kind in kinds})
    print(f"wrote {table.save()}")
    for kind, (place, block, *_) in kinds.items():
        rows = [row for row in table.settings[place]["rows"] if row["block"] == block]
        rows = [row for row in rows if row["kind"].startswith(f"planner {kind}_") or "planner" not in row["kind"]]
        plot({**table.settings[place], "rows": rows}, arguments.plot.with_name(f"{arguments.plot.name}_{kind}.png"))


def show(summary: dict[str, Any]) -> None:
    """Print what the planners do at each trade-off beside the best heuristic that is no slower."""
    for name, part in summary.items():
        for told, row in part["told"].items():
            exact, nfe, rival = (row[key] for key in ("exact", "nfe", "best_heuristic_no_slower"))
            other = "none"
            if rival:
                other = f"{rival['kind']} {rival['knob']:g} in {rival['block']}: {rival['exact']:.3f}"
                other += f", gain {row['gain']['mean']:+.3f} ± {row['gain']['stderr']:.3f}"
            print(
                f"{name}, told {told}: {exact['mean']:.3f} ± {exact['stderr']:.3f} in {nfe['mean']:.2f} calls "
                f"(n={exact['n']} seeds); best heuristic no slower: {other}"
            )


if __name__ == "__main__":
    main()
