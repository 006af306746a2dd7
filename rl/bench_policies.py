"""`unmask bench policies`: accuracy against calls of unmasking policies, heuristic and learned, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..policies.planner import fingerprint_of, load_planner
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe
from ..recipes.sections import SamplerSection
from ..rollouts.sampler import build_sampler
from ..rollouts.worker import RolloutBatch
from .bench_rollout import load_recipe_sampler
from .evaluate import evaluate, heldout_rows
from .runfolder import manifest
from .settings import rewards_of
from .speed import multiplicative
from .targets import evaluation_worker, open_target

# Trade-offs at which the rows' rewards are compared.
ALPHAS = (0.0, 0.3, 1.0, 3.0)
DRAWN = 0  # in the place of a block length, where a planner draws them


@dataclass(frozen=True)
class Grid:
    """What is compared: block lengths (the canvas: no blocks) times the knobs of each heuristic, and the planners.

    A planner is a path and decodes in the `planner_blocks` at every one of `alphas`, its logits divided by
    `temperature`. One that chooses lengths has no other blocks; inside them it keeps to the target's own score and
    selection where those are of such a recipe, else to a threshold.
    """

    blocks: tuple[int, ...]
    levels: tuple[float, ...] = (0.5, 0.7, 0.9)
    per_step: tuple[int, ...] = (1, 2, 4)
    factors: tuple[float, ...] = (0.5, 1.0)
    nats: tuple[float, ...] = (0.1, 0.5)
    random: tuple[int, ...] = (1, 4)
    planners: tuple[str, ...] = ()
    planner_blocks: tuple[int, ...] = ()
    alphas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    temperature: float = 0.5

    def rows(self, canvas: int) -> list[dict[str, Any]]:
        """Return what each row of the table decodes with: kind, block, knob and the sampler's section."""

        def row(kind: str, block: int, knob: float, per_step: int = 1, **parts: Any) -> dict[str, Any]:
            blocks = {"name": "blocks", "size": block, "per_step": min(per_step, block)}
            schedule = {"name": "whole", "per_step": per_step} if block >= canvas else blocks
            return {"kind": kind, "block": block, "knob": knob, "sampler": {"schedule": schedule, **parts}}

        found = []
        for b in self.blocks:
            found += [row("top", b, k, k) for k in self.per_step if k <= b]
            found += [row("threshold", b, v, selection={"name": "threshold", "level": v}) for v in self.levels]
            found += [row("factor", b, f, selection={"name": "factor", "f": f}) for f in self.factors]
            budget = "entropy_budget"
            found += [row(budget, b, n, score="entropy", selection={"name": budget, "nats": n}) for n in self.nats]
            found += [row("random", b, k, k, score="random") for k in self.random if k <= b]
        for path in self.planners:
            for b in self.planner_blocks or (canvas,):
                for alpha in self.alphas:
                    score = {"name": "planner", "path": path, "alpha": alpha, "temperature": self.temperature}
                    found.append(row(f"planner {path}", b, alpha, score=score, selection="planned"))
        return found


def bench_policies(
    target: str,
    grid: Grid,
    *,
    problems: int = 256,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Decode the same held-out problems greedily with every policy of the grid and return one row each.

    A row has exact rate and mean calls with standard errors, which problems it `solved` (a 0 or 1 each, in one order
    for all rows, to compare them in pairs), and at each of `ALPHAS` the mean multiplicative reward; `best` marks the
    trade-offs at which it is the best of the constants, that is of all that are no planners.
    """
    recipe, denoiser = open_target(target, overrides)
    known = fingerprint_of(denoiser)
    specs = {f"planner {path}": load_planner(path, fingerprint=known).spec for path in grid.planners}
    rows = heldout_rows(SLOTS["task"].build(recipe.task)("heldout", seed=recipe.run.seed), problems)
    worker = evaluation_worker(_without_planner(recipe), denoiser, rewards_of(recipe))
    found = []
    for wanted in grid.rows(recipe.rollout.canvas):
        spec = specs.get(wanted["kind"])
        if spec is not None and spec.remasks:
            wanted["sampler"]["remasking"] = "planned"
        if spec is not None and spec.sizes:
            wanted["block"], wanted["sampler"] = DRAWN, _of_lengths(recipe, wanted["sampler"]["score"])
        sampler = build_sampler(load_recipe_sampler(_without_planner(recipe), wanted["sampler"]), temperature=0.0)
        kept: list[RolloutBatch] = []
        result = evaluate(replace(worker, sampler=sampler), rows, keep=kept)
        steps_B = torch.cat([batch.trajectory.steps_B for batch in kept]).double()
        solved = "".join("01"[outcome == "ok"] for batch in kept for outcome in batch.rewards.outcome)
        right_B = torch.tensor([float(bit) for bit in solved], dtype=torch.float64)
        length_B = torch.full_like(steps_B, recipe.rollout.canvas)
        value = {f"{a:g}": multiplicative(right_B, steps_B, length_B, length_B * 0 + a).mean().item() for a in ALPHAS}
        found.append(
            {name: wanted[name] for name in ("kind", "block", "knob")}
            | {"exact": result.exact, "stderr": result.stderr, "nfe": result.nfe, "reward": value, "best": []}
            | {"nfe_stderr": steps_B.std().item() / len(steps_B) ** 0.5, "seconds": result.wall_s, "solved": solved}
        )
        progress(line_of(found[-1]))
    for alpha in found[0]["reward"] if found else ():
        constants = [row for row in found if not row["kind"].startswith("planner")]
        if constants:
            max(constants, key=lambda row: row["reward"][alpha])["best"].append(alpha)
    about = {"target": target, "task": recipe.task, "canvas": recipe.rollout.canvas, "n": len(rows)}
    made = manifest(device=denoiser.device, dtype=recipe.model.dtype, seeds={"run": recipe.run.seed})
    return {**about, "temperature": grid.temperature, "rows": found, "manifest": made}


def _of_lengths(recipe: Recipe, knobs: dict[str, Any]) -> dict[str, Any]:
    """Return the section of a sampler that asks a planner, with the `knobs` of score planner, for lengths of blocks."""
    sampler = recipe.rollout.sampler
    own = {"score": sampler.score, "selection": sampler.selection} if sampler.schedule["name"] == "planned" else {}
    return {"selection": "threshold", **own, "schedule": {**knobs, "name": "planned"}}


def _without_planner(recipe: Recipe) -> Recipe:
    """Return a recipe of the same problems that trains no planner, so that any sampler fits it."""
    if recipe.planner is None:
        return recipe
    plain = SamplerSection.model_validate({"schedule": {"name": "whole", "per_step": 1}})
    objective = recipe.objective.model_copy(update={"actions": ["tokens"], "beta": 0.0})
    rollout = recipe.rollout.model_copy(update={"sampler": plain, "temperature": 1.0})
    evaluation = recipe.evaluation.model_copy(update={"sampler": None})
    changes = {"planner": None, "objective": objective, "rollout": rollout, "evaluation": evaluation}
    return recipe.model_copy(update=changes)


HEADER = f"{'policy':34} {'block':>5} {'knob':>6} {'exact':>15} {'NFE':>14}  reward at alpha " + ", ".join(
    f"{alpha:g}" for alpha in ALPHAS
)


def line_of(row: dict[str, Any]) -> str:
    """Return a row as one line under `HEADER`."""
    exact, nfe = f"{row['exact']:.3f} ± {row['stderr']:.3f}", f"{row['nfe']:.2f} ± {row['nfe_stderr']:.2f}"
    rewards = "  ".join(f"{value:.3f}" for value in row["reward"].values())
    kind = row["kind"] if len(row["kind"]) <= 34 else "…" + row["kind"][-33:]
    return f"{kind:34} {row['block']:5} {row['knob']:6g} {exact:>15} {nfe:>14}  {rewards}"


def best_lines(result: dict[str, Any]) -> list[str]:
    """Return for each trade-off the best constant, and the best planner beside it."""
    lines = []
    for alpha in result["rows"][0]["reward"]:
        best = [row for row in result["rows"] if alpha in row["best"]]
        learned = [row for row in result["rows"] if row["kind"].startswith("planner")]
        line = f"alpha {alpha}: best constant " + ", ".join(
            f"{row['kind']} {row['knob']:g} in blocks of {row['block']} ({row['reward'][alpha]:.3f})" for row in best
        )
        if learned:
            top = max(learned, key=lambda row: row["reward"][alpha])
            name = top["kind"].removeprefix("planner ")
            line += f"; best planner {name} at {top['knob']:g} ({top['reward'][alpha]:.3f})"
        lines.append(line)
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw exact rate against calls with standard errors, a line a policy and block; best constants are starred."""
    try:
        import matplotlib
    except ImportError as error:
        raise RecipeError("--plot: needs matplotlib; pip install 'unmask[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    curves: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        curves.setdefault((row["kind"], row["block"]), []).append(row)
    for (kind, block), rows in curves.items():
        rows = sorted(rows, key=lambda row: row["nfe"])
        learned = kind.startswith("planner")
        place = "no blocks" if block >= result["canvas"] else "drawn blocks" if block == DRAWN else f"blocks of {block}"
        axes.errorbar(
            [row["nfe"] for row in rows],
            [row["exact"] for row in rows],
            xerr=[row["nfe_stderr"] for row in rows],
            yerr=[row["stderr"] for row in rows],
            fmt="o-" if learned else ".:",
            linewidth=2 if learned else 1,
            capsize=2,
            label=f"{kind[-30:]}, {place}",
        )
    stars = [row for row in result["rows"] if row["best"]]
    axes.scatter(
        [row["nfe"] for row in stars], [row["exact"] for row in stars], marker="*", s=180, color="black", zorder=5
    )
    axes.set(xlabel="denoiser calls a completion (NFE)", ylabel=f"exact rate (n = {result['n']}, standard error)")
    axes.set_xscale("log")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(ticker.ScalarFormatter())
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3)
    knobs = (str(value) for value in result["task"].values() if value is not None)
    axes.set_title(
        f"{result['target']}: {', '.join(knobs)}; canvas {result['canvas']}; star: best constant", loc="left"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
