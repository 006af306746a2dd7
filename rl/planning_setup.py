"""From a recipe's `planner` section to what the trainer is given, and back from a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..policies.planner import FILE, Planner, PlannerSpec, fingerprint_of, load_planner, new_planner
from ..recipes.planning import PlannerSection
from ..recipes.registry import SLOTS, RecipeError
from ..recipes.schema import Recipe
from ..recipes.sections import SamplerSection
from ..rollouts.planned import WITH, WITHOUT
from . import orders, speed  # noqa: F401 (importing registers the parts)
from .crediting import by_step
from .joint import Joint
from .objective import Objective, build_objective
from .planning import Planning


def build_planning(recipe: Recipe, denoiser: Any) -> Planning | None:
    """Return the planner's objective with its planner on the denoiser's device; None where a recipe trains none."""
    section = recipe.planner
    if section is None or "positions" not in recipe.objective.actions:
        return None
    fingerprint, seed = fingerprint_of(denoiser), recipe.run.seed
    if section.path is None:
        values = section.model_dump() | {"hidden": _hidden(section, denoiser.base.config.hidden_size)}
        planner = new_planner(PlannerSpec.of(values), seed=seed, fingerprint=fingerprint)
    else:
        read = load_planner(section.path, fingerprint=fingerprint)
        planner = Planner(read.spec, read.network, fingerprint)
    planner.network.to(denoiser.device)
    return Planning(
        planner,
        surrogate=SLOTS["surrogate"].build(recipe.objective.surrogate),
        speed=SLOTS["speed"].build(section.speed),
        group=recipe.rollout.group,
        seed=seed,
        alpha=_range(section.alpha),
        order=None if section.order is None else SLOTS["order"].build(section.order),
        ratio_limit=recipe.objective.ratio_limit,
        **{name: getattr(section, name) for name in ("target_nfe", "dual_rate", "pull", "entropy", "chunk")},
        **_expert(section),
    )


def build_objectives(recipe: Recipe, denoiser: Any) -> tuple[Objective | Joint, Planning | None]:
    """Return the objective of a recipe, a joint one where denoiser and planner are trained, and the planner's part."""
    objective, planning = build_objective(recipe.objective.model_dump()), build_planning(recipe, denoiser)
    if planning is None or recipe.planner is None or "tokens" not in recipe.objective.actions:
        return objective, planning
    return Joint(objective, planning, recipe.planner.lr), planning


def planner_notes(recipe: Recipe) -> dict[str, Any]:
    """Return what a saved planner says about its training."""
    schedule = recipe.rollout.sampler.schedule
    return {"run": recipe.name, "task": recipe.task, "canvas": recipe.rollout.canvas, "schedule": schedule}


def with_planner(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a run with the planner of its `folder` in every score and schedule that name none."""
    if not (folder / "planner" / FILE).is_file():
        return recipe
    for sampler in (recipe.rollout.sampler, recipe.evaluation.sampler):
        for slot, name in () if sampler is None else (("score", "planner"), ("schedule", "planned")):
            part = getattr(sampler, slot)
            if part["name"] == name and part.get("path") is None:
                setattr(sampler, slot, {**part, "path": str(folder / "planner")})
    return recipe


def check_planning(recipe: Recipe) -> None:
    """Raise RecipeError where actions, planner, sampler and model do not fit each other; no weights are read."""
    section, actions = recipe.planner, recipe.objective.actions
    if "positions" not in actions:
        if section is not None:
            raise RecipeError("planner: nothing trains it; add positions to objective.actions, or drop the section.")
        return
    if section is None:
        raise RecipeError(
            "objective.actions: positions are a planner's choices; add a `planner` section (`planner: {}`)."
        )
    _check_denoiser(recipe)
    sampler = recipe.rollout.sampler
    # A planner and a group that cannot be are refused before weights are read.
    values = section.model_dump() | {"hidden": _hidden(section, 1)}
    if _sizes(section, sampler):
        values |= {"distribution": "blocks", "hidden": int(section.past > 0)}
    fake = new_planner(PlannerSpec.of(json.loads(json.dumps(values))))
    taking = sampler.remasking is not None and sampler.remasking["name"] == "planned"
    if section.path is None and fake.spec.remasks != taking:
        raise RecipeError(f"rollout.sampler.remasking: {WITHOUT if fake.spec.remasks else WITH}")
    Planning(
        fake,
        surrogate=SLOTS["surrogate"].build(recipe.objective.surrogate),
        speed=SLOTS["speed"].build(section.speed),
        group=recipe.rollout.group,
        alpha=_range(section.alpha),
        target_nfe=section.target_nfe,
        order=None if section.order is None else SLOTS["order"].build(section.order),
        **_expert(section),
    )


def _sizes(section: PlannerSection, sampler: SamplerSection) -> bool:
    """Return whether a planner chooses lengths of blocks; RecipeError where the sampler does not draw what it says."""
    sizes = section.distribution == "blocks" if section.path is None else sampler.schedule["name"] == "planned"
    parts = {"schedule": "planned"} if sizes else {"score": "planner", "selection": "planned"}
    if any(getattr(sampler, slot)["name"] != name for slot, name in parts.items()):
        named = " with ".join(f"{slot} {name}" for slot, name in parts.items())
        raise RecipeError(
            f"rollout.sampler: a planner of {'lengths' if sizes else 'positions'} acts by {named}; name that, or "
            f"another planner.distribution ({'blocks chooses' if sizes else 'only blocks chooses'} lengths)."
        )
    slot = list(parts)[-1]
    if getattr(sampler, slot).get("decide", "sample") != "sample":
        raise RecipeError(f"rollout.sampler.{slot}: a planner learns from what it draws; set decide to sample.")
    return sizes


def _check_denoiser(recipe: Recipe) -> None:
    """Raise RecipeError for choices that only one of planner alone and planner with denoiser can have."""
    objective, advantage = recipe.objective, recipe.objective.advantage["name"]
    if recipe.model.sharding != "none":
        raise RecipeError("model.sharding: a planner is trained beside a denoiser that is whole; set it to none.")
    if advantage in SLOTS["advantage"] and by_step(SLOTS["advantage"].get(advantage)):
        raise RecipeError(
            f"objective.advantage: '{advantage}' tells steps apart, a planner is paid for rollouts; use group_mean."
        )
    if "tokens" in objective.actions:
        return
    if recipe.model.lora is not None:
        raise RecipeError(
            "model.lora: a run of positions alone leaves the denoiser as it is; drop it, or train both (method: joint)."
        )
    if objective.beta > 0:
        raise RecipeError(f"objective.beta: {objective.beta:g}, but a planner has no reference; set it to 0.")
    if recipe.planner is not None and recipe.planner.lr is not None:
        raise RecipeError(
            f"planner.lr: {recipe.planner.lr:g}, but nothing else is trained: its learning rate is optim.lr; drop it."
        )


def _hidden(section: PlannerSection, width: int) -> int:
    """Return the width of the hidden states that a new planner reads of a denoiser with states of `width`; 0: none."""
    pools = section.distribution == "blocks" and section.past > 0
    return width if pools or section.network == "hidden" else 0


def _expert(section: PlannerSection) -> dict[str, Any]:
    """Return what an objective is told of its expert."""
    expert = section.expert
    return {} if expert is None else expert.model_dump() | {"levels": tuple(expert.levels)}


def _range(alpha: float | tuple[float, float]) -> tuple[float, float]:
    return (alpha, alpha) if isinstance(alpha, float) else alpha
