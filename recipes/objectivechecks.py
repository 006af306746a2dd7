"""Contradictions inside a recipe's objective, and between it and the model it trains."""

from __future__ import annotations

from typing import Any

from .correcting import scores_rollouts
from .registry import SLOTS, RecipeError
from .schema import ObjectiveSection, Recipe


def check_objective(recipe: Recipe) -> None:
    """Raise RecipeError for choices of the objective that cannot go together."""
    _check_correction(recipe)
    _check_estimator(recipe)
    _check_drafts(recipe)
    _check_planner(recipe)
    _check_value(recipe)
    _check_reference(recipe)


def _check_planner(recipe: Recipe) -> None:
    from ..rl.planning_setup import check_planning

    check_planning(recipe)


def _check_correction(recipe: Recipe) -> None:
    objective = recipe.objective
    correction = objective.correction
    if correction.name == "none" and correction.ceiling is not None:
        raise RecipeError("objective.correction.ceiling: has no effect with correction 'none'; name it truncated.")
    if correction.name != "none" and objective.old != "recompute":
        raise RecipeError(
            "objective.correction: compares recomputed log-probs with the rollout's, but objective.old is "
            f"'{objective.old}'; set objective.old to recompute, or correction to none."
        )
    _probe_learning(objective)


def _probe_learning(objective: ObjectiveSection) -> None:
    """Call surrogate and advantage once: our parts check their knobs when they are called (a user's may be costly)."""
    import torch

    from ..rl.bounds import Terms

    one, zero = torch.ones(1), torch.zeros(1).long()
    arguments: dict[str, tuple[Any, ...]] = {
        "surrogate": (torch.zeros(2), torch.zeros(2)),
        "advantage": (torch.zeros(2), torch.zeros(2).long()),
        "bound": (-one, Terms(zero, one, one, zero, one, one)),
    }
    for slot, values in arguments.items():
        choice = getattr(objective, slot)
        try:
            if choice["name"] in SLOTS[slot]:
                SLOTS[slot].build(choice, slot)(*values)
        except RecipeError as error:
            raise RecipeError(f"objective.{error}") from error


def _check_estimator(recipe: Recipe) -> None:
    from ..rl.drafts import STEPS
    from ..rl.estimators import check_steps

    objective = recipe.objective
    estimator, unit = objective.estimator, objective.unit["name"]
    recorded = scores_rollouts(estimator)
    if estimator["name"] in SLOTS["estimator"] and not recorded:
        if objective.old == "rollout":
            raise RecipeError(
                f"objective.old: 'rollout', but '{estimator['name']}' scores canvases that no rollout step saw; set "
                "recompute (none for a surrogate without a ratio)."
            )
        if objective.correction.name != "none":
            raise RecipeError(
                f"objective.correction: '{objective.correction.name}' compares with the rollout's log-probs, and "
                f"'{estimator['name']}' scores other canvases; set none."
            )
    if "steps" not in estimator:
        return
    try:
        check_steps(estimator["steps"], estimator["k"], *([STEPS] if estimator["name"] == "drafts" else []))
    except RecipeError as error:
        raise RecipeError(f"objective.{error}") from error
    if estimator["steps"] != "all" and unit == "rollout":
        raise RecipeError(
            f"objective.unit: 'rollout' needs the ratio of the whole rollout, steps '{estimator['steps']}' scores a "
            "part of it; use unit step or token, or steps all."
        )


def _check_drafts(recipe: Recipe) -> None:
    """Raise RecipeError where steps are told apart and cannot be."""
    from ..rl.crediting import by_step

    objective = recipe.objective
    estimator, advantage, weight = objective.estimator, objective.advantage["name"], objective.weight
    told = advantage in SLOTS["advantage"] and by_step(SLOTS["advantage"].get(advantage))
    if told and estimator["name"] in SLOTS["estimator"] and estimator["name"] not in ("trace", "drafts"):
        raise RecipeError(
            f"objective.advantage: '{advantage}' tells steps apart, '{estimator['name']}' scores none of them; use "
            "estimator drafts or trace, or an advantage of rollouts."
        )
    if estimator.get("steps") == "top_k" and not told and advantage in SLOTS["advantage"]:
        raise RecipeError(
            f"objective.estimator.steps: 'top_k' ranks the advantages of steps, '{advantage}' is that of a rollout; "
            "use step_difference, or uniform_k."
        )
    parts = [("weight", weight), ("divergence_weight", objective.divergence_weight or weight)]
    for where, part in parts:
        if part["name"] == "drawn" and part.get("elbo") and estimator["name"] != "drafts":
            raise RecipeError(
                f"objective.{where}.elbo: weighs by the masks of a draft's canvas, and '{estimator['name']}' scores no "
                "drafts; use estimator drafts, or elbo false."
            )
    if (told or estimator["name"] == "drafts") and recipe.rollout.sampler.length is not None:
        raise RecipeError(
            "rollout.sampler.length: drafts need a canvas of one length; drop it, or choose estimator trace and an "
            "advantage of rollouts."
        )


def _check_value(recipe: Recipe) -> None:
    """Raise RecipeError where tokens cannot have an advantage of their own, or their steps do not follow each other."""
    from ..rl.crediting import by_step
    from ..rollouts.sampler import build_sampler

    if recipe.value is None:
        return
    objective, sampler, slot = recipe.objective, recipe.rollout.sampler, SLOTS["advantage"]
    estimator, unit, advantage = objective.estimator, objective.unit["name"], objective.advantage["name"]
    if "positions" in objective.actions:
        raise RecipeError("value: it values tokens, objective.actions are positions; drop the section.")
    if estimator["name"] not in ("trace", "sliced") or estimator.get("steps", "all") != "all":
        raise RecipeError(
            f"value: needs every step of a rollout, estimator '{estimator['name']}' scores others or some of them; use "
            "trace with steps all, or sliced."
        )
    if unit != "token":
        raise RecipeError(f"value: gives each token its advantage, a ratio over a {unit} has one; set unit to token.")
    if advantage in slot and by_step(slot.get(advantage)):
        raise RecipeError(f"value: it values rollouts, advantage '{advantage}' tells steps apart; use group_std.")
    if sampler.remasking is not None or sampler.editing is not None or sampler.length is not None:
        raise RecipeError("value: a position that is decided twice has two values; drop remasking, editing and length.")
    if estimator.get("merge") == 1 and build_sampler(sampler.model_dump()).exact_choice:
        raise RecipeError(
            "value: the sampler records choices of positions, which are actions without a token; set "
            "rollout.sampler.exact to false, or choose a score that does not draw first."
        )
    if recipe.value.network == "copy" and recipe.model.sharding != "none":
        raise RecipeError("value.network: a copy is not shared out among processes; use head, or sharding none.")


def _check_reference(recipe: Recipe) -> None:
    objective, lora = recipe.objective, recipe.model.lora
    if objective.divergence_weight is not None and objective.over == "unit":
        raise RecipeError("objective.divergence_weight: weighs tokens; with over 'unit' it has no effect, drop one.")
    if objective.beta > 0 and objective.reference == "none":
        raise RecipeError(
            f"objective.reference: 'none', but objective.beta {objective.beta:g} weighs a divergence to it; "
            "set beta to 0, or reference to auto."
        )
    if objective.reference == "adapter_off" and lora is None:
        raise RecipeError(
            "objective.reference: adapter_off needs an adapter to switch off, model.lora is null; "
            "use frozen_copy, or give model.lora a rank."
        )
