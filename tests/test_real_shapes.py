"""Benchmarks of a device where there is none: their paths on a tiny shape, and what they say otherwise."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def benchmark(monkeypatch: pytest.MonkeyPatch, *arguments: str, name: str = "real_shapes") -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")


def test_the_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe on its family's shape in small: full attention, shifted, in blocks behind a cache, with experts."""
    names = ["llada8b_lora", "dream7b_lora", "sdar4b_lora", "llada2_mini_lora"]
    benchmark(monkeypatch, "--tiny", "--steps", "3", "--json", str(tmp_path / "found.json"), "--recipes", *names)
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["benchmark"] == "real_shapes_tiny" and record["manifest"]["dtype"] == "float32"
    assert [row["recipe"] for row in record["result"]["rows"]] == names
    for row in record["result"]["rows"]:
        # 16 positions, two a step; three steps of each rollout are scored, and a fresh adapter's ratios are 1.
        assert (row["rows"], row["steps"], row["views"]) == (4, 8, 12) and row["ratio_max_deviation"] < 1e-5
        assert row["estimated_bytes"] > 4 * row["parameters"] > 4 * 320 * 64
        assert row["rollout_tokens_per_s"] > 0 and row["update_tokens_per_s"] > 0
        assert row["estimated_over_peak"] is row["within_tolerance"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which this would measure")
@pytest.mark.parametrize("name", ["real_shapes", "rollout_device"])
def test_without_a_device_nothing_is_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(monkeypatch, "--json", str(tmp_path / "found.json"), name=name)
    assert "no CUDA device, so nothing was measured; --tiny" in capsys.readouterr().out
    assert not (tmp_path / "found.json").exists()
