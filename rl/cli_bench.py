"""`unmask bench`: parts measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_arguments import JsonFile, TargetArguments, check_output, one_target, write_result

bench = typer.Typer(help="Measure parts side by side.", rich_markup_mode=None)


@bench.callback()
def _group() -> None:
    """Keep `rollout` a word of its own while it is the only one."""


@bench.command()
def rollout(
    arguments: TargetArguments,
    sampler: Annotated[
        list[str] | None, typer.Option("--sampler", help="NAME or NAME:key=value,...; `recipe` is the recipe's own.")
    ] = None,
    reference: Annotated[str, typer.Option(help="The sampler whose completions the others are compared with.")] = (
        "llada_low_confidence"
    ),
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 256,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw exact rate against NFE.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Decode the same problems with several samplers (default: all shipped ones) at temperature 0.

    Prints exact rate, its difference to the reference's (paired), NFE, tokens a second, the share of the time outside
    the denoiser, and agreement.
    """
    target, overrides = one_target(arguments, "run, model or recipe")
    for path in (json_file, plot):
        check_output(path)
    from . import bench_rollout as bench_module

    typer.echo(bench_module.HEADER)
    found = bench_module.bench_rollout(
        target, sampler or None, reference=reference, problems=problems, overrides=overrides, progress=typer.echo
    )
    if plot is not None:
        bench_module.plot(found, plot)
        typer.echo(f"wrote {plot}")
    write_result(json_file, found)
