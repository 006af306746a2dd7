"""A rollout on one CUDA device in LLaDA-8B's shape: how near it comes to what the device can multiply.

python benchmarks/rollout_device.py [--rows 16] [--canvas 256] [--prompt 128] [--per-step 4] [--tiny] [--json FILE]

Random weights, bfloat16, no cache, the whole canvas is filled. Floating-point operations are counted from the shape
(2 a weight and token, attention's two products, the head at the positions that it saw) and divided by seconds and by
what one large product of matrices of the same type reaches in this process. A second rollout, which waits for the
device around every call, shows what trunk and head take of the time; a third runs with the trunk compiled.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import save
from real_shapes import random_denoiser
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.recipes.loading import load_recipe
from unmask.recipes.schema import Recipe
from unmask.rl.bench_rollout import Stopwatch
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler


@dataclass
class Counting(Stopwatch):
    """A stopwatch that also counts what trunk and head saw."""

    columns_seen: int = 0
    rows_seen: int = 0

    def hidden(self, *arguments: Any, **options: Any) -> Tensor:
        """Time and count the trunk."""
        found = super().hidden(*arguments, **options)
        self.columns_seen += found.shape[0] * found.shape[1]
        return found

    def head(self, hidden: Tensor) -> Tensor:
        """Time and count the head."""
        self.rows_seen += len(hidden)
        return super().head(hidden)


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """Return the operations a second of a square product of `size`, the best of `repeats`."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        started = time.perf_counter()
        left @ right
        wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def roll(denoiser: Any, arguments: argparse.Namespace) -> tuple[float, Tensor]:
    """Fill the canvases once; returns seconds and tokens."""
    device = denoiser.device
    drawn = torch.Generator().manual_seed(0)
    prompt_BQ = torch.randint(2, denoiser.family.vocab_size, (arguments.rows, arguments.prompt), generator=drawn)
    canvas_BL = torch.full((arguments.rows, arguments.canvas), denoiser.family.mask_token_id, device=device)
    schedule = {"name": "blocks", "size": arguments.block, "per_step": arguments.per_step}
    sampler = build_sampler({"schedule": schedule, "eos": {"rule": "none"}}, temperature=1.0)
    mask_BQ = torch.ones_like(prompt_BQ, dtype=torch.bool)
    ids_B = torch.arange(arguments.rows, device=device)
    wait(device)
    started = time.perf_counter()
    found = denoise(denoiser, sampler, prompt_BQ.to(device), mask_BQ.to(device), canvas_BL, ids_B, seed=0)
    wait(device)
    return time.perf_counter() - started, found.tokens_BL


def operations(denoiser: Denoiser, columns: int, rows: int, length: int) -> float:
    """Return the floating-point operations of a rollout whose trunk saw `columns` and whose head saw `rows`."""
    config = denoiser.base.config
    matrices = sum(p.numel() for p in denoiser.base.base_model.layers.parameters() if p.ndim == 2)
    attention = 4 * length * config.hidden_size * config.num_hidden_layers
    return columns * (2 * matrices + attention) + rows * 2 * config.hidden_size * denoiser.family.vocab_size


def measure(denoiser: Denoiser, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, utilisation and shares, eager and with a compiled trunk."""
    size = 256 if arguments.tiny else 8192
    peak = ceiling(denoiser.device, next(denoiser.model.parameters()).dtype, size)
    roll(denoiser, arguments)
    eager_s, eager_BL = roll(denoiser, arguments)
    watch = Counting(denoiser)
    watched_s, _ = roll(watch, arguments)
    done = operations(denoiser, watch.columns_seen, watch.rows_seen, arguments.prompt + arguments.canvas)
    found = {
        "ceiling_flops": peak,
        "operations": done,
        "eager_s": eager_s,
        "eager_utilisation": done / eager_s / peak,
        "eager_tokens_per_s": eager_BL.numel() / eager_s,
        "everything_else_share": 1 - (watch.trunk_s + watch.head_s) / watched_s,
    }
    if arguments.no_compile:
        return found
    denoiser.base.base_model.compile(dynamic=False)
    first_s, _ = roll(denoiser, arguments)
    compiled_s, compiled_BL = roll(denoiser, arguments)
    return found | {
        "compiled_first_s": first_s,
        "compiled_s": compiled_s,
        "compiled_utilisation": done / compiled_s / peak,
        "compiled_tokens_per_s": compiled_BL.numel() / compiled_s,
        "compiled_agreement": (compiled_BL == eager_BL).double().mean().item(),
    }


def main() -> None:
    """Measure and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--canvas", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--per-step", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="the tiny model's shape on the CPU: does the script work")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        print("rollout_device: there is no CUDA device, so nothing was measured; --tiny runs the path on the CPU.")
        return
    device = torch.device("cpu" if arguments.tiny else "cuda")
    recipe = load_recipe("cj_grpo_tiny_arithmetic" if arguments.tiny else "llada8b_lora", ["model.lora=null"])
    assert isinstance(recipe, Recipe)
    found = measure(random_denoiser(recipe, device), arguments)
    print({key: round(value, 4) for key, value in found.items()})
    shape = {key: getattr(arguments, key) for key in ("rows", "canvas", "prompt", "block", "per_step")}
    name = "rollout_device_tiny" if arguments.tiny else "rollout_device"
    seeds, dtype = {"weights": 0, "prompts": 0}, recipe.model.dtype
    print(f"wrote {save(name, shape | found, arguments.json, seeds=seeds, device=str(device), dtype=dtype)}")


if __name__ == "__main__":
    main()
