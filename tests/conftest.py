"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    # Test folders are no packages, so a helper beside the tests is loaded by its path.
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    """The enumerable denoiser and its trajectories (tests/toys.py)."""
    return _load("toys")


@pytest.fixture(scope="session")
def onegraph() -> ModuleType:
    """Off-policy toy rollouts and their loss written out independently (tests/onegraph.py)."""
    return _load("onegraph")


@pytest.fixture(scope="session")
def retractions(toys: ModuleType) -> ModuleType:
    """Every trajectory of a toy whose sampler takes tokens back (tests/retractions.py)."""
    _load("retractcases")
    return _load("retractions")
