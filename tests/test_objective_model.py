"""The objective on a real transformer: ratios of the first inner step, and memory that does not grow with steps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import new_denoiser
from unmask.recipes.registry import SLOTS
from unmask.rl.objective import Objective, build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

CANVAS = 16
ALL = {"name": "trace", "tokens": "all"}
BLOCKS = {"name": "blocks", "size": 8, "per_step": 2}
SAMPLERS: dict[str, dict[str, object]] = {
    **{f"score_{name}": {"schedule": BLOCKS, "score": name} for name in SLOTS["score"] if name != "planner"},
    "uniform": {"schedule": {"name": "uniform", "steps": 5}},
    "cosine": {"schedule": {"name": "cosine", "steps": 5}},
    "no_stop": {"schedule": BLOCKS, "eos": {"rule": "none"}},
    "suppress": {"schedule": BLOCKS, "eos": {"suppress": True}},
    "threshold": {"schedule": BLOCKS, "selection": {"name": "threshold", "level": 0.02}},
    "sampled_confidence": {"schedule": BLOCKS, "score": "sampled_confidence", "score_temperature": 0.7},
    "naive": {"schedule": BLOCKS, "score": "sampled_confidence", "exact": False},
}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    made = new_denoiser(hidden_size=32, layers=2, heads=2, mlp=64, seed=1)
    # Random weights of the usual size give almost uniform tokens; larger ones make the distributions differ.
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(3.0 if parameter.ndim == 2 else 1.0)
    return made


def rollouts(denoiser: Denoiser, sampler, rows: int = 10, canvas: int = CANVAS) -> Trajectory:
    rng = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(0, 256, (rows, 6), generator=rng)
    mask_BQ = torch.arange(6) >= torch.randint(0, 5, (rows, 1), generator=rng)
    canvas_BL = torch.full((rows, canvas), denoiser.family.mask_token_id)
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0)


def objective(chunk: int = 7, **choices: object) -> Objective:
    section = {"estimator": "trace", "unit": "token", "surrogate": "ppo_clip", "weight": "per_step_mean"}
    return build_objective({**section, "chunk": chunk, **choices})


@pytest.mark.parametrize("unit", ["token", "step", "rollout"])
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_first_inner_step_has_ratio_one(denoiser: Denoiser, name: str, unit: str) -> None:
    """max |ratio - 1| <= 1e-5 in fp32, although rollout and update put other rows into a forward."""
    sampler = build_sampler(SAMPLERS[name], temperature=0.9)
    trajectory = rollouts(denoiser, sampler)
    chosen = objective(unit=unit, bound="mean")
    plan = chosen.plan(denoiser, None, trajectory, torch.linspace(-1, 1, 10), rng=None, sampler=sampler)
    statistics = chosen.backward(denoiser, plan)
    denoiser.model.zero_grad()
    assert statistics["tokens"] == trajectory.action_BL().sum() > 50
    assert statistics["ratio_max_deviation"] <= 1e-5
    assert statistics["mismatch_max"] <= 1e-5
    # The choice of positions is recomputed as well, from the drawn tokens and the window of that step.
    choices = len(plan.old_A) - len(plan.weight_K)
    assert choices == (len(plan.views) if "sampled_" in name else 0)


def gradient(denoiser: Denoiser, chunk: int, unit: str) -> Tensor:
    sampler = build_sampler({"schedule": BLOCKS, "eos": {"rule": "none"}})
    chosen = objective(chunk=chunk, unit=unit, bound="mean", beta=0.1)
    plan = chosen.plan(
        denoiser, denoiser, rollouts(denoiser, sampler), torch.linspace(-1, 1, 10), rng=None, sampler=sampler
    )
    chosen.backward(denoiser, plan)
    vector = torch.cat([p.grad.flatten() for p in denoiser.model.parameters()])
    denoiser.model.zero_grad()
    return vector


@pytest.mark.parametrize("unit", ["token", "rollout"])
def test_gradient_does_not_depend_on_the_chunk(denoiser: Denoiser, unit: str) -> None:
    """fp32 throughout, so equal up to rounding."""
    exact = gradient(denoiser, 1000, unit)
    assert ((gradient(denoiser, 7, unit) - exact).norm() / exact.norm()).item() <= 1e-5


class GraphMemory:
    """Bytes of the tensors that graphs hold at once, counted as autograd saves them and as they are freed."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def save(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        kept = tensor.detach()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self.free, size)
        return kept

    def free(self, size: int) -> None:
        self.now -= size


def graph_peak(denoiser: Denoiser, steps: int, unit: str) -> int:
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": steps}, "eos": {"rule": "none"}})
    trajectory = rollouts(denoiser, sampler, rows=4, canvas=64)
    assert trajectory.steps_B.tolist() == [steps] * 4
    chosen = objective(chunk=8, unit=unit, estimator=ALL)
    plan = chosen.plan(denoiser, None, trajectory, torch.ones(4), rng=None, sampler=sampler)
    memory = GraphMemory()
    with torch.autograd.graph.saved_tensors_hooks(memory.save, lambda kept: kept):
        chosen.backward(denoiser, plan)
    gc.collect()
    denoiser.model.zero_grad()
    assert memory.now == 0
    return memory.peak


@pytest.mark.parametrize("unit", ["token", "rollout"])
def test_memory_of_an_update_does_not_grow_with_steps(denoiser: Denoiser, unit: str) -> None:
    """8 to 64 denoising steps: what graphs hold at once grows by at most 10 % (with one token a step it shrinks)."""
    few, many = graph_peak(denoiser, 8, unit), graph_peak(denoiser, 64, unit)
    assert few > 100_000 and many <= 1.1 * few


def test_plans_grow_by_a_few_numbers_a_view(denoiser: Denoiser) -> None:
    """Canvases are rebuilt when they are scored: 256 views of 64 tokens store no 256 x 64 table."""
    sizes = []
    for steps in (8, 64):
        sampler = build_sampler({"schedule": {"name": "uniform", "steps": steps}, "eos": {"rule": "none"}})
        trajectory = rollouts(denoiser, sampler, rows=4, canvas=64)
        plan = objective(estimator=ALL).plan(denoiser, None, trajectory, torch.ones(4), rng=None, sampler=sampler)
        sizes.append(sum(tensor.nbytes for tensor in plan.tensors().values()))
    assert sizes[1] - sizes[0] == (256 - 32) * (8 + 8 + 4)
