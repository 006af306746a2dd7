"""A run that is killed with SIGKILL and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = [
    "quickstart.yaml",
    "rollout.prompts=4",
    "rollout.group=4",
    "optim.steps=7",
    "objective.inner_steps=3",
    "evaluation.problems=16",
    "run.save_every=1",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "unmask.rl.cli", "train", *arguments]


@pytest.mark.slow
def test_a_run_killed_between_inner_steps_resumes_to_equal_bits(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    subprocess.run(command(*RECIPE, f"run.directory={straight}"), check=True, capture_output=True)
    process = subprocess.Popen(
        command(*RECIPE, f"run.directory={cut}"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    folder = cut / "quickstart"
    deadline = time.monotonic() + 300
    while not (folder / "checkpoint-4" / "unmask.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists(), "the run ended before it was killed"
    subprocess.run(command("--resume", str(folder)), check=True, capture_output=True)
    weights = "adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (straight / "quickstart" / weights).read_bytes()
    assert (folder / "metrics.jsonl").read_text() == (straight / "quickstart" / "metrics.jsonl").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert {"exact", "n"} <= summary["before"].keys() and summary["wall_s"] > 0 and summary["n"] == 16
