"""`unmask evaluate --protocol` and `unmask compare`: policies under one protocol, side by side."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm

from ..recipes.registry import RecipeError
from .evaluation import Evaluating, Request, split_overrides
from .results import (
    Finished,
    check_same,
    difference,
    find_evaluations,
    finish,
    results_table,
    verdict_line,
)
from .runfolder import write_atomically, write_json
from .targets import target_of


def evaluate_under(
    target: str,
    protocol: str,
    *,
    samples: int = 1,
    seed: int = 0,
    problems: int | None = None,
    overrides: Sequence[str] = (),
    allow_code_execution: bool = False,
    nproc: int = 1,
) -> dict[str, Any]:
    """Evaluate a target under a protocol, a run beside the model that it started from; print and return the results."""
    running, places = split_overrides(overrides)
    request = Request(
        target=target,
        protocol=protocol,
        overrides=running,
        places=places,
        samples=samples,
        seed=seed,
        problems=problems,
        allow_code_execution=allow_code_execution,
    )
    temperature = request.resolved().temperature
    policies = ("base", "trained") if target_of(target).run is not None else ("model",)
    console = Console()
    if samples > 1 and temperature == 0:
        console.print(f"{protocol} is greedy: completions of a problem differ only where positions are drawn.")
    folders = [carry_out(replace(request, policy=policy), nproc=nproc) for policy in policies]
    return show([Finished.read(folder) for folder in folders], console)


def show(evaluations: Sequence[Finished], console: Console | None = None) -> dict[str, Any]:
    """Print evaluations of one protocol with their differences from the first, and return both."""
    console = console or Console()
    console.print(results_table(evaluations))
    found = []
    for other in evaluations[1:]:
        interval = difference(evaluations[0], other)
        pair = {"of": other.label, "from": evaluations[0].label}
        found.append({**pair, **interval._asdict(), "verdict": interval.verdict})
        console.print(verdict_line(evaluations[0], other), soft_wrap=True, highlight=False)
    for evaluation in evaluations:
        console.print(f"{evaluation.label}: {evaluation.folder}", soft_wrap=True, highlight=False)
    return {"results": [evaluation.summary for evaluation in evaluations], "differences": found}


def carry_out(request: Request, *, nproc: int = 1, folder: Path | None = None) -> Path:
    """Evaluate one policy, in `nproc` processes where there are several, and return the folder of its results."""
    if nproc > 1:
        from .launch import spawn

        with tempfile.TemporaryDirectory() as scratch:
            job, answer = Path(scratch) / "job.json", Path(scratch) / "folder"
            write_json(job, {"request": asdict(request), "folder": None if folder is None else str(folder)})
            spawn(nproc, ["--evaluate", str(job), str(answer)])
            folder = Path(answer.read_text(encoding="utf-8"))
    else:
        folder = work(request, folder)
    finish(folder)
    return folder


def work(request: Request, folder: Path | None = None, *, rank: int = 0, ranks: int = 1) -> Path:
    """Roll out and score one process's share, the first process with a progress bar, and return the folder."""
    opened = Evaluating.open(request)
    folder = folder or opened.folder()
    if rank == 0:
        opened.begin(folder)
    total = sum(end - start for _, _, start, end in opened.parts()[rank::ranks])
    unit = f" completion ({request.policy})"
    with tqdm(total=total, unit=unit, dynamic_ncols=True, disable=rank != 0) as bar:
        opened.write(folder, rank=rank, ranks=ranks, done=bar.update)
    return folder


def one_rank(job: Path, answer: Path) -> None:
    """Work as one of the processes that `carry_out` starts; the first of them says where the results lie."""
    folder = json.loads(job.read_text(encoding="utf-8"))["folder"]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    done = work(Request.read(job), None if folder is None else Path(folder), rank=rank, ranks=ranks)
    if rank == 0:
        write_atomically(answer, str(done))


def compare(names: Sequence[str]) -> dict[str, Any]:
    """Compare evaluations, or all those of runs, with the first; print and return differences and intervals."""
    evaluations = [found for name in names for found in find_evaluations(name)]
    if len(evaluations) < 2:
        raise RecipeError(f"compare: {len(evaluations)} evaluation is named; at least two are compared.")
    check_same(evaluations)
    return show(evaluations)
