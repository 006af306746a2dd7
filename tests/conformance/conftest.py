"""Which samplers and caches the suite runs on, and the tiny denoisers that it runs them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shortrun
import yaml

from unmask.policies.denoiser import Denoiser
from unmask.recipes.loading import import_parts, load_samplers
from unmask.recipes.registry import SLOTS

BLOCK = 8
PLAIN = ("llada_low_confidence", "fast_dllm_threshold", "rcr")  # with every cache in the fast tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-cache", action="store_true", help="every sampler with every cache: half an hour")
    parser.addoption("--sampler", action="append", default=[], help="a row of samplers.yaml, or a YAML file")


def sections(config: pytest.Config) -> dict[str, dict[str, Any]]:
    """Return the sampler sections under test by name, cut to the suite's small canvas."""
    shipped = {name: row["sampler"] for name, row in load_samplers().items()}
    import_parts("schedule")
    chosen = config.getoption("--sampler") or list(shipped)
    found = {}
    for name in chosen:
        section = shipped[name] if name in shipped else yaml.safe_load(Path(name).read_text())["sampler"]
        found[Path(name).stem] = small(section)
    return found


def small(section: dict[str, Any]) -> dict[str, Any]:
    """Return the section with blocks of at most BLOCK, so that a canvas of 16 or 24 has several."""
    schedule = {"name": section["schedule"]} if isinstance(section["schedule"], str) else dict(section["schedule"])
    knob = SLOTS["schedule"].knobs(schedule["name"]).get("size")
    if knob is not None:
        schedule["size"] = min(schedule.get("size", knob.default), BLOCK)
        if "per_step" in schedule:
            schedule["per_step"] = min(schedule["per_step"], BLOCK)
    small = {**section, "schedule": schedule}
    if section.get("length"):
        # Room to grow: on the suite's canvas the published start would be all of it.
        small["length"] = {**section["length"], "start": 6, "by": 2}
    return small


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = sections(metafunc.config)
    if "cache" in metafunc.fixturenames:
        import_parts("cache")
        quick = set(found) if metafunc.config.getoption("--sampler") else set(PLAIN)
        cases = [
            pytest.param(
                found[name],
                cache,
                id=f"{name}-{cache}",
            )
            for name in found
            for cache in (None, *SLOTS["cache"])
            if cache is None or name in quick or metafunc.config.getoption("--every-cache")
        ]
        metafunc.parametrize(("section", "cache"), cases)
    elif "section" in metafunc.fixturenames:
        metafunc.parametrize("section", list(found.values()), ids=list(found))


@pytest.fixture(scope="session")
def denoiser() -> Denoiser:
    """Two layers, random, loud enough that distributions differ; ties and confident tokens both occur."""
    return shortrun.decided_denoiser()
