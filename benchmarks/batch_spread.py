"""What the batch size changes of an evaluation: the same protocol, weights and problems at several batch sizes.

Each dtype is evaluated at every batch size; completions are compared with those of the largest. The problems' prompts
should differ in length, so that the batch decides how they are padded. Folders are temporary.

python benchmarks/batch_spread.py [--model unmask:tiny] [--protocol countdown@tiny-drawn] [--problems 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet
from common import save

from unmask.rl.evaluating import carry_out
from unmask.rl.evaluation import Request
from unmask.rl.intervals import estimate
from unmask.rl.results import Finished

SIZES = (1, 8, 64)


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """Return an evaluation's rollouts by problem."""
    files = sorted((folder / "rollouts").glob("*.parquet"))
    return sorted((row for f in files for row in pyarrow.parquet.read_table(f).to_pylist()), key=lambda r: r["problem"])


def measure(request: Request, folder: Path) -> dict[str, Any]:
    """Return one evaluation's exact rate, and its rollouts under `rows`."""
    found = Finished.read(carry_out(request, folder=folder)).summary
    return {key: found[key] for key in ("n", "exact", "stderr", "nfe")} | {"rows": rollouts(folder)}


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return in what share of problems tokens and outcomes differ, and by how much the log-probs of equal ones."""
    pairs = list(zip(one["rows"], other["rows"], strict=True))
    same = [a["tokens"] == b["tokens"] for a, b in pairs]
    kept = [pair for pair, equal in zip(pairs, same, strict=True) if equal]
    gaps = [abs(x - y) for a, b in kept for x, y in zip(a["logprob"], b["logprob"], strict=True)]
    return {
        "other_tokens": estimate([float(not equal) for equal in same])._asdict(),
        "other_outcome": estimate([float(a["outcome"] != b["outcome"]) for a, b in pairs])._asdict(),
        "largest_logprob_gap": max(gaps, default=0.0),
    }


def main() -> None:
    """Measure both dtypes and print the table of docs/evaluating.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unmask:tiny")
    parser.add_argument("--protocol", default="countdown@tiny-drawn")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    print("| dtype | batch | exact | other tokens | other outcome | log-prob gap |\n|---|---|---|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        runs = {}
        for size in SIZES:
            running = (f"model.dtype={dtype}", f"model.device={arguments.device}", f"rollout.micro_batch={size}")
            request = Request(arguments.model, arguments.protocol, overrides=running, problems=arguments.problems)
            with tempfile.TemporaryDirectory() as folder:
                runs[size] = measure(request, Path(folder) / "evaluation")
        results[dtype] = {}
        for size, found in runs.items():
            row = {key: value for key, value in found.items() if key != "rows"} | compared(runs[SIZES[-1]], found)
            results[dtype][str(size)] = row
            shares = " | ".join(f"{100 * row[key]['mean']:.1f} %" for key in ("other_tokens", "other_outcome"))
            gap = f"{row['largest_logprob_gap']:.1e}"
            print(f"| {dtype} | {size} | {row['exact']:.3f} ± {row['stderr']:.3f} | {shares} | {gap} |")
    facts = {"model": arguments.model, "protocol": arguments.protocol, "compared_with": SIZES[-1], "dtypes": results}
    print(f"wrote {save('batch_spread', facts, arguments.json, seeds={'first': 0}, dtype='float32 and bfloat16')}")


if __name__ == "__main__":
    main()
