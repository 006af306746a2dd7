"""unmask: reinforcement-learning post-training of diffusion language models.

Public names are imported when they are first used, so that `import unmask` and the command line stay fast.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Denoiser": "policies.denoiser",
    "load_denoiser": "policies.loading",
    "Trajectory": "rollouts.trajectory",
    "Sampler": "rollouts.sampler",
    "build_sampler": "rollouts.sampler",
    "denoise": "rollouts.engine",
    "RolloutWorker": "rollouts.worker",
    "RolloutBatch": "rollouts.worker",
    "Reward": "rewards",
    "score": "rewards",
    "load_recipe": "recipes.loading",
    "RecipeError": "recipes.registry",
    "Objective": "rl.objective",
    "build_objective": "rl.objective",
    "UnmaskConfig": "rl.config",
    "UnmaskTrainer": "rl.trainer",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unmask' has no attribute '{name}'; it has {', '.join(sorted(_HOMES))}.")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
