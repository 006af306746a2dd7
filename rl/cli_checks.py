"""The commands `unmask data check` and `unmask reward check`; nothing heavy is imported before they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArguments = Annotated[list[str], typer.Argument(metavar="RECIPE [KEY.PATH=VALUE]...", show_default=False)]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to FILE as JSON.")]
data_app = typer.Typer(help="Look at a recipe's data without a model.")
reward_app = typer.Typer(help="Try a recipe's rewards without a model.")


@data_app.callback()
def _data() -> None:
    """Look at a recipe's data without a model."""


@reward_app.callback()
def _reward() -> None:
    """Try a recipe's rewards without a model."""


@data_app.command("check")
def data_check(arguments: RecipeArguments, json_file: JsonFile = None) -> None:
    """Check every row of a recipe's task.

    Prompts, columns and what rewards read of them, lengths in tokens, duplicates between training and held-out rows.
    """
    from ..recipes.loading import load_recipe
    from . import cli
    from .datacheck import data_check as examine

    target, overrides = cli.one_target(arguments)
    cli.check_output(json_file)
    reports = examine(load_recipe(target, overrides))
    cli.write_json(json_file, [vars(report) for report in reports])


@reward_app.command("check")
def reward_check(
    arguments: RecipeArguments,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Held-out problems.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Score gold answers, wrong ones and tricks.

    Gold answers must score 1, and no trick more than an honest wrong answer; exit code 1 otherwise.
    """
    from . import cli
    from .rewardcheck import reward_check as examine

    target, overrides = cli.one_target(arguments)
    cli.check_output(json_file)
    findings = examine(cli.load(target, overrides, "rl"), rows)
    cli.write_json(json_file, [vars(finding) for finding in findings])
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)
