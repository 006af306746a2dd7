"""benchmarks/real_shapes.py where there is no device: its path on a tiny shape, and what it says otherwise."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from unmask.policies.loading import load_denoiser

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.argv", ["real_shapes.py", *arguments])
    runpy.run_path(str(BENCHMARKS / "real_shapes.py"), run_name="__main__")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which this would measure")
def test_without_a_device_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(monkeypatch, "--json", str(tmp_path / "found.json"))
    assert "no CUDA device, so nothing was measured; --tiny" in capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()
