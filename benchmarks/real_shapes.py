"""Real shapes with random weights on one CUDA device: speed and peak memory of a rollout and a LoRA update.

python benchmarks/real_shapes.py [--recipes llada8b_lora dream7b_lora sdar4b_lora] [--steps 4] [--tiny] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import save

from unmask.policies.denoiser import Denoiser
from unmask.policies.reference import build_reference
from unmask.recipes.loading import load_recipe
from unmask.recipes.schema import Recipe
from unmask.rl.memory import estimate, known_config, on_meta
from unmask.rl.objective import build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.noise import generator
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Trajectory

RECIPES = ["llada8b_lora", "dream7b_lora", "sdar4b_lora"]
TOLERANCE = 0.15
# The same recipes on shrunk shapes, for a machine without a device: what the tests run.
TINY = ["model.device=cpu", "model.dtype=float32", "model.mask_token_id=null", "model.lora.rank=2"]
TINY += ["rollout.canvas=16", "rollout.prompt_limit=8", "rollout.micro_batch=4", "objective.chunk=3"]
TINY += ["rollout.sampler.schedule={name: blocks, size: 4, per_step: 2}"]
SHRUNK = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "vocab_size": 320, "d_model": 64, "mlp_hidden_size": 96, "n_layers": 2, "n_heads": 4},
    **{"n_kv_heads": 2, "embedding_size": 320, "num_experts": 16, "moe_intermediate_size": 32},
}


def shrunk(path: str, folder: Path) -> str:
    """Return a folder whose config.json is the published one of `path` with small sizes."""
    vendor = known_config(path)
    assert vendor is not None
    folder.mkdir()
    sizes = {key: value for key, value in SHRUNK.items() if key in vendor}
    (folder / "config.json").write_text(json.dumps(vendor | sizes))
    return str(folder)


def random_denoiser(recipe: Recipe, device: torch.device) -> Denoiser:
    """Return the recipe's denoiser with its adapter, in the published shape, its weights made on the device."""
    vendor = known_config(recipe.model.path)
    assert vendor is not None
    denoiser = on_meta(recipe, vendor, attention="sdpa")
    denoiser.model.to_empty(device=device)
    drawn = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in denoiser.model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif "lora_B" in name:
                parameter.zero_()
            else:
                parameter.normal_(0.0, 0.02, generator=drawn)
        for buffer in denoiser.model.buffers():
            buffer.zero_()
    trunk = denoiser.base.base_model
    with torch.device(device):
        trunk.rotary_emb = type(trunk.rotary_emb)(denoiser.base.config)
    denoiser.model.eval()
    # Any ids will do: no text is read here.
    return replace(denoiser, family=replace(denoiser.family, mask_token_id=0, eos_token_ids=(1,)))


class Clock:
    """Seconds and peak bytes of what is done since it was made; no bytes on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.device, self.started = device, time.perf_counter()

    def read(self) -> tuple[float, int | None]:
        """Return (seconds, peak bytes)."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.started
        return seconds, torch.cuda.max_memory_allocated(self.device) if self.cuda else None


def roll_out(recipe: Recipe, denoiser: Denoiser, sampler: Any) -> Trajectory:
    """Return one micro-batch of rollouts on random prompts that fill the prompt limit."""
    rows, width, device = recipe.rollout.micro_batch, recipe.rollout.prompt_limit, denoiser.device
    drawn = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(2, denoiser.family.vocab_size, (rows, width), generator=drawn).to(device)
    canvas_BL = torch.full((rows, recipe.rollout.canvas), denoiser.family.mask_token_id, device=device)
    mask_BQ, rollout_id_B = torch.ones_like(prompt_BQ, dtype=torch.bool), torch.arange(rows, device=device)
    return denoise(denoiser, sampler, prompt_BQ, mask_BQ, canvas_BL, rollout_id_B, seed=0)


def measure(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Return speed and peak memory of a rollout and an update, and what `unmask check` would have said."""
    # A model refers to itself in cycles: without this the one before would still be there.
    gc.collect()
    denoiser = random_denoiser(recipe, device)
    section = recipe.rollout.sampler.model_dump() | {"eos": {"rule": "none", "suppress": True}}
    sampler = build_sampler(section, temperature=recipe.rollout.temperature)
    objective = build_objective(recipe.objective.model_dump())
    reference = build_reference(denoiser, recipe.objective.reference, beta=objective.beta)
    trained = [parameter for parameter in denoiser.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.optim.lr)
    clock = Clock(device)
    trajectory = roll_out(recipe, denoiser, sampler)
    rollout_s, rollout_peak = clock.read()
    advantage_B = torch.linspace(-1, 1, len(trajectory), device=device)
    denoiser.model.train()
    clock = Clock(device)
    plan = objective.plan(
        denoiser, reference, trajectory, advantage_B, rng=generator(0, "estimator", 0), sampler=sampler
    )
    statistics = objective.backward(denoiser, plan)
    optimizer.step()
    update_s, update_peak = clock.read()
    found = estimate(recipe)
    assert found is not None
    peak = None if rollout_peak is None or update_peak is None else max(rollout_peak, update_peak)
    length = recipe.rollout.prompt_limit + recipe.rollout.canvas
    return {
        "recipe": recipe.name,
        "parameters": sum(parameter.numel() for parameter in denoiser.model.parameters()),
        "rows": len(trajectory),
        "steps": int(trajectory.steps_B.max()),
        "rollout_s": rollout_s,
        "rollout_tokens_per_s": trajectory.tokens_BL.numel() / rollout_s,
        "rollout_peak_bytes": rollout_peak,
        "views": len(plan.views),
        "update_s": update_s,
        "update_tokens_per_s": len(plan.views) * length / update_s,
        "update_peak_bytes": update_peak,
        "ratio_max_deviation": statistics["ratio_max_deviation"],
        "estimated_bytes": found.total,
        "estimated_over_peak": None if peak is None else found.total / peak,
        "within_tolerance": None if peak is None else abs(found.total / peak - 1) <= TOLERANCE,
    }


def main() -> None:
    """Measure every recipe one after the other and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--steps", type=int, default=4, help="steps of each rollout that the update scores")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: does the script work")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("real_shapes: there is no CUDA device, so nothing was measured; --tiny runs the same path on the CPU.")
        return
    device = torch.device("cpu" if arguments.tiny else "cuda")
    steps = f"objective.estimator={{name: trace, steps: uniform_k, k: {arguments.steps}}}"
    rows, recipes = [], []
    for name in arguments.recipes:
        recipe = load_recipe(name, [steps, *(TINY if arguments.tiny else [])])
        assert isinstance(recipe, Recipe)
        with tempfile.TemporaryDirectory() as folder:
            if arguments.tiny:
                recipe.model.path = shrunk(recipe.model.path, Path(folder) / "model")
            rows.append(measure(recipe, device))
        recipes.append(recipe)
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
    result = {"tolerance": TOLERANCE, "rows": rows}
    dtype = recipes[0].model.dtype
    name = "real_shapes_tiny" if arguments.tiny else "real_shapes"
    print(f"wrote {save(name, result, arguments.json, seeds={'weights': 0}, device=str(device), dtype=dtype)}")


if __name__ == "__main__":
    main()
