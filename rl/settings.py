"""Small translations from a recipe's sections, and one warning that is not the user's."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import warnings
from collections.abc import Iterator

import torch

from ..recipes.schema import Recipe
from ..rewards import Reward, ScoringConfig, build_rewards


def device_of(name: str) -> str:
    """Return a torch device name: `auto` is cuda when there is one, else cpu, and cuda is the process's own one.

    torchrun numbers the processes of a machine; weights are read before Trainer gives each of them its device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if name == "cuda" and local_rank is not None else name


def cpu_backend(device: str) -> str | None:
    """Return "gloo" for several processes on CPUs; None (no process group, or NCCL) otherwise."""
    return "gloo" if device_of(device) == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def peak_memory_gb(device: torch.device) -> float:
    """Return the most memory this process has held, in GB (10^9 bytes): of a CUDA device, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def rewards_of(recipe: Recipe) -> list[Reward]:
    """Return the rewards of a recipe."""
    entries = [entry.model_dump() for entry in recipe.rewards]
    return build_rewards(entries, allow_code_execution=recipe.allow_code_execution)


def scoring_of(recipe: Recipe) -> ScoringConfig:
    """Return the settings of a recipe's scoring."""
    return ScoringConfig(**recipe.scoring.model_dump(), allow_code_execution=recipe.allow_code_execution)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide transformers' warning that peft reads an attribute under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield
