"""Several processes on this machine: `launch` starts them, each `python -m unmask.rl.launch RECIPE` or a share."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..recipes.loading import dump_recipe, load_recipe
from ..recipes.schema import Recipe, SftRecipe
from . import evaluating, run
from .cli import is_ours, refuse
from .runfolder import COMMAND, command_line, run_folder, write_atomically

PATIENCE_S = 5.0  # ranks that fail together say so once


def launch(recipe: Recipe | SftRecipe, nproc: int, resume: Path | None) -> dict[str, Any]:
    """Run a recipe in `nproc` processes, as torchrun does, and return the summary that rank 0 wrote."""
    if resume is None:
        folder = run.free_folder(run_folder(recipe))
    elif isinstance(recipe, SftRecipe):
        folder = run.sft_checkpoint(resume).parent.parent
    else:
        folder, _ = run.place(recipe, resume)
    section = recipe.run.model_copy(update={"directory": str(folder.parent)})
    fixed = recipe.model_copy(update={"name": folder.name, "run": section})
    written = folder / "launch.yaml"
    write_atomically(written, dump_recipe(fixed))
    try:
        spawn(nproc, [str(written), *(["--resume", str(resume)] if resume else [])])
    finally:
        if sorted(folder.iterdir()) == [written]:  # no rank came as far as to begin
            written.unlink()
            folder.rmdir()
    return json.loads((folder / "summary.json").read_text())


def spawn(nproc: int, arguments: list[str]) -> None:
    """Run this module in `nproc` processes, as torchrun does; RunError when one of them fails."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    # The workers explain themselves; the launcher would add its own traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[run.WORKER] = "1"
    os.environ[COMMAND] = command_line()
    try:
        # -P keeps the current folder off the head of the path, where a user's file could shadow a library.
        elastic_launch(config, sys.executable)("-P", "-m", "unmask.rl.launch", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise run.RunError(
            f"{nproc} processes: rank {rank} ended with code {failure.exitcode}; the error above is the cause."
        ) from error
    finally:
        del os.environ[run.WORKER], os.environ[COMMAND]


def main(arguments: list[str]) -> int:
    """Run one rank; a refusal is one line and exit code 2, as on the command line."""
    resume = Path(arguments[arguments.index("--resume") + 1]) if "--resume" in arguments else None
    first = os.environ.get("RANK", "0") == "0"
    # As on the command line: a user's own rewards lie in the current folder, and can shadow nothing.
    sys.path.append(os.getcwd())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unmask").setLevel(logging.INFO if first else logging.WARNING)
    try:
        if arguments[0] == "--evaluate":
            evaluating.one_rank(Path(arguments[1]), Path(arguments[2]))
            return 0
        recipe = load_recipe(arguments[0])
        if isinstance(recipe, SftRecipe):
            run.sft(recipe, resume=resume)
        else:
            assert isinstance(recipe, Recipe), "pairs are trained on by one process"
            run.train(recipe, resume=resume)
    except ValueError as error:
        if not is_ours(error):
            raise
        if not first:
            time.sleep(PATIENCE_S)
        return refuse(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
