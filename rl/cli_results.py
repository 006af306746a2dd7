"""`unmask evaluate | compare | reproduce | rollouts | protocols`: results and what they were made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..recipes.registry import RecipeError
from .cli_arguments import JsonFile, Processes, TargetArguments, check_output, one_target, write_result


def evaluate(
    arguments: TargetArguments,
    protocol: Annotated[
        str | None, typer.Option("--protocol", metavar="NAME", help="A named protocol, or a YAML file with one.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Completions a problem, each of its own seed.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The first seed.")] = 0,
    problems: Annotated[int | None, typer.Option("--problems", min=1, help="Held-out problems.")] = None,
    code: Annotated[bool, typer.Option("--allow-code-execution", help="Run model-written code, sandboxed.")] = False,
    nproc: Processes = 1,
    json_file: JsonFile = None,
) -> None:
    """Measure the held-out exact rate.

    Under a named protocol, a run beside the model it started from; without one, as the recipe evaluates.
    """
    target, overrides = one_target(arguments, "run, model or recipe")
    check_output(json_file)
    if protocol is None:
        if samples > 1 or seed or nproc > 1 or code:
            raise RecipeError("evaluate: --samples, --seed, --nproc and --allow-code-execution need --protocol NAME.")
        from . import run

        write_result(json_file, run.evaluate(target, overrides=overrides, problems=problems))
        return
    from .evaluating import evaluate_under

    result = evaluate_under(
        target,
        protocol,
        samples=samples,
        seed=seed,
        problems=problems,
        overrides=overrides,
        allow_code_execution=code,
        nproc=nproc,
    )
    write_result(json_file, result)


def compare(
    names: Annotated[list[str], typer.Argument(metavar="A B [...]", help="Evaluations, or runs with evaluations.")],
    json_file: JsonFile = None,
) -> None:
    """Compare evaluations with the first of them.

    Paired differences by problem; better or worse is said only where the 95 % interval excludes zero.
    """
    check_output(json_file)
    from .evaluating import compare as compare_evaluations

    write_result(json_file, compare_evaluations(names))


def reproduce(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run or an evaluation.")],
    json_file: JsonFile = None,
) -> None:
    """Run a run or an evaluation again.

    Every difference is reported; exit code 1 where there is one.
    """
    check_output(json_file)
    from .reproducing import reproduce as repeat

    result = repeat(folder)
    write_result(json_file, result)
    if not result["same"]:
        raise typer.Exit(1)


def rollouts(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run or an evaluation.")],
    query: Annotated[str | None, typer.Option("--query", metavar="TEXT", help="Which rollouts.")] = None,
    columns: Annotated[str | None, typer.Option("--columns", metavar="A,B,...", help="What of them.")] = None,
    sort: Annotated[str | None, typer.Option("--sort", metavar="[-]COLUMN", help="Order; - is descending.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rollouts printed.")] = 20,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="Write all to .parquet or .jsonl.")] = None,
) -> None:
    """Search a run's rollouts.

    For example --query 'outcome == "wrong" and reward > 0 and "####" in completion'.
    """
    from .querying import show_rollouts

    show_rollouts(folder, query=query, columns=columns, sort=sort, limit=limit, to=to)


def protocols(name: Annotated[str | None, typer.Argument(show_default=False)] = None) -> None:
    """List evaluation protocols, or show what one fixes."""
    from .cli_summary import print_protocols

    print_protocols(name)
