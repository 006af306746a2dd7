"""What a command line names: a run, one of its checkpoints, a recipe or a model folder, opened for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from ..policies.denoiser import Denoiser
from ..policies.loading import TINY, load_denoiser
from ..recipes.loading import load_recipe
from ..recipes.preferences import PreferenceRecipe
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe
from ..rewards import Scorer
from ..rollouts.sampler import build_sampler
from ..rollouts.worker import RolloutWorker
from .checkpoints import MARKER, checkpoint_to_resume, complete_checkpoints
from .planning_setup import with_planner
from .runfolder import RunError, run_folder
from .settings import device_of, quiet_peft, scoring_of


def load_policy(recipe: Recipe | PreferenceRecipe, path: Path | None = None) -> Denoiser:
    """Return the recipe's denoiser without adapter, or the one in the folder `path` loaded the same way."""
    section = recipe.model
    return load_denoiser(
        section.path if path is None else str(path),
        dtype=section.dtype,
        device=device_of(section.device),
        family=section.family,
        attention=section.attention,
        mask_token_id=section.mask_token_id,
        block_length=section.block_length,
        context=section.context,
        quantization=section.quantization,
    )


@dataclass(frozen=True)
class Target:
    """What a name on the command line stands for: a run (and one of its checkpoints), a model, or else a recipe."""

    name: str
    run: Path | None = None
    checkpoint: Path | None = None
    model: str | None = None


def target_of(name: str) -> Target:
    """Return what a name stands for; nothing but the names of files is looked at."""
    folder = Path(name).expanduser()
    is_model = (folder / "config.json").is_file() and not (folder / MARKER).is_file()
    # A hub id is no path: where its first half is a folder, a file below it was meant.
    is_hub_id = name.count("/") == 1 and name[0] not in "./~" and not folder.parent.exists()
    is_recipe = folder.suffix == ".yaml" or folder.parent.name == "recipes"
    if name == TINY or is_model or (is_hub_id and not is_recipe):
        return Target(name, model=name)
    if not folder.is_dir():
        return Target(name)
    checkpoint = checkpoint_to_resume(folder) if folder.name.startswith("checkpoint-") else None
    return Target(name, run=folder if checkpoint is None else checkpoint.parent, checkpoint=checkpoint)


def open_target(target: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Denoiser]:
    """Return the recipe and the denoiser (adapter on) of a run, one of its checkpoints, a recipe or a model."""
    found = target_of(target)
    recipe = target_recipe(found, overrides)
    if found.run is None:
        return recipe, load_policy(recipe)
    if recipe.planner is not None:
        recipe = with_planner(recipe, found.checkpoint or found.run)
        if "tokens" not in recipe.objective.actions:
            return recipe, load_policy(recipe)
    return recipe, _trained(recipe, found.run, found.checkpoint)


def open_base(target: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Denoiser]:
    """Return the recipe of a target and the model that its training started from."""
    recipe = target_recipe(target_of(target), overrides)
    return recipe, load_policy(recipe)


def target_recipe(found: Target, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a run, the recipe that is named, or one that holds nothing but a model."""
    if found.model is not None:
        recipe = load_recipe("cj_grpo_tiny_arithmetic.yaml", [*overrides, f"model.path={found.model}"])
        assert isinstance(recipe, Recipe)
        return recipe
    recipe = load_recipe(found.run or found.name, overrides)
    if not isinstance(recipe, Recipe):
        model = (found.run or run_folder(recipe)) / "model"
        raise RecipeError(f"'{found.name}' is a run or recipe of kind {recipe.kind}; name its model folder ({model}).")
    return recipe


def _trained(recipe: Recipe, folder: Path, checkpoint: Path | None) -> Denoiser:
    """Return the policy that a run ended with, or that one of its checkpoints holds."""
    adapter = checkpoint if recipe.model.lora is not None and checkpoint else folder / "adapter"
    if (adapter / "adapter_config.json").is_file():
        denoiser = load_policy(recipe)
        with quiet_peft():
            return replace(denoiser, model=PeftModel.from_pretrained(denoiser.model, str(adapter)).eval())
    if checkpoint is not None:
        denoiser = load_policy(recipe)
        denoiser.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
        return denoiser
    if (folder / "model" / "config.json").is_file():
        return load_policy(recipe, folder / "model")
    found = complete_checkpoints(folder)
    remedy = f"evaluate {found[-1]}, or finish it (unmask train --resume {folder})" if found else "train it first"
    raise RunError(f"'{folder}' holds neither adapter nor model, the run has not finished; {remedy}.")


def evaluation_worker(recipe: Recipe, denoiser: Denoiser, rewards: Any) -> RolloutWorker:
    """Return the worker that decodes as a recipe's evaluation does."""
    temperature = recipe.evaluation.temperature
    sampler = build_sampler(
        (recipe.evaluation.sampler or recipe.rollout.sampler).model_dump(),
        temperature=recipe.rollout.temperature if temperature is None else temperature,
    )
    return RolloutWorker(
        denoiser=denoiser,
        tokenizer=denoiser.tokenizer,
        sampler=sampler,
        scorer=Scorer(rewards, scoring_of(recipe)),
        group=1,
        canvas=recipe.rollout.canvas,
        prompt_limit=recipe.rollout.prompt_limit,
        seed=recipe.run.seed,
        micro_batch=recipe.rollout.micro_batch,
        start=SLOTS["canvas"].build(recipe.rollout.start, "rollout.start"),
    )
