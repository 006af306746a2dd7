"""The documentation's site: it is built without a warning, and its reference is what the code says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unmask
from unmask.recipes.loading import load_methods
from unmask.recipes.registry import SLOTS

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_imported() -> None:
    for name in unmask.__all__:
        assert getattr(unmask, name) is not None


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("myst_parser", reason="needs the extra docs")
    pytest.importorskip("furo", reason="needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), "-b", "html"]
    where = str(Path(unmask.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([where, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    site = tmp_path / "site"
    for name, row in load_methods().items():
        page = (site / "reference" / "methods" / f"{name}.html").read_text()
        assert "Choices" in page and all(key in page for key in row["objective"])
        assert ("Equation" in page) == ("equation" in row) and ("Cost" in page) == ("cost" in row)
    parts = (site / "reference" / "parts.html").read_text()
    assert all(part in parts for slot in SLOTS.values() for part in slot)
    commands = (site / "reference" / "commands.html").read_text()
    assert "unmask view" in commands and "--heldout" in commands and "unmask bench rollout" in commands
    python = (site / "reference" / "python.html").read_text()
    assert all(f'id="{name.lower().replace("_", "-")}"' in python for name in unmask.__all__ if name != "__version__")
