"""Accuracy against denoiser calls of the shipped model, sampler by sampler: `unmask bench rollout` with a manifest.

python benchmarks/samplers.py sudoku|arithmetic [--problems 512] [--json FILE] [--plot FILE.png]

Greedy, on held-out problems, canvas 64; every sampler decodes the same problems, so that differences to the reference
(LLaDA's low confidence, one token a step) have the standard error of pairs.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, save

from unmask.rl.bench_rollout import HEADER, REFERENCE, bench_rollout, plot

CASES = {
    "sudoku": ("cj_grpo_tiny_sudoku", ["task.clues=[9,12]", "rollout.canvas=64"]),
    "arithmetic": ("cj_grpo_tiny_arithmetic", ["task.level=easy", "rollout.canvas=64"]),
}
SAMPLERS = [
    # Fewer calls by plan: blocks, and the whole canvas in log2 of its length steps.
    *[f"{REFERENCE}:schedule.per_step={count}" for count in (2, 4, 8)],
    f"{REFERENCE}:schedule={{name: uniform, steps: 6}}",
    "ass",
    "eoser_ass",
    # RCR takes back and makes as many calls as low confidence of the same pace.
    *[f"rcr:schedule.per_step={count}" for count in (2, 4, 8)],
    # Fewer calls by what the model is sure of.
    *[f"fast_dllm_threshold:selection.level={level}" for level in (0.7, 0.9)],
    *[f"{name}:selection.f={f}" for name in ("fast_dllm_factor", "frechet") for f in (0.5, 1.0)],
    *[f"entropy_bounded:selection.nats={nats}" for nats in (0.01, 0.1)],
    # The same calls, cheaper ones.
    *[f"{REFERENCE}:cache={cache}" for cache in ("dual", "{name: dual, refresh: 8}")],
]


def main() -> None:
    """Decode one task with every sampler; write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1, help="a model this small gains little from more")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    target, overrides = CASES[arguments.case]
    name = f"samplers_{arguments.case}"
    print(HEADER, flush=True)
    found = bench_rollout(
        target, SAMPLERS, problems=arguments.problems, overrides=overrides, progress=partial(print, flush=True)
    )
    picture = arguments.plot or RESULTS / f"{name}.png"
    plot(found, picture)
    print(f"wrote {save(name, found, arguments.json, seeds={'rollouts': 0})} and {picture}")


if __name__ == "__main__":
    main()
