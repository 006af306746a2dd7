"""Checkpoints that hold the plan in flight and count only once they are complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..rollouts.sampler import Sampler
from ..rollouts.trajectory import Trajectory
from .plan import Plan
from .runfolder import write_json

MARKER = "unmask.json"  # written last: a folder without it was interrupted and is not resumed from


class CheckpointWriteError(ValueError):
    """A checkpoint that could not be written (full disk, rights); earlier ones are intact."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / MARKER).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def discard_incomplete(folder: Path) -> None:
    """Remove checkpoint folders that an interrupted process left unfinished."""
    for path in folder.glob("checkpoint-*"):
        if not (path / MARKER).is_file():
            shutil.rmtree(path, ignore_errors=True)


def plan_path(folder: Path, rank: int) -> Path:
    """Return the file of a rank's plan inside a checkpoint."""
    return folder / f"plan-{rank}.safetensors"


def save_plan(path: Path, plan: Plan | None) -> None:
    """Write a rank's plan with its trajectory; nothing when no plan is in flight."""
    if plan is None:
        return
    trajectory = plan.views.trajectory
    tensors = {f"plan.{name}": value.contiguous() for name, value in plan.tensors().items()}
    constants: dict[str, Any] = {}
    for entry in fields(trajectory):
        value = getattr(trajectory, entry.name)
        if isinstance(value, Tensor):
            tensors[f"trajectory.{entry.name}"] = value.contiguous()
        else:
            constants[entry.name] = value
    save_file(tensors, path, metadata={"constants": json.dumps(constants)})


def load_plan(path: Path, sampler: Sampler) -> Plan | None:
    """Return the plan that `save_plan` wrote, or None when none was in flight."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointWriteError(f"{path}: damaged ({error}); resume from an earlier checkpoint.") from error
    constants: dict[str, Any] = json.loads(metadata["constants"])
    for name, value in constants.items():
        if isinstance(value, list):
            constants[name] = tuple(value)
    parts: dict[str, dict[str, Any]] = {"plan": {}, "trajectory": {}}
    for key, value in tensors.items():
        owner, _, name = key.partition(".")
        parts[owner][name] = value
    return Plan.from_tensors(Trajectory(**parts["trajectory"], **constants), sampler, parts["plan"])


def finish_checkpoint(folder: Path, *, step: int, keep: int) -> None:
    """Mark a checkpoint as complete, then remove the oldest complete ones beyond `keep`."""
    write_json(folder / MARKER, {"step": step, "torch": torch.__version__})
    for old in complete_checkpoints(folder.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
