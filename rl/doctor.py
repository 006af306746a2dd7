"""`unmask doctor`: what this installation and machine can do, and what is wrong with them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from ..policies.loading import TINY, load_denoiser, tiny_folder
from ..policies.selfcheck import self_check
from .runfolder import git_commit


def requirements() -> list[tuple[str, str, str, bool]]:
    """Return (package, installed version, required range, whether it fits) for unmask's own dependencies."""
    rows = []
    for line in importlib.metadata.requires("unmask") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            rows.append((requirement.name, "missing", str(requirement.specifier), False))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        rows.append((requirement.name, version, str(requirement.specifier), fits))
    return rows


def doctor(*, model: str | None = None, **options: Any) -> dict[str, Any]:
    """Print and return versions, devices, launch settings and the self-check of `model` (default `unmask:tiny`).

    `options` are those of `load_denoiser`.
    """
    console, problems = Console(), []
    table = Table("package", "installed", "required", "")
    packages = requirements()
    for name, version, wanted, fits in packages:
        table.add_row(name, version, wanted or "any", "ok" if fits else "does not fit")
        if not fits:
            problems.append(f"{name} {version} is outside {wanted}: pip install '{name}{wanted}'")
    console.print(table)
    machine = {
        "python": platform.python_version(),
        "unmask commit": git_commit(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "free disk here": f"{shutil.disk_usage('.').free / 1e9:.0f} GB",
    }
    table = Table("machine", "")
    for name, value in machine.items():
        table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    console.print(table)
    path = model or TINY
    checked: dict[str, str] = {}
    if model is None and not (tiny_folder() / "config.json").is_file():
        problems.append(f"'{TINY}' is missing from this installation: unmask sft tiny_sft.yaml")
    else:
        # Loading runs the self-check too, and raises CheckpointError or SelfCheckError where it fails.
        denoiser = load_denoiser(path, **options)
        checked = {"family": f"{denoiser.family.name}, a {type(denoiser.base).__name__}"} | self_check(denoiser)
        table = Table(path, "self-check")
        for name, value in checked.items():
            table.add_row(name, value)
        console.print(table)
    for problem in problems:
        console.print(f"problem: {problem}", markup=False)
    command = "quickstart.yaml" if model is None else f"RECIPE model.path={model}"
    fine = f"no problems found; next: unmask train {command}"
    console.print(f"{len(problems)} problems" if problems else fine)
    return {
        "packages": {name: {"installed": v, "required": w, "fits": f} for name, v, w, f in packages},
        "machine": machine,
        "model": {"path": path, "self_check": checked},
        "problems": problems,
    }
