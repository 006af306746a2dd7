"""Contradictions inside a recipe's objective, and between it and the model it trains."""

from __future__ import annotations

from typing import Any

from .correcting import SCORES_ROLLOUTS
from .registry import SLOTS, RecipeError
from .schema import ObjectiveSection, Recipe


def check_objective(recipe: Recipe) -> None:
    """Raise RecipeError for choices of the objective that cannot go together."""
    _check_correction(recipe)
    _check_estimator(recipe)
    _check_reference(recipe)


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
    from ..rl.estimators import check_steps

    objective = recipe.objective
    estimator, unit = objective.estimator, objective.unit["name"]
    recorded = estimator["name"] in SCORES_ROLLOUTS
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
        check_steps(estimator["steps"], estimator["k"])
    except RecipeError as error:
        raise RecipeError(f"objective.{error}") from error
    if estimator["steps"] == "uniform_k" and unit == "rollout":
        raise RecipeError(
            "objective.unit: 'rollout' needs the ratio of the whole rollout, steps 'uniform_k' scores a part of it; "
            "use unit step or token, or steps all."
        )


def _check_reference(recipe: Recipe) -> None:
    objective, lora = recipe.objective, recipe.model.lora
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
