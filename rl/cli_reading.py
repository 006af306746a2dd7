"""The commands that show a run: `unmask report` and `unmask view`; nothing heavy is imported before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.registry import RecipeError
from .cli_arguments import split_arguments

Out = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="File to write [default: in the run's folder].")
]


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Out = None,
    watch: Annotated[bool, typer.Option("--watch", help="Write it again while the run goes on.")] = False,
    every: Annotated[float, typer.Option("--every", min=1.0, help="Seconds between two, with --watch.")] = 30.0,
) -> None:
    """Write a run's report as one HTML file.

    Held-out results, rewards, health of the updates, speed, samples, recipe and manifest.
    """
    _check(run, out)
    from .report import report as write
    from .report import watch as keep

    if watch:
        keep(run, out, every_s=every, told=lambda path: typer.echo(f"wrote {path}"))
    else:
        typer.echo(f"wrote {write(run, out)}")


def view(
    arguments: Annotated[list[str], typer.Argument(metavar="RUN... [KEY.PATH=VALUE]...", show_default=False)],
    out: Out = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rollouts of each run at most.")] = 10_000,
    heldout: Annotated[
        int | None, typer.Option("--heldout", min=1, help="Roll out so many held-out problems with each target.")
    ] = None,
) -> None:
    """Write rollouts as one HTML page to play.

    Several runs, or checkpoints with --heldout, are shown beside each other on the same prompts.
    """
    targets, overrides = split_arguments(arguments)
    if not targets:
        raise RecipeError("view: name a run's folder (unmask view runs/NAME).")
    if heldout is None:
        if overrides:
            raise RecipeError(f"view: {overrides[0]} changes nothing of stored rollouts; add --heldout N, or leave it.")
        for target in targets:
            _check(Path(target), out)
        from .viewing import view as write

        typer.echo(f"wrote {write([Path(target) for target in targets], out, limit=limit)}")
        return
    from .viewing import view_heldout

    typer.echo(f"wrote {view_heldout(targets, out or Path('view.html'), problems=heldout, overrides=overrides)}")


def _check(run: Path, out: Path | None) -> None:
    """Raise RecipeError for a folder that is none, or a file that cannot be written, before anything heavy is read."""
    if not run.is_dir():
        raise RecipeError(f"'{run}' is no run's folder; runs lie in run.directory (runs/NAME).")
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise RecipeError(f"--out: cannot write '{out}'; its folder must exist and it must be no folder itself.")
