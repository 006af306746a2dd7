"""The commands `unmask data check` and `unmask reward check`; nothing heavy is imported before they run."""

from __future__ import annotations

from typing import Annotated

import typer

from ..recipes.registry import RecipeError
from .cli_arguments import JsonFile, RecipeArguments, check_output, one_target, write_result

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
    from ..recipes.preferences import PreferenceRecipe
    from .datacheck import data_check as examine

    target, overrides = one_target(arguments)
    check_output(json_file)
    recipe = load_recipe(target, overrides)
    if isinstance(recipe, PreferenceRecipe):
        raise RecipeError(f"kind: '{recipe.name}' has pairs and no tasks; `unmask check {target}` reads every pair.")
    reports = examine(recipe)
    write_result(json_file, [vars(report) for report in reports])


@reward_app.command("check")
def reward_check(
    arguments: RecipeArguments,
    rows: Annotated[int, typer.Option("--rows", min=2, help="Held-out problems.")] = 16,
    json_file: JsonFile = None,
) -> None:
    """Score gold answers, wrong ones and tricks.

    Gold answers must score 1, and no trick more than an honest wrong answer; exit code 1 otherwise.
    """
    from ..recipes.loading import load_recipe
    from ..recipes.schema import Recipe
    from .rewardcheck import reward_check as examine

    target, overrides = one_target(arguments)
    check_output(json_file)
    recipe = load_recipe(target, overrides)
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"kind: '{recipe.name}' is of kind {recipe.kind}; rewards are checked of one of kind rl.")
    findings = examine(recipe, rows)
    write_result(json_file, [vars(finding) for finding in findings])
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)
