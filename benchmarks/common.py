"""What benchmarks share: where results go, the manifest beside them, and runs that are not made twice."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unmask.rl.runfolder import manifest, write_json

RESULTS = Path(__file__).parent / "results"


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Return mean and standard error of the mean (n - 1 in the variance)."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return {"mean": mean, "stderr": math.sqrt(variance / n) if n > 1 else math.nan, "n": n}


def paired_gain(rows: list[dict[str, Any]], rival: dict[str, Any]) -> dict[str, float]:
    """Return by how much rows of several seeds solve more than a rival on the same problems, and in how many errors.

    The error is that of the mean difference over problems (each seed's share of the mean) beside the spread over seeds.
    """
    gains = [sum(int(row["solved"][i]) for row in rows) / len(rows) - int(bit) for i, bit in enumerate(rival["solved"])]
    over_problems = mean_and_error(gains)
    over_seeds = mean_and_error([row["exact"] for row in rows])["stderr"] if len(rows) > 1 else 0.0
    error = math.hypot(over_problems["stderr"], over_seeds)
    mean = over_problems["mean"]
    return {"mean": mean, "stderr": error, "errors": mean / error if error else math.nan, "n": len(gains)}


def save(
    name: str,
    result: dict[str, Any],
    path: Path | None,
    *,
    seeds: dict[str, int],
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Write `result` with a manifest to `path`, or to benchmarks/results/NAME.json."""
    target = path or RESULTS / f"{name}.json"
    record = {"benchmark": name, "result": result, "manifest": manifest(device=device, dtype=dtype, seeds=seeds)}
    # The error of a single value is no number, which JSON has no word for but null.
    write_json(target, json.loads(json.dumps(record), parse_constant=lambda word: None))
    return target


def unmask(folder: Path, *words: str) -> dict[str, Any]:
    """Run a command of unmask in a process of its own and return its JSON, which goes through `folder`."""
    output = folder / "answer.json"
    command = [sys.executable, "-m", "unmask.rl.cli", *words, "--json", str(output)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(output.read_text())


def trained(folder: Path, recipe: str, name: str, *words: str) -> Path:
    """Return the run `name` of a folder, trained unless it is there."""
    if not (folder / name / "summary.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unmask(folder, "train", recipe, *words, f"name={name}", f"run.directory={folder}")
    return folder / name


def by_folder(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `unmask bench policies` in which planners go by their folders' names."""
    return [row | {"kind": " ".join(Path(word).name for word in row["kind"].split(" ", 1))} for row in rows]


def held(path: Path) -> dict[str, Any]:
    """Return the result that a file holds, nothing where there is none."""
    return json.loads(path.read_text())["result"] if path.is_file() else {}


def side_by_side_arguments(
    about: str | None, name: str, arms: Sequence[str], *, called: str, steps: int
) -> argparse.ArgumentParser:
    """Return a parser of what benchmarks share that compare arms (`called` methods, for one) over seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{called}", nargs="+", default=list(arms), choices=list(arms), dest="arms")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="first seed: shares of the work that several machines do")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("overrides", nargs="*")
    return parser


def side_by_side(
    arguments: argparse.Namespace,
    *,
    key: str,
    run: Callable[[str, int, argparse.Namespace], dict[str, Any]],
    keep: Callable[[list[dict[str, Any]], dict[str, Any], argparse.Namespace], Any],
    before: Callable[[int, argparse.Namespace], dict[str, Any]] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a run of each arm and seed, and by seed what `before` says; those that the result file holds are not made.

    An entry names its arm by `key`, its `seed` and its `steps`. `keep` is told of whatever is new at once.
    """
    runs, base = (held(arguments.json).get(name, empty) for name, empty in (("runs", []), ("base", {})))
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        if before is not None and str(seed) not in base:
            base[str(seed)] = before(seed, arguments)
        done = {(entry[key], entry["seed"], entry["steps"]) for entry in runs}
        for arm in arguments.arms:
            if (arm, seed, arguments.steps) not in done:
                runs.append(run(arm, seed, arguments))
                rates = f"{base[str(seed)]['exact']:.3f} -> {runs[-1]['after']:.3f} " if base else ""
                print(f"{arm} seed {seed}: {rates}in {runs[-1]['wall_s']:.0f} s", flush=True)
                keep(runs, base, arguments)
    return runs, base
