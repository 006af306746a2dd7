"""What torchrun starts on every rank: `python -m unmask.rl.launch RECIPE [--resume DIR]`."""

from __future__ import annotations

import sys
from pathlib import Path

from ..recipes.loading import load_recipe
from ..recipes.schema import SftRecipe
from . import run
from .cli import is_ours, refuse


def main(arguments: list[str]) -> int:
    """Run one rank; a refusal is one line and exit code 2, as on the command line."""
    resume = Path(arguments[arguments.index("--resume") + 1]) if "--resume" in arguments else None
    try:
        recipe = load_recipe(arguments[0])
        if isinstance(recipe, SftRecipe):
            run.sft(recipe, resume=resume)
        else:
            run.train(recipe, resume=resume)
    except ValueError as error:
        if not is_ours(error):
            raise
        return refuse(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
