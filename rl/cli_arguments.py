"""What the commands share: the forms of their arguments, and where results go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..recipes.registry import RecipeError

RecipeArguments = Annotated[list[str], typer.Argument(metavar="RECIPE [KEY.PATH=VALUE]...", show_default=False)]
OptionalRecipe = Annotated[list[str] | None, typer.Argument(metavar="[RECIPE] [KEY.PATH=VALUE]...", show_default=False)]
TargetArguments = Annotated[
    list[str], typer.Argument(metavar="RUN_OR_MODEL_OR_RECIPE [KEY.PATH=VALUE]...", show_default=False)
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result to FILE as JSON.")]
Processes = Annotated[int, typer.Option("--nproc", min=1, help="Processes (torchrun is started for more than one).")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Continue this run or checkpoint folder.")]


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return (names, overrides): what contains `=` is an override."""
    overrides = [argument for argument in arguments if "=" in argument]
    return [argument for argument in arguments if "=" not in argument], overrides


def one_target(
    arguments: list[str] | None, what: str = "recipe", otherwise: Path | None = None
) -> tuple[str, list[str]]:
    """Return (target, overrides) of a command that takes one target."""
    names, overrides = split_arguments(arguments or [])
    if not names and otherwise is not None:
        names = [str(otherwise)]
    if len(names) != 1:
        got = f"got {len(names)}: {', '.join(names)}" if names else "got none"
        raise RecipeError(f"name one {what} ({got}); overrides are written key.path=value.")
    return names[0], overrides


def check_output(path: Path | None) -> None:
    """Refuse a result file that cannot be written, before the work and not after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise RecipeError(f"--json: cannot write '{path}'; its folder must exist and it must be no folder itself.")


def write_result(path: Path | None, value: Any) -> None:
    """Write a command's result as JSON where a file was named."""
    if path is not None:
        path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
