"""`unmask reproduce`: run a run or an evaluation again from what its folder holds, and report every difference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
from rich.console import Console
from rich.table import Table

from ..recipes.loading import load_recipe
from ..recipes.preferences import PreferenceRecipe
from ..recipes.reading import RESOLVED
from ..recipes.schema import SftRecipe
from . import run
from .evaluating import carry_out
from .evaluation import MANIFEST, REQUEST, ROLLOUTS, Request
from .results import SUMMARY
from .runfolder import RunError

# What a repetition may not be held to: clocks, and the names of folders.
CLOCKS = ("wall_s", "tokens_per_s", "folder", "run")
# What of a manifest differs between any two runs.
MOMENTS = ("time", "command", "wall_s")
SHOWN = 20  # differences printed; all are in the result


def reproduce(folder: Path) -> dict[str, Any]:
    """Repeat a run beside its folder, or an evaluation in a folder of its own; return and print the differences.

    `results` are the numbers that differ, `surroundings` the entries of the manifests that do. Raises RunError for a
    folder that holds neither a finished run nor a finished evaluation.
    """
    folder = folder.expanduser()
    if not (folder / SUMMARY).is_file() or not (folder / MANIFEST).is_file():
        raise RunError(f"'{folder}' holds no finished run or evaluation ({SUMMARY} and {MANIFEST}); nothing to repeat.")
    ranks = int(json.loads((folder / MANIFEST).read_text())["ranks"])
    if (folder / REQUEST).is_file():
        again = run.free_folder(folder / "again")
        carry_out(Request.read(folder / REQUEST), nproc=ranks, folder=again)
        results = [*_differences(_json(folder / SUMMARY), _json(again / SUMMARY)), *_rollouts(folder, again)]
    else:
        again = run.free_folder(folder.with_name(f"{folder.name}-again"))
        _repeat_run(folder, again, ranks)
        results = [*_differences(_json(folder / SUMMARY), _json(again / SUMMARY)), *_metrics(folder, again)]
    surroundings = _differences(_json(folder / MANIFEST), _json(again / MANIFEST), skip=MOMENTS)
    _show(folder, again, results, surroundings)
    return {"again": str(again), "same": not results, "results": results, "surroundings": surroundings}


def _repeat_run(folder: Path, again: Path, ranks: int) -> None:
    recipe = load_recipe(folder / RESOLVED)
    if isinstance(recipe, PreferenceRecipe):
        raise RunError(f"reproduce: '{folder}' is a run of kind preference; run `unmask prefer {folder / RESOLVED}`.")
    section = recipe.run.model_copy(update={"directory": str(again.parent)})
    changed = recipe.model_copy(update={"name": again.name, "run": section})
    if isinstance(changed, SftRecipe):
        run.sft(changed, nproc=ranks)
    else:
        run.train(changed, nproc=ranks)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _differences(old: Any, new: Any, *, skip: tuple[str, ...] = CLOCKS) -> list[dict[str, Any]]:
    """Return every entry of two nested records that differs."""
    one, other = run.flat(old), run.flat(new)
    keys = [key for key in sorted(one.keys() | other.keys()) if key.rpartition(".")[2] not in skip]
    pairs = ((key, one.get(key), other.get(key)) for key in keys)
    return [{"what": key, "was": was, "is": now} for key, was, now in pairs if not same(was, now)]


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, NaN with itself."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
        return True
    return bool(one == other)


def _rollouts(folder: Path, again: Path) -> list[dict[str, Any]]:
    """Return, for each column of the rollouts, how many entries differ."""
    counts: dict[str, int] = {}
    for path in sorted((folder / ROLLOUTS).glob("*.parquet")):
        old, new = (pyarrow.parquet.read_table(where / ROLLOUTS / path.name) for where in (folder, again))
        for name in old.column_names:
            if name != "seconds":
                pairs = zip(old[name].to_pylist(), new[name].to_pylist(), strict=True)
                counts[name] = counts.get(name, 0) + sum(not same(a, b) for a, b in pairs)
    return [{"what": f"rollouts, {name}", "was": 0, "is": count} for name, count in counts.items() if count]


def _metrics(folder: Path, again: Path) -> list[dict[str, Any]]:
    """Return, for each metric of a run, at which step it first differs, and by how much at most."""
    files = [where / "metrics.jsonl" for where in (folder, again)]
    if not all(file.is_file() for file in files):
        return []
    old, new = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    found: dict[str, dict[str, Any]] = {}
    if len(old) != len(new):
        found["lines"] = {"what": "metrics.jsonl, lines", "was": len(old), "is": len(new)}
    for one, other in zip(old, new, strict=False):
        for key in sorted(one.keys() | other.keys()):
            was, now = one.get(key), other.get(key)
            if same(was, now):
                continue
            first = {"what": f"metrics, {key}", "first_step": one.get("step"), "was": was, "is": now}
            entry = found.setdefault(key, first)
            if isinstance(was, int | float) and isinstance(now, int | float):
                entry["largest"] = max(entry.get("largest", 0.0), abs(was - now))
    return list(found.values())


def _show(folder: Path, again: Path, results: list[dict[str, Any]], surroundings: list[dict[str, Any]]) -> None:
    console = Console()
    for title, rows in (("results that differ", results), ("surroundings that differ", surroundings)):
        if rows:
            table = Table("", "was", "is", title=title)
            for row in rows[:SHOWN]:
                where = f" (from step {row['first_step']})" if "first_step" in row else ""
                table.add_row(f"{row['what']}{where}", str(row["was"]), str(row["is"]))
            console.print(table)
            if len(rows) > SHOWN:
                console.print(f"... and {len(rows) - SHOWN} more (--json FILE)")
    verdict = f"{len(results)} results differ" if results else "every result is the same, bit for bit"
    console.print(f"{folder} again in {again}: {verdict}", soft_wrap=True, highlight=False)
