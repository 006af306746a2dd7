"""`unmask bench`: parts measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_arguments import JsonFile, TargetArguments, check_output, one_target, write_result

bench = typer.Typer(help="Measure parts side by side.", rich_markup_mode=None)


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


@bench.command()
def estimators(
    length: Annotated[int, typer.Option(min=1, max=6, help="Positions of a completion.")] = 4,
    vocabulary: Annotated[int, typer.Option(min=2, max=6, help="Tokens.")] = 3,
    replicates: Annotated[int, typer.Option(min=2, help="Draws of every estimator.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the model, its rewards and the draws.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw gradient bias against deviation.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare likelihood estimators with the exact log-likelihood and policy gradient of a small enumerated model.

    Rollouts are drawn from left to right, a token a step. The columns: canvases a rollout, bias against log p and
    against the ELBO, standard deviation of an estimate; bias, cosine and deviation of the policy gradient.
    """
    from rich.console import Console

    from . import bench_estimators as bench_module

    for path in (json_file, plot):
        check_output(path)
    found = bench_module.bench_estimators(
        vocabulary=vocabulary, length=length, replicates=replicates, seed=seed, progress=typer.echo
    )
    console = Console()
    console.width = max(console.width, bench_module.WIDTH)  # a pipe has 80 columns, which would break the names
    console.print(bench_module.summary_table(found))
    typer.echo(f"the ELBO lies {found['elbo_gap']:.3f} nats below log p; ±: standard error over {replicates} draws")
    if plot is not None:
        bench_module.plot(found, plot)
        typer.echo(f"wrote {plot}")
    write_result(json_file, found)


@bench.command()
def policies(
    arguments: TargetArguments,
    planner: Annotated[
        list[str] | None, typer.Option(help="A trained planner's folder or run; may be repeated.")
    ] = None,
    block: Annotated[list[int] | None, typer.Option(help="Block length [default: 8, 16, 32, no blocks].")] = None,
    level: Annotated[list[float] | None, typer.Option(help="Threshold [default: 0.5, 0.7, 0.9].")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Trade-off that planners are told.")] = None,
    planner_block: Annotated[list[int] | None, typer.Option(help="Block length of planners [default: none].")] = None,
    temperature: Annotated[float, typer.Option(help="What planners' logits are divided by.")] = 0.5,
    only_planners: Annotated[bool, typer.Option("--only-planners", help="Leave the heuristics out.")] = False,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 256,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw exact rate against NFE.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Compare unmasking policies: accuracy against NFE of thresholds, counts, budgets, random orders and planners.

    Every heuristic is tried in every block length; the best constant at each trade-off is marked.
    """
    target, overrides = one_target(arguments, "run, model or recipe")
    for path in (json_file, plot):
        check_output(path)
    from . import bench_policies as bench_module
    from .targets import target_of, target_recipe

    canvas = target_recipe(target_of(target), overrides).rollout.canvas
    sizes = [size for size in (8, 16, 32) if canvas % size == 0 and size < canvas] + [canvas]
    lists = {"levels": level, "alphas": alpha, "planners": planner, "planner_blocks": planner_block}
    chosen = {name: tuple(values) for name, values in lists.items() if values}
    blocks = () if only_planners else tuple(block or sizes)
    grid = bench_module.Grid(blocks, temperature=temperature, **chosen)  # type: ignore[arg-type]
    typer.echo(bench_module.HEADER)
    found = bench_module.bench_policies(target, grid, problems=problems, overrides=overrides, progress=typer.echo)
    for line in bench_module.best_lines(found):
        typer.echo(line)
    if plot is not None:
        bench_module.plot(found, plot)
        typer.echo(f"wrote {plot}")
    write_result(json_file, found)
