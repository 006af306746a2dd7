"""`unmask bench rollout`: samplers side by side on one model and one set of problems, in one process."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..recipes.loading import load_samplers, named_sampler, resolve
from ..recipes.reading import apply_override
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe
from ..rollouts.sampler import Sampler, build_sampler
from ..rollouts.worker import RolloutBatch
from .evaluate import evaluate, heldout_rows
from .runfolder import manifest
from .settings import rewards_of
from .targets import evaluation_worker, open_target

REFERENCE = "llada_low_confidence"


@dataclass
class Stopwatch:
    """A denoiser that adds up the seconds of its trunk and its head; a GPU is waited for at both ends."""

    inner: Any
    trunk_s: float = 0.0
    head_s: float = 0.0
    calls: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def hidden(self, *arguments: Any, **options: Any) -> Tensor:
        """Time the trunk."""
        found, seconds = _timed(partial(self.inner.hidden, *arguments, **options))
        self.trunk_s, self.calls = self.trunk_s + seconds, self.calls + 1
        return found

    def columns(self, *arguments: Any) -> Tensor:
        """Time the trunk behind a cache."""
        found, seconds = _timed(partial(self.inner.columns, *arguments))
        self.trunk_s, self.calls = self.trunk_s + seconds, self.calls + 1
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """Time the head."""
        found, seconds = _timed(partial(self.inner.head, hidden))
        self.head_s += seconds
        return found


def _timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    found = function()
    if found.is_cuda:
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def sampler_of(text: str, recipe: Recipe) -> Sampler:
    """Return the sampler that `NAME` or `NAME:key=value,key=value` describes.

    NAME is a row of samplers.yaml or `recipe` (the recipe's own); keys are those of the sampler section, and
    `temperature`. RecipeError for unknown names and keys.
    """
    name, _, changes = text.partition(":")
    base = recipe.rollout.sampler.model_dump() if name == "recipe" else named_sampler(name, "bench --sampler")
    data: dict[str, Any] = {"sampler": dict(base), "temperature": 0.0}
    # A comma that no key follows belongs to a value: `schedule={name: uniform, steps: 6}`.
    for change in filter(None, re.split(r",(?=[\w.]+=)", changes)):
        apply_override(data, change if change.startswith("temperature=") else f"sampler.{change}")
    # Checked as a recipe's sampler is, with the same messages.
    loaded = load_recipe_sampler(recipe, data["sampler"])
    return build_sampler(loaded, temperature=float(data["temperature"]))


def load_recipe_sampler(recipe: Recipe, section: dict[str, Any]) -> dict[str, Any]:
    """Return a sampler section with every default, checked against the recipe's canvas."""
    data = recipe.model_dump(mode="json")
    data["rollout"]["sampler"] = section
    data["evaluation"]["sampler"] = None
    resolved = resolve(data)
    assert isinstance(resolved, Recipe)
    return resolved.rollout.sampler.model_dump()


def bench_rollout(
    target: str,
    samplers: Sequence[str] | None = None,
    *,
    reference: str = REFERENCE,
    problems: int = 256,
    overrides: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Decode the same held-out problems with every sampler and return one row each, the reference's first.

    Without `samplers` all rows of samplers.yaml that the target's canvas takes.

    A row has exact rate and standard error, its difference to the reference's over the same problems (`gain`, with the
    standard error of paired differences), NFE, tokens a second, the share of the time outside trunk and head, and the
    share of completions that equal the reference's.
    """
    recipe, denoiser = open_target(target, overrides)
    rows = heldout_rows(SLOTS["task"].build(recipe.task)("heldout", seed=recipe.run.seed), problems)
    asked = fitting(recipe) if samplers is None else samplers
    names = [reference, *(name for name in asked if name != reference)]
    built = {name: sampler_of(name, recipe) for name in names}
    worker = evaluation_worker(recipe, denoiser, rewards_of(recipe))
    found: list[dict[str, Any]] = []
    wanted: list[str] = []
    right: list[bool] = []
    for name in names:
        watch, kept = Stopwatch(denoiser), list[RolloutBatch]()
        result = evaluate(replace(worker, denoiser=watch, sampler=built[name]), rows, keep=kept)
        completions = [text for batch in kept for text in batch.completions]
        solved = [outcome == "ok" for batch in kept for outcome in batch.rewards.outcome]
        wanted, right = wanted or completions, right or solved
        gain, gain_stderr = paired(solved, right)
        seconds = sum(batch.metrics["time/rollout_s"] for batch in kept)
        found.append(
            {
                "sampler": name,
                "status": built[name].status,
                "exact": result.exact,
                "stderr": result.stderr,
                "gain": gain,
                "gain_stderr": gain_stderr,
                "nfe": result.nfe,
                "tokens_per_s": result.length * result.n / seconds,
                "overhead": 1 - (watch.trunk_s + watch.head_s) / seconds,
                "agreement": sum(a == b for a, b in zip(completions, wanted, strict=True)) / len(wanted),
                "calls": watch.calls,
                "seconds": seconds,
            }
        )
        progress(line_of(found[-1]))
    about = {"target": target, "task": recipe.task, "canvas": recipe.rollout.canvas, "n": len(rows)}
    made = manifest(device=denoiser.device, dtype=recipe.model.dtype, seeds={"run": recipe.run.seed})
    return {**about, "rows": found, "manifest": made}


def paired(solved: Sequence[bool], right: Sequence[bool]) -> tuple[float, float]:
    """Return the mean of solved - right over the same problems and its standard error (NaN for one problem)."""
    gaps = [float(a) - float(b) for a, b in zip(solved, right, strict=True)]
    n, mean = len(gaps), sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / (n - 1) if n > 1 else math.nan
    return mean, math.sqrt(variance / n)


HEADER = f"{'sampler':44} {'exact':>15} {'gain':>16} {'NFE':>7} {'tokens/s':>9} {'overhead':>9} {'agrees':>7}  log-prob"


def line_of(row: dict[str, Any]) -> str:
    """Return a row as one line under `HEADER`."""
    exact = f"{row['exact']:.3f} ± {row['stderr']:.3f}"
    gain = f"{row['gain']:+.3f} ± {row['gain_stderr']:.3f}"
    return (
        f"{row['sampler']:44} {exact:>15} {gain:>16} {row['nfe']:7.1f} {row['tokens_per_s']:9.0f} "
        f"{row['overhead']:9.1%} {row['agreement']:7.1%}  {row['status']}"
    )


def fitting(recipe: Recipe) -> list[str]:
    """Return the names of all rows of samplers.yaml that the recipe's canvas takes."""
    names = []
    for name in load_samplers():
        try:
            sampler_of(name, recipe)
        except RecipeError:
            continue
        names.append(name)
    return names


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw exact rate against NFE with standard errors; what no other row beats in both is joined by a line."""
    try:
        import matplotlib
    except ImportError as error:
        raise RecipeError("--plot: needs matplotlib; pip install 'unmask[plots]'.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = sorted(result["rows"], key=lambda row: (row["nfe"], -row["exact"]))
    figure, (axes, legend) = pyplot.subplots(1, 2, figsize=(12, 6), width_ratios=(3, 1), layout="constrained")
    axes.errorbar(
        [row["nfe"] for row in rows],
        [row["exact"] for row in rows],
        yerr=[row["stderr"] for row in rows],
        fmt="o",
        capsize=3,
        color="tab:blue",
    )
    best, front = -1.0, []
    for number, row in enumerate(rows, start=1):
        if row["exact"] > best:
            best = row["exact"]
            front.append(row)
        axes.annotate(str(number), (row["nfe"], row["exact"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    names = "\n".join(f"{number:2} {row['sampler']}" for number, row in enumerate(rows, start=1))
    legend.axis("off")
    legend.text(0, 1, names, va="top", family="monospace", fontsize=8)
    axes.plot([row["nfe"] for row in front], [row["exact"] for row in front], color="tab:orange", zorder=0)
    axes.set(xlabel="denoiser calls a completion (NFE)", ylabel=f"exact rate (n = {result['n']}, standard error)")
    knobs = (str(value) for value in result["task"].values() if value is not None)
    axes.set_title(f"{result['target']}: {', '.join(knobs)}; canvas {result['canvas']}, temperature 0", loc="left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
