"""The memory estimate of `unmask check` against the peak that a rollout and an update really reach, on small shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask.policies.adapters import attach_adapter, lora_config
from unmask.policies.denoiser import Denoiser
from unmask.policies.loading import load_denoiser
from unmask.policies.reference import build_reference
from unmask.policies.tokenizers import byte_tokenizer
from unmask.recipes.loading import load_recipe
from unmask.recipes.schema import Recipe
from unmask.rl.memory import estimate
from unmask.rl.objective import build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.noise import generator
from unmask.rollouts.sampler import build_sampler

FIXTURES = Path(__file__).parent / "fixtures"
BASE = ["model.device=cpu", "rollout.prompt_limit=64", "rollout.micro_batch=8", "objective.chunk=4"]
BASE += ["rollout.sampler.schedule={name: blocks, size: 16, per_step: 8}"]


class Peak(TorchDispatchMode):
    """Follows every tensor that is made inside: `bytes` are those alive at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.counted = 0  # what is alive, and what has died since it was last looked at
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(t.untyped_storage()).cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                if reference.cdata not in given:
                    self.alive[reference.cdata] = (reference, tensor.untyped_storage().nbytes())
                    self.counted += tensor.untyped_storage().nbytes()
        if self.counted > self.bytes:
            self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
            self.counted = sum(size for _, size in self.alive.values())
            self.bytes = max(self.bytes, self.counted)
        return out


def load(recipe: Recipe) -> Denoiser:
    section = recipe.model
    tokenizer = None if section.path == "unmask:tiny" else byte_tokenizer()
    given = {"mask_token_id": section.mask_token_id, "block_length": section.block_length}
    denoiser = load_denoiser(section.path, dtype=section.dtype, tokenizer=tokenizer, **given)
    if section.lora is not None:
        denoiser = attach_adapter(denoiser, lora_config(denoiser, **section.lora.model_dump()))
    return denoiser


def peaks_of(recipe: Recipe) -> tuple[int, int, int]:
    """Return the bytes of the weights, and of all else at the worst moment of two rollouts and of two updates."""
    denoiser = load(recipe)
    section = recipe.rollout.sampler.model_dump() | {"eos": {"rule": "none", "suppress": True}}
    sampler = build_sampler(section, temperature=recipe.rollout.temperature)
    objective = build_objective(recipe.objective.model_dump())
    weights = sum(p.numel() * p.element_size() for p in denoiser.model.parameters())
    rows, width, family = recipe.rollout.micro_batch, recipe.rollout.prompt_limit, denoiser.family
    prompt_BQ = torch.randint(0, 200, (rows, width), generator=torch.Generator().manual_seed(0))
    # Prompts differ in length, as those of a task do.
    mask_BQ = torch.arange(width) >= torch.arange(rows)[:, None]
    canvas_BL = torch.full((rows, recipe.rollout.canvas), family.mask_token_id)
    found = [0, 0]
    with Peak() as peak:
        reference = build_reference(denoiser, recipe.objective.reference, beta=objective.beta)
        optimizer = torch.optim.AdamW([p for p in denoiser.model.parameters() if p.requires_grad], lr=1e-4)
        for step in range(2):  # the second finds the optimizer's moments in place
            denoiser.model.eval()
            drawn = denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, torch.arange(rows), seed=0, step=step)
            found[0], peak.bytes = max(found[0], peak.bytes), 0
            denoiser.model.train()
            rng = generator(0, "estimator", step)
            plan = objective.plan(denoiser, reference, drawn, torch.linspace(-1, 1, rows), rng=rng, sampler=sampler)
            objective.backward(denoiser, plan)
            optimizer.step()
            optimizer.zero_grad()
            found[1], peak.bytes = max(found[1], peak.bytes), 0
    return weights, found[0], found[1]


def fixture(name: str, mask: int, block: int | None = None) -> list[str]:
    path = [f"model.path={FIXTURES / name}", f"model.mask_token_id={mask}", "rollout.canvas=64"]
    blocks = ["rollout.sampler.schedule={name: blocks, size: 8, per_step: 4}"]
    return path + blocks + ([] if block is None else [f"model.block_length={block}"])


CASES = {
    "adapter": [],
    "all weights and a frozen copy": ["model.lora=null"],
    "shifted": fixture("dream", 361),
    "blocks behind a cache": [*fixture("sdar", 346), "rollout.sampler.cache=block_causal"],
    "experts": fixture("llada2", 322, 8),
}


@pytest.mark.parametrize(
    "overrides",
    [
        *(pytest.param(overrides, id=name) for name, overrides in CASES.items()),
        pytest.param(["model.dtype=bfloat16"], id="bfloat16", marks=pytest.mark.slow),  # slow on many a CPU
    ],
)
def test_the_estimate_is_the_peak(overrides: list[str]) -> None:
    steps = ["objective.estimator={name: trace, steps: uniform_k, k: 2}"]
    recipe = load_recipe("cj_grpo_tiny_arithmetic.yaml", [*BASE, *steps, *overrides])
    assert isinstance(recipe, Recipe)
    found, (weights, rollout, update) = estimate(recipe), peaks_of(recipe)
    measured = weights + max(rollout, update)
    assert found is not None and abs(found.total / measured - 1) <= 0.15, (found, weights, rollout, update)
