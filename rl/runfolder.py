"""A run's folder: where it lies, its resolved recipe, its manifest, and files that are whole or absent."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # seconds, which those who only read a run's folder need not wait

PACKAGES = (
    "unmask",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "numpy",
    "safetensors",
    "tokenizers",
)


FILES = ("metrics.jsonl", "timing.jsonl")  # what a run records, by step
COMMAND = "UNMASK_COMMAND"  # the command line of the user, for the processes that torchrun starts


class RunError(ValueError):
    """A run that cannot start, go on or be opened; the message names cause and remedy."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file; a last line that is not whole yet is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds either its old or its whole new content, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove `folder` again when an error leaves it empty."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def run_folder(recipe: Any) -> Path:
    """Return the folder of a recipe's run: `run.directory` / `name`."""
    return Path(recipe.run.directory).expanduser() / recipe.name


def git_commit() -> str:
    """Return the commit of the working tree that unmask runs from, with `+dirty`; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    # A wheel lies in site-packages, whose surrounding repository, if any, is somebody else's.
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+dirty" if changed.stdout.strip() else "")


def command_line() -> str:
    """Return the command line of this process, as a shell would take it."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def manifest(*, device: torch.device | str, dtype: str, seeds: dict[str, int], **more: Any) -> dict[str, Any]:
    """Return what is needed to read a result: commit, versions, machine, dtype, seeds and command line."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    import torch

    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_commit": git_commit(),
        "command": os.environ.get(COMMAND) or command_line(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": str(device),
        "device_name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seeds": seeds,
        **more,
    }
