"""What follows for training from a sampler whose draws are not those that the trainer recomputes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .registry import RecipeError
from .schema import CorrectionSection, Recipe

SCORES_ROLLOUTS = ("trace", "drafts", "sliced")


def scores_rollouts(estimator: Mapping[str, Any]) -> bool:
    """Return whether an estimator scores the canvases that the rollout saw, with its own log-probs beside."""
    return estimator["name"] in SCORES_ROLLOUTS and estimator.get("merge", 1) == 1


def settle_correction(recipe: Recipe, written: Mapping[str, Any]) -> None:
    """Correct for approximate caches, guidance and filtered draws where `written`, the user's objective, says nothing.

    Sets `correction: truncated` and `old: recompute` (samplers.md section 4.1).
    """
    objective = recipe.objective
    says_none = "correction" in written or (written.get("old", "recompute") != "recompute")
    if says_none or objective.old == "none" or not scores_rollouts(objective.estimator):
        return
    if _sampler(recipe).mismatch is not None:
        objective.correction = CorrectionSection(name="truncated", ceiling=2.0)
        objective.old = "recompute"


def check_density(recipe: Recipe) -> None:
    """Raise RecipeError for a sampler whose rollouts have no log-probability at all."""
    reason = _sampler(recipe).refusal
    if reason is not None:
        raise RecipeError(
            f"rollout.sampler: {reason}; there is no log-probability to train on. Use another sampler here, and this "
            "one in evaluation.sampler."
        )


def correction_notes(recipe: Recipe) -> list[str]:
    """Return what is to be known where rollout and trainer disagree about a token's probability."""
    objective = recipe.objective
    reason, name = _sampler(recipe).mismatch, objective.correction.name
    if reason is None or not scores_rollouts(objective.estimator):
        return []
    if name == "none":
        return [
            f"rollout.sampler: {reason}. objective.correction is none, so the loss takes the tokens for draws of the "
            "policy itself; truncated (with old: recompute) weighs them."
        ]
    return [
        f"rollout.sampler: {reason}. objective.correction {name} weighs every {objective.unit['name']} by its "
        "recomputed over its rollout's probability; mismatch/kl_by_step in metrics.jsonl is what is corrected."
    ]


def _sampler(recipe: Recipe) -> Any:
    from ..rollouts.sampler import build_sampler

    return build_sampler(recipe.rollout.sampler.model_dump(), temperature=recipe.rollout.temperature)
