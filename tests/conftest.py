"""Shared fixtures; the helpers beside the tests are imported where they are needed, as they import torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The enumerable denoiser and its trajectories (tests/toys.py)."""
    return importlib.import_module("toys")


@pytest.fixture(scope="session")
def onegraph() -> ModuleType:
    """Off-policy toy rollouts and their loss written out independently (tests/onegraph.py)."""
    return importlib.import_module("onegraph")


@pytest.fixture(scope="session")
def retractions() -> ModuleType:
    """Every trajectory of a toy whose sampler takes tokens back (tests/retractions.py)."""
    return importlib.import_module("retractions")


@pytest.fixture(scope="session")
def policy_toys() -> Iterator[ModuleType]:
    """The planners' problems whose best values are known (benchmarks/policy_toys.py)."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("policy_toys")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model that runs in a second (tests/shortrun.py)."""
    return importlib.import_module("shortrun").save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a test runs, and below which its runs are written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
