"""The wheel must hold what the repository holds: an editable install hides a forgotten folder or data file."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import unmask

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_SHIPPED = {"tests", "benchmarks", "docs", "build", "dist", "runs"}


def tracked() -> list[Path]:
    """Return the files that git knows or would add; [] outside a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_packages_are_the_folders_that_hold_python() -> None:
    tops = [f for f in ROOT.iterdir() if f.is_dir() and not f.name.startswith(".") and f.name not in NOT_SHIPPED]
    shipped = {path.parent.relative_to(ROOT) for top in tops for path in top.rglob("*.py")}
    nested = {str(f) for f in shipped if len(f.parts) > 1}
    assert not nested, f"folders stay flat, these are not: {nested}"
    expected = {"unmask", *(f"unmask.{folder}" for folder in shipped)}
    assert set(SETUPTOOLS["packages"]) == expected
    assert all((ROOT / folder / "__init__.py").is_file() for folder in shipped)
    assert SETUPTOOLS["package-dir"] == {"unmask": "."}


def test_every_extra_that_a_message_names_exists() -> None:
    files = [file for file in tracked() if file.suffix in (".py", ".md") and file.parent.name != "tests"]
    named = {extra for file in files for extra in re.findall(r"unmask\[([\w,-]+)\]", file.read_text())}
    assert named <= set(PROJECT["project"]["optional-dependencies"]), named
    assert len(named) >= 5 or not files


def test_no_other_module_lies_at_the_root() -> None:
    assert [p.name for p in ROOT.glob("*.py")] == ["__init__.py"]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_package_data_names_every_data_file() -> None:
    files = [f for f in tracked() if f.suffix != ".py"]
    if not files:
        pytest.skip("not a git checkout")
    packages = {name.partition(".")[2]: name for name in SETUPTOOLS["packages"] if "." in name}
    forgotten = []
    for file in files:
        folder = file.relative_to(ROOT).parts[0]
        if folder not in packages:
            continue
        inside = file.relative_to(ROOT / folder)
        patterns = SETUPTOOLS["package-data"].get(packages[folder], [])
        # setuptools' `*` does not cross a folder's border.
        if not any(len(Path(p).parts) == len(inside.parts) and inside.match(p) for p in patterns):
            forgotten.append(str(file.relative_to(ROOT)))
    assert not forgotten, f"in the repository, but not in the wheel: {forgotten}"


def test_every_data_pattern_matches_a_file() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / package.partition(".")[2]
        empty = [pattern for pattern in patterns if not list(folder.glob(pattern))]
        assert not empty, f"{package}: {empty} match nothing"


def test_no_large_files() -> None:
    megabyte = 1_000_000
    for file in tracked():
        ceiling = 12 if file.suffix == ".safetensors" else 1
        assert file.stat().st_size <= ceiling * megabyte, f"{file.relative_to(ROOT)} is larger than {ceiling} MB"


def test_tracked_files_are_no_build_products() -> None:
    wrong = [f for f in tracked() if re.search(r"\.(pyc|egg-info|whl|pt|pkl|bin)\b", str(f.relative_to(ROOT)))]
    assert not wrong


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+|\.dev\d+)?", unmask.__version__)
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "unmask.__version__"}


def test_licence_is_apache_2() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text


def test_console_script_names_a_function() -> None:
    module, _, function = PROJECT["project"]["scripts"]["unmask"].partition(":")
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE), f"{path} defines no {function}()"
