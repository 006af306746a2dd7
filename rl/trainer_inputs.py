"""What UnmaskTrainer is given, made into what it works with: denoiser, rewards, rows, number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..policies.adapters import attach_adapter
from ..policies.denoiser import Denoiser
from ..policies.loading import load_denoiser
from ..recipes.registry import RecipeError
from ..recipes.tasks import Row, Rows, Stored
from ..rewards import Reward, build_rewards
from . import advantages
from .config import UnmaskConfig
from .distributed import world_size
from .evaluate import heldout_rows
from .settings import quiet_peft


def prepare(model: Denoiser | str | Path, peft_config: Any, seed: int) -> Denoiser:
    """Return the denoiser to train: loaded if it is a path, with a new adapter if there is a peft config."""
    if not isinstance(model, str | Path) and not hasattr(model, "logits"):
        raise RecipeError(f"model: {type(model).__name__} is no denoiser; pass load_denoiser(PATH), or the path.")
    denoiser = load_denoiser(str(model)) if isinstance(model, str | Path) else model
    if peft_config is None:
        return denoiser
    if peft_config.target_modules is None:
        peft_config = replace(peft_config, target_modules=list(denoiser.family.lora_targets))
    with quiet_peft():
        return attach_adapter(denoiser, peft_config, seed=seed)


def check_shares(args: UnmaskConfig) -> None:
    """Raise RecipeError when the processes would not have equally many prompts."""
    if args.num_prompts % world_size():
        raise RecipeError(
            f"num_prompts: {args.num_prompts} prompts cannot be shared evenly by {world_size()} processes (a group "
            f"stays on one); use a multiple of {world_size()}."
        )


def rewards_of(functions: Any, weights: list[float] | None, allow_code: bool) -> list[Reward]:
    """Return the rewards of names, functions and Rewards, with TRL's weights; RecipeError where these do not fit."""
    entries = list(functions) if isinstance(functions, list | tuple) else [functions]
    rewards = build_rewards(entries, allow_code_execution=allow_code)
    if weights is None:
        return rewards
    if len(weights) != len(rewards):
        raise RecipeError(f"reward_weights: {len(weights)} weights for {len(rewards)} rewards; give one each.")
    return [replace(reward, weight=weight) for reward, weight in zip(rewards, weights, strict=True)]


def as_rows(dataset: Any, seed: int, name: str) -> Rows:
    """Return a dataset as Rows; RecipeError when it has no length, no rows, or rows without a prompt."""
    if hasattr(dataset, "row") and hasattr(dataset, "size"):
        return dataset
    if isinstance(dataset, str | Mapping) or not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        raise RecipeError(f"{name}: {kind} is no sequence of rows; pass a datasets.Dataset or a list.")
    rows = [dict(row) for row in dataset]
    if not rows:
        raise RecipeError(f"{name}: the dataset is empty; it needs at least one row with a column 'prompt'.")
    if "prompt" not in rows[0]:
        raise RecipeError(f"{name}: rows need a column 'prompt'; there are {', '.join(sorted(rows[0]))}; rename one.")
    return Stored(rows, "train" if name == "train_dataset" else "heldout", seed)


def heldout_of(dataset: Any, args: UnmaskConfig) -> list[Row]:
    """Return the rows that an evaluation decodes."""
    return heldout_rows(as_rows(dataset, args.seed, "eval_dataset"), args.eval_problems)


def steps_of(args: UnmaskConfig, rows: Rows) -> int:
    """Return the number of optimizer steps: `max_steps`, or what `num_train_epochs` over a stored dataset makes."""
    if args.max_steps > 0:
        return args.max_steps
    if rows.size is None:
        raise RecipeError(f"max_steps: {args.max_steps}, but the task has rows without end; set the number of steps.")
    return math.ceil(args.num_train_epochs * rows.size / args.num_prompts) * args.num_iterations


def check_group(group: int, advantage: Any) -> None:
    """Raise RecipeError for an advantage that compares the rollouts of a group, where a group has one."""
    function = advantage.func if isinstance(advantage, partial) else advantage
    if group == 1 and function in advantages.COMPARING:
        raise RecipeError(
            f"num_generations: 1 rollout has no group for advantage '{function.__name__}' to compare; use 2 or more."
        )
