"""Peak memory of one update (plan and backward) as the number of denoising steps grows: it should not.

python benchmarks/memory.py [--steps 8 16 32 64] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from common import save

from unmask.policies.loading import new_denoiser
from unmask.rl.objective import build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler

CANVAS, ROLLOUTS, PROMPT, CHUNK = 64, 64, 32, 32


def kilobytes(key: str) -> int:
    """Return a field of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def measure(steps: int) -> dict[str, float]:
    """Return resident kB before an update and the additional peak during it, for rollouts of `steps` steps."""
    denoiser = new_denoiser(hidden_size=128, layers=4, heads=4, mlp=352)
    prompt = torch.randint(0, 256, (ROLLOUTS, PROMPT), generator=torch.Generator().manual_seed(0))
    canvas = torch.full((ROLLOUTS, CANVAS), denoiser.family.mask_token_id)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    objective = build_objective(
        {"estimator": "trace", "unit": "token", "surrogate": "ppo_clip", "weight": "per_step_mean", "chunk": CHUNK}
    )
    advantage = torch.linspace(-1, 1, ROLLOUTS)

    def update(rollouts: int, schedule_steps: int) -> int:
        """Roll out and update; return the longest rollout's steps."""
        sampler = build_sampler({"schedule": {"name": "uniform", "steps": schedule_steps}, "eos": {"suppress": True}})
        kept = slice(0, rollouts)
        trajectory = denoise(denoiser, sampler, prompt[kept], mask[kept], canvas[kept], torch.arange(rollouts), seed=0)
        plan = objective.plan(denoiser, None, trajectory, advantage[kept], rng=None, sampler=sampler)
        objective.backward(denoiser, plan)
        return int(trajectory.steps_B.max())

    # A small one first: what is loaded lazily, and the gradients' own memory, are not the growth in question.
    update(2, 2)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    done = update(ROLLOUTS, steps)
    return {"steps": done, "before_kb": before, "peak_kb": kilobytes("VmHWM")}


def main() -> None:
    """Measure every step count in a fresh process and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for steps in arguments.steps:
        command = [sys.executable, __file__, "--one", str(steps)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
        rows[-1]["update_kb"] = rows[-1]["peak_kb"] - rows[-1]["before_kb"]
    for row in rows:
        row["peak_ratio"] = row["peak_kb"] / rows[0]["peak_kb"]
        row["update_ratio"] = row["update_kb"] / rows[0]["update_kb"]
        print({key: round(value, 3) for key, value in row.items()})
    shape = {"canvas": CANVAS, "rollouts": ROLLOUTS, "prompt": PROMPT, "chunk_views": CHUNK}
    print(f"wrote {save('memory', {'shape': shape, 'rows': rows}, arguments.json, seeds={'prompts': 0})}")


if __name__ == "__main__":
    main()
