"""Trajectories in safetensors files: tensors by name, everything else as JSON in the header."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..rollouts.trajectory import Lifetimes, Trajectory


def trajectory_tensors(trajectory: Trajectory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a trajectory's tensors under `trajectory.` and `retracted.`, and its other fields."""
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for entry in fields(trajectory):
        value = getattr(trajectory, entry.name)
        if isinstance(value, Tensor):
            tensors[f"trajectory.{entry.name}"] = value.contiguous()
        elif isinstance(value, Lifetimes):
            tensors |= {f"retracted.{name}": part.contiguous() for name, part in value._asdict().items()}
        else:
            constants[entry.name] = value
    return tensors, constants


def trajectory_of(tensors: dict[str, Tensor], constants: dict[str, Any]) -> Trajectory:
    """Return the trajectory that `trajectory_tensors` took apart; other tensors are not read."""
    parts: dict[str, dict[str, Tensor]] = {"trajectory": {}, "retracted": {}}
    for key, value in tensors.items():
        owner, _, name = key.partition(".")
        parts.setdefault(owner, {})[name] = value
    recorded: dict[str, Any] = dict(parts["trajectory"])
    recorded |= {name: tuple(value) if isinstance(value, list) else value for name, value in constants.items()}
    if parts["retracted"]:
        recorded["retracted"] = Lifetimes(**parts["retracted"])
    return Trajectory(**recorded)


def save_trajectory(path: Path, trajectory: Trajectory, metadata: dict[str, str]) -> None:
    """Write a trajectory with texts beside it."""
    tensors, constants = trajectory_tensors(trajectory)
    save_file(tensors, path, metadata={"constants": json.dumps(constants), **metadata})


def load_trajectory(path: Path, device: torch.device | str = "cpu") -> tuple[Trajectory, dict[str, str]]:
    """Return what `save_trajectory` wrote."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata: dict[str, str] = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return trajectory_of(tensors, json.loads(metadata["constants"])), metadata
