"""What every benchmark shares: where results go, and the manifest beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from unmask.rl.runfolder import manifest, write_json

RESULTS = Path(__file__).parent / "results"


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Return mean and standard error of the mean (n - 1 in the variance)."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else math.nan
    return {"mean": mean, "stderr": math.sqrt(variance / n) if n > 1 else math.nan, "n": n}


def save(
    name: str,
    result: dict[str, Any],
    path: Path | None,
    *,
    seeds: dict[str, int],
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Write `result` with a manifest to `path`, or to benchmarks/results/NAME.json."""
    target = path or RESULTS / f"{name}.json"
    record = {"benchmark": name, "result": result, "manifest": manifest(device=device, dtype=dtype, seeds=seeds)}
    write_json(target, json.loads(json.dumps(record)))
    return target
