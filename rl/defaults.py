"""What UnmaskTrainer does where it is told nothing: sampler and objective made of its arguments."""

from __future__ import annotations

import math

from ..recipes.registry import RecipeError
from ..rollouts.sampler import Sampler, build_sampler
from .config import UnmaskConfig
from .objective import Objective, build_objective

CJ_GRPO = {
    "estimator": "trace",
    "unit": "token",
    "surrogate": "ppo_clip",
    "weight": "per_step_mean",
    "divergence": "k3",
}


def default_sampler(args: UnmaskConfig) -> Sampler:
    """Return the sampler used when none is given: blocks of (at most) 32, two tokens a step, by confidence."""
    size = math.gcd(args.max_completion_length, 32)
    section = {"schedule": {"name": "blocks", "size": size, "per_step": min(2, size)}}
    return build_sampler(section, temperature=args.temperature)


def default_objective(args: UnmaskConfig, sampler: Sampler) -> Objective:
    """Return CJ-GRPO with the arguments' clip range, beta and chunk, corrected where the sampler's draws need it."""
    clip = {"name": "ppo_clip", "low": args.epsilon, "high": args.epsilon_high or args.epsilon}
    corrected = {"old": "recompute", "correction": "truncated"} if sampler.mismatch else {}
    return build_objective({**CJ_GRPO, "surrogate": clip, "beta": args.beta, "chunk": args.chunk_size, **corrected})


def trainable(sampler: Sampler) -> Sampler:
    """Return the sampler; RecipeError where its rollouts have no log-probability."""
    if sampler.refusal is not None:
        raise RecipeError(f"sampler: {sampler.refusal}; there is no log-probability to train on.")
    return sampler
