"""On the shipped model: is every canvas rebuilt bit for bit, and is the first ratio 1, for every selection?

python benchmarks/first_step.py [--model unmask:tiny] [--json FILE]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import save
from torch import Tensor

import unmask.recipes.tasks  # noqa: F401 (registers the tasks)
from unmask.policies.loading import load_denoiser
from unmask.recipes.registry import SLOTS
from unmask.rewards import build_rewards, score
from unmask.rl.advantages import group_mean
from unmask.rl.objective import build_objective
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.worker import RolloutWorker

CHOICES: list[dict[str, Any]] = [
    {"selection": "top"},
    {"selection": {"name": "threshold", "level": 0.9}},
    {"score": "sampled_confidence"},
    {"score": "sampled_confidence", "exact": False},
]


class Witness:
    """A denoiser that remembers every canvas it was shown."""

    def __init__(self, denoiser: Any, canvas: int) -> None:
        self.denoiser, self.length, self.seen = denoiser, canvas, []
        self.family, self.model, self.device = denoiser.family, denoiser.model, denoiser.device

    def logits(self, input_ids_BT: Tensor, **options: Any) -> Tensor:
        """Remember and pass on."""
        self.seen.append(input_ids_BT[:, -self.length :].clone())
        return self.denoiser.logits(input_ids_BT, **options)


def main() -> None:
    """Roll out, replay and compare, selection by selection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="unmask:tiny")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    denoiser = load_denoiser(arguments.model)
    task = SLOTS["task"].build({"name": "arithmetic", "level": "easy"})("train", seed=0)
    rows = [task.row(index) for index in range(8)]
    results = []
    for choice in CHOICES:
        section = {"schedule": {"name": "blocks", "size": 16, "per_step": 4}, **choice}
        sampler, witness = build_sampler(section), Witness(denoiser, 64)
        scorer = partial(score, build_rewards(["arithmetic"]))
        worker = RolloutWorker(witness, denoiser.tokenizer, sampler, scorer, 4, 64, 10**6, seed=0)
        batch = worker.collect(rows, step=0)
        trajectory = batch.trajectory
        equal = []
        for step, canvas_AL in enumerate(witness.seen):
            alive = (trajectory.steps_B > step).nonzero().squeeze(1)
            equal.append(torch.equal(canvas_AL, trajectory.canvas_before(alive, torch.full_like(alive, step))))
        objective = build_objective(
            {"estimator": "trace", "unit": "step", "surrogate": "ppo_clip", "weight": "per_step_mean"}
        )
        advantage = group_mean(torch.randn(len(batch), generator=torch.Generator().manual_seed(0)), batch.group_B)
        plan = objective.plan(denoiser, None, trajectory, advantage, rng=None, sampler=sampler)
        statistics = objective.backward(denoiser, plan)
        denoiser.model.zero_grad()
        results.append(
            {
                **choice,
                "canvases_bit_equal": all(equal),
                "denoiser_calls": len(equal),
                "ratio_max_deviation": statistics["ratio_max_deviation"],
                "mismatch_max": statistics["mismatch_max"],
            }
        )
        print(results[-1], flush=True)
    found = {"model": arguments.model, "rows": results}
    print(f"wrote {save('first_step', found, arguments.json, seeds={'rollouts': 0})}")


if __name__ == "__main__":
    main()
