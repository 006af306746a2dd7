"""Benchmarks of a device where there is none: their paths on a tiny shape, and what they say otherwise."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from unmask.policies.loading import load_denoiser

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str, name: str = "real_shapes") -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


def test_the_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark(monkeypatch, "--tiny", "--steps", "3", "--json", str(tmp_path / "found.json"))
    record = json.loads((tmp_path / "found.json").read_text())
    (row,) = record["result"]["rows"]
    assert record["benchmark"] == "real_shapes_tiny" and record["manifest"]["dtype"] == "float32"
    # 16 positions, two a step; three steps of each rollout are scored, and a fresh adapter's ratios are 1.
    assert (row["rows"], row["steps"], row["views"]) == (4, 8, 12) and row["ratio_max_deviation"] < 1e-5
    base = sum(parameter.numel() for parameter in load_denoiser("unmask:tiny").model.parameters())
    assert row["parameters"] > base and row["estimated_bytes"] > 4 * base
    assert row["rollout_tokens_per_s"] > 0 and row["update_tokens_per_s"] > 0
    assert row["estimated_over_peak"] is row["within_tolerance"] is None


def test_a_rollouts_operations_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--rows", "2", "--canvas", "32", "--prompt", "8", "--block", "16", "--per-step", "8", "--no-compile"]
    benchmark(monkeypatch, "--tiny", *options, "--json", str(tmp_path / "found.json"), name="rollout_device")
    found = json.loads((tmp_path / "found.json").read_text())["result"]
    # Four steps of 2 x 40 columns; the head sees blocks of 16 and 8 open positions, twice each.
    layers, width, mlp, vocabulary = 4, 128, 352, 261
    column = layers * (2 * (4 * width**2 + 3 * width * mlp) + 4 * 40 * width)
    assert found["operations"] == 4 * 2 * 40 * column + 2 * 2 * (16 + 8) * 2 * width * vocabulary
    assert 0 < found["everything_else_share"] < 1 and 0 < found["eager_utilisation"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which this would measure")
@pytest.mark.parametrize("name", ["real_shapes", "rollout_device"])
def test_without_a_device_nothing_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(monkeypatch, "--json", str(tmp_path / "found.json"), name=name)
    assert "no CUDA device, so nothing was measured; --tiny" in capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()
