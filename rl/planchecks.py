"""What a planner's objective cannot be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..recipes.registry import RecipeError
from .planscores import LABELLED

if TYPE_CHECKING:
    from .planning import Planning


def check_choices(planning: Planning) -> None:
    """Raise RecipeError where trade-off, expert, labels, order and planner do not go together."""
    spec = planning.planner.spec
    low, high = planning.alpha
    if not 0 <= low <= high < math.inf or (low == 0 < high):
        raise RecipeError(f"planner.alpha: [{low}, {high}] must rise and lie above 0, a range is drawn by its log.")
    if any(not 0 < level <= 1 for level in planning.levels):
        raise RecipeError(
            f"planner.expert.levels: {list(planning.levels)} are compared with probabilities; use (0, 1]."
        )
    if planning.by_alpha and (low == high or max(planning.levels, default=1.0) == 1):
        raise RecipeError(
            "planner.expert.by_alpha: log-odds of levels follow a range of alpha; use [low, high], and levels below 1."
        )
    if planning.by_alpha and not planning.warmup:
        raise RecipeError("planner.expert.by_alpha: spreads thresholds in the warm-up; give expert.warmup, or drop it.")
    experts, group = planning.experts, planning.group
    if experts >= group:
        raise RecipeError(f"planner.expert.levels: {experts} of {group} rollouts leave the planner none.")
    if planning.levels and spec.sizes:
        raise RecipeError("planner.expert: a threshold chooses positions, this planner lengths of blocks; drop expert.")
    if planning.levels and spec.distribution == "count":
        raise RecipeError("planner.expert: a threshold opens numbers that `count` may not have; use bernoulli.")
    if spec.shortlist and planning.block is not None:
        raise RecipeError("planner.shortlist: may hold no position of the expert's block; drop expert.block.")
    if planning.labels == "final" and spec.distribution not in LABELLED:
        raise RecipeError(f"planner.expert.labels: final teaches each position alone; use {', '.join(LABELLED)}.")
    if planning.target_nfe is not None and low != high:
        raise RecipeError("planner.target_nfe: alpha follows from it; give alpha one number to begin with.")
    if planning.order is not None and (spec.distribution != "categorical" or "odds" not in spec.features):
        raise RecipeError("planner.order: is made of the feature odds and orders one position a step; use categorical.")
