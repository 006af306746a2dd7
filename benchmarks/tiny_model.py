"""The shipped model's held-out exact rate by task, difficulty and tokens a step.

python benchmarks/tiny_model.py [--model unmask:tiny] [--problems 128] [--json FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from common import save

import unmask.recipes.tasks  # noqa: F401 (registers the tasks)
from unmask.policies.loading import load_denoiser
from unmask.recipes.registry import SLOTS
from unmask.rewards import build_rewards, score
from unmask.rl.evaluate import evaluate, heldout_rows
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import RolloutWorker

CASES = [
    *[("arithmetic", {"level": level}, canvas) for level, canvas in (("easy", 64), ("medium", 80), ("hard", 96))],
    *[("countdown", {"numbers": [count, count], "largest": 12, "operators": "+-"}, 48) for count in (3, 4)],
    *[("sudoku", {"clues": [low, high]}, 48) for low, high in ((6, 8), (9, 12))],
]
BLOCKS = {"name": "blocks", "size": 16}
DECODING: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    *[(BLOCKS | {"per_step": per_step}, "confidence", {"name": "top"}) for per_step in (1, 2, 4, 8)],
    (BLOCKS | {"per_step": 1}, "random", {"name": "top"}),
    ({"name": "blocks", "size": 8, "per_step": 2}, "confidence", {"name": "top"}),
    *[(BLOCKS | {"per_step": 1}, "confidence", {"name": "threshold", "level": level}) for level in (0.5, 0.8)],
]


def main() -> None:
    """Evaluate every case at every decoding, greedily, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unmask:tiny")
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    denoiser = load_denoiser(arguments.model)
    table = []
    for task, knobs, canvas in CASES:
        rows = heldout_rows(SLOTS["task"].build({"name": task, **knobs})("heldout", seed=0), arguments.problems)
        for schedule, ranking, selection in DECODING:
            parts = {"schedule": schedule, "score": ranking, "selection": selection}
            sampler = build_sampler(parts, temperature=0.0)
            scorer = partial(score, build_rewards([task]))
            worker = RolloutWorker(denoiser, denoiser.tokenizer, sampler, scorer, 1, canvas, 10**6, seed=0)
            found = evaluate(worker, rows).as_dict()
            table.append({"task": task, **knobs, **parts, "canvas": canvas, **found})
            decoding = " ".join(str(value) for value in (*schedule.values(), *selection.values()))
            print(
                f"{task:10} {knobs!s:22} {decoding:26} {ranking:10} exact {found['exact']:.3f} ± {found['stderr']:.3f} "
                f"NFE {found['nfe']:.1f} length {found['length']:.1f}",
                flush=True,
            )
    target = save("tiny_model", {"model": arguments.model, "table": table}, arguments.json, seeds={"rollouts": 0})
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
