"""The command `unmask`; nothing heavy is imported before a command runs, so that `--help` is instant."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from ..recipes.registry import RecipeError
from .cli_arguments import (
    JsonFile,
    OptionalRecipe,
    Processes,
    RecipeArguments,
    Resume,
    TargetArguments,
    check_output,
    one_target,
    write_result,
)
from .cli_bench import bench
from .cli_checks import data_app, reward_app
from .cli_reading import report, view
from .cli_results import compare, evaluate, protocols, reproduce, rollouts

app = typer.Typer(
    name="unmask",
    help="Reinforcement-learning post-training of diffusion language models. A run is one YAML recipe.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(data_app, name="data")
app.add_typer(reward_app, name="reward")
for reading in (report, view):
    app.command()(reading)
# typer brings its own copy of click in newer versions; its public exception leads to the base class in either.
USAGE_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


COMMANDS = {"rl": "train", "sft": "sft", "preference": "prefer"}  # what runs a recipe of each kind


def _load(target: str, overrides: list[str], kind: str) -> Any:
    from ..recipes.loading import load_recipe

    recipe = load_recipe(target, overrides)
    if recipe.kind != kind:
        command = COMMANDS[recipe.kind]
        raise RecipeError(f"kind: '{recipe.name}' is a recipe of kind {recipe.kind}; run `unmask {command} {target}`.")
    return recipe


def _check_launch(recipe: Any, nproc: int) -> None:
    """Check data and number of processes, before the import of what reads weights makes the user wait."""
    from ..recipes.crosschecks import check_data, check_world

    check_world(recipe, nproc)
    check_data(recipe)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(f"unmask {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    arguments: OptionalRecipe = None, nproc: Processes = 1, resume: Resume = None, json_file: JsonFile = None
) -> None:
    """Train by reinforcement learning.

    With --resume alone, the run's own recipe is used.
    """
    target, overrides = one_target(arguments, otherwise=resume)
    check_output(json_file)
    recipe = _load(target, overrides, "rl")
    _check_launch(recipe, nproc)
    from . import run

    write_result(json_file, run.train(recipe, nproc=nproc, resume=resume))


@app.command()
def sft(
    arguments: OptionalRecipe = None, nproc: Processes = 1, resume: Resume = None, json_file: JsonFile = None
) -> None:
    """Train on worked solutions (recipes of kind sft)."""
    target, overrides = one_target(arguments, otherwise=resume)
    check_output(json_file)
    recipe = _load(target, overrides, "sft")
    _check_launch(recipe, nproc)
    from . import run

    write_result(json_file, run.sft(recipe, nproc=nproc, resume=resume))


app.command()(evaluate)
app.command()(compare)
app.command()(reproduce)
app.command()(rollouts)
app.command()(protocols)


@app.command()
def prefer(arguments: RecipeArguments, json_file: JsonFile = None) -> None:
    """Train on pairs of completions (recipes of kind preference).

    The pairs stand in a file, or are those of a run's stored rollouts.
    """
    target, overrides = one_target(arguments)
    check_output(json_file)
    recipe = _load(target, overrides, "preference")
    from . import preference_run

    result = preference_run.prefer(recipe)
    typer.echo(f"{result['pairs']} pairs, {result['steps']} steps, loss {result['loss']:.4f}; in {result['folder']}")
    write_result(json_file, result)


@app.command()
def sample(
    arguments: TargetArguments,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Prompt; without it a held-out problem.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Several completions side by side, redrawn in place.")] = False,
    group: Annotated[int, typer.Option("--group", min=1, help="Completions, with --live.")] = 4,
    speed: Annotated[float, typer.Option("--speed", min=0.1, help="Steps a second at most, with --live.")] = 8.0,
) -> None:
    """Show a canvas being unmasked in the terminal."""
    target, overrides = one_target(arguments, "run, model or recipe")
    from . import show

    show.sample(target, prompt=prompt, overrides=overrides, live=live, group=group if live else 1, speed=speed)


@app.command()
def check(
    arguments: RecipeArguments,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print the recipe with every default as YAML.")] = False,
    nproc: Annotated[
        int | None, typer.Option("--nproc", min=1, help="Processes [default: 1, or up to 8 for a sharded model].")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Check a recipe without reading weights.

    Prints what the run will do: canvas, NFE at most, rollouts and forwards a step.
    """
    target, overrides = one_target(arguments)
    check_output(json_file)
    from ..recipes.loading import dump_recipe, load_recipe
    from .cli_summary import print_summary, summary

    recipe = load_recipe(target, overrides)
    facts = summary(recipe, target, nproc)
    if resolved:
        typer.echo(dump_recipe(recipe), nl=False)
    else:
        print_summary(facts)
    write_result(json_file, facts)


@app.command()
def parts(slot: Annotated[str | None, typer.Argument(show_default=False)] = None) -> None:
    """List parts, their knobs and defaults.

    Of every slot, or of the one that is named.
    """
    from .cli_summary import print_parts

    print_parts(slot)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(show_default=False)] = None) -> None:
    """List methods, or show the choices of one."""
    from .cli_summary import print_methods

    print_methods(name)


@app.command()
def samplers(name: Annotated[str | None, typer.Argument(show_default=False)] = None) -> None:
    """List named samplers, or show the choices of one."""
    from .cli_summary import print_samplers

    print_samplers(name)


@app.command()
def cp(
    recipe: Annotated[str | None, typer.Argument(show_default=False)] = None,
    target: Annotated[Path | None, typer.Argument(show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the target.")] = False,
) -> None:
    """Copy a shipped recipe to a file of your own.

    Without arguments, the shipped recipes are listed.
    """
    from .cli_summary import copy_recipe, print_recipes

    if recipe is None:
        print_recipes()
    else:
        path = copy_recipe(recipe, target or Path("."), force=force)
        typer.echo(f"wrote {path}; next: unmask check {path}")


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="File to write; default: standard output.")
    ] = None,
) -> None:
    """Write the JSON schema of recipes for editors."""
    from ..recipes.editor import schema_text

    check_output(out)
    if out is None:
        typer.echo(schema_text(), nl=False)
    else:
        out.write_text(schema_text(), encoding="utf-8")


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option("--model", help="Model to self-check [default: unmask:tiny].")] = None,
    family: Annotated[str | None, typer.Option("--family", help="Family of --model, where it is ambiguous.")] = None,
    mask: Annotated[int | None, typer.Option("--mask-token-id", help="Mask id, where config.json has none.")] = None,
    block: Annotated[int | None, typer.Option("--block-length", help="Block, where config.json has none.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Print versions, devices and what is wrong."""
    check_output(json_file)
    from .doctor import doctor as examine

    write_result(json_file, examine(model=model, family=family, mask_token_id=mask, block_length=block))


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's folder, or one of its checkpoints.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.")],
    layout: Annotated[str, typer.Option("--layout", help="vendor: published names; stock: transformers'.")] = "vendor",
    dtype: Annotated[str | None, typer.Option("--dtype", help="dtype of the weights [default: the recipe's].")] = None,
    json_file: JsonFile = None,
) -> None:
    """Write a run's policy as one model folder.

    The adapter is merged into its base in float32, and the result is verified.
    """
    check_output(json_file)
    from .export import export as write

    write_result(json_file, write(run, to, layout=layout, dtype=dtype))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or .gguf file (Llama, Qwen2, Qwen3).")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.")],
    attention: Annotated[str, typer.Option("--attention", help="full or block_causal.")] = "full",
    block_length: Annotated[int | None, typer.Option("--block-length", help="Tokens of a block.")] = None,
    logit_shift: Annotated[int, typer.Option("--logit-shift", help="1 keeps predicting the next token.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
) -> None:
    """Make a denoiser of an autoregressive model.

    The folder is ready for `unmask sft`.
    """
    from ..policies.convert import convert as make

    make(source, to, attention=attention, block_length=block_length, logit_shift=logit_shift, dtype=dtype)
    typer.echo(f"wrote {to}; next: unmask sft RECIPE model.path={to}")


def is_ours(error: BaseException) -> bool:
    """Tell whether an error is unmask's own refusal, not a ValueError of a bug or of a dependency."""
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, ValueError) and "unmask" in modules


def refuse(message: str) -> int:
    """Print one line `error: ...` on standard error and return exit code 2."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2


def main() -> None:
    """Run the command line; a refusal is one line on standard error and exit code 2."""
    # A user's own rewards lie where the command is run; last on the path, they can shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unmask").setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)
    except USAGE_ERROR as error:
        code = refuse(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        sys.stderr.write("interrupted\n")
        code = 130
    except BrokenPipeError:
        # The reader (`| head`) has gone; pointing stdout elsewhere keeps the interpreter's flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except ValueError as error:
        if not is_ours(error):
            raise
        code = refuse(str(error))
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
