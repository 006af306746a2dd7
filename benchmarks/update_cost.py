"""What an update costs: seconds and memory of every method that trains a denoiser, and of a plain CJ-GRPO beside ours.

python benchmarks/update_cost.py [--rounds 3] [--methods NAME ...] [--rollouts 4] [--canvas 64] [--json FILE]

One random LLaDA shape, rollouts that fill the canvas two tokens a step (justgrpo: one, from left to right), and each
row of methods.yaml as it stands; beta with a frozen copy, since all weights are trained. Every case has a process of
its own. `update_s` is a backward and the share of the plan (old and reference log-probs) that falls on one of the row's
inner steps. `graph_mb` is what graphs hold at once, counted as autograd saves and frees it, weights left out; `peak_mb`
by how much the process grew above what it held before the update (Linux).

CJ-GRPO is measured at 8 and at as many steps as positions as well, and against the plain implementation below: a
forward a step with the logits of the whole canvas, all graphs kept until one backward at the end. Both make the same
update, reference included; the policy has moved since the rollouts, so that ratios are not 1.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import mean_and_error, save
from memory import kilobytes
from rich.console import Console
from rich.table import Table
from shapes import random_llama
from torch import Tensor

from unmask.policies.denoiser import Denoiser
from unmask.policies.reference import build_reference
from unmask.recipes.loading import load_methods
from unmask.rl.credit import Credit
from unmask.rl.objective import Objective, build_objective
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import Trajectory
from unmask.rollouts.worker import with_hints

BLOCK_CAUSAL = ("ebpo", "tracerl_blocks")
METHODS = [name for name, row in load_methods().items() if "positions" not in row["objective"].get("actions", [])]
MOVED = 0.01  # by how much the weights move after the rollouts, relative to their own spread


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the batch."""

    vocabulary: int = 32768
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 704
    rollouts: int = 4
    prompt: int = 16
    canvas: int = 64
    per_step: int = 2
    block: int = 16
    rounds: int = 3


@dataclass(frozen=True)
class Case:
    """One process: a method, the number of steps where it is not the shape's, and whether the plain code runs."""

    method: str
    steps: int | None = None
    plain: bool = False


class GraphMemory:
    """Bytes that graphs hold at once: storages of saved tensors, weights left out."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.holders, self.now, self.peak = weights, dict[int, int](), 0, 0

    def save(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        kept, storage = tensor.detach(), tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.weights:
            self.holders[place] = self.holders.get(place, 0) + 1
            if self.holders[place] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._free, place, size)
        return kept

    def _free(self, place: int, size: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            self.now -= size


def random_denoiser(shape: Shape, *, blocks: bool) -> Denoiser:
    """Return a random model of the shape; block-causal with `blocks`."""
    sizes = (shape.vocabulary, shape.hidden, shape.mlp, shape.layers, shape.heads)
    return random_llama(*sizes, block_length=shape.block if blocks else None)


def move(denoiser: Denoiser) -> None:
    """Add noise to the weights, as an optimizer's step would."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in denoiser.model.parameters():
            if weight.ndim == 2:
                weight += MOVED * weight.std() * torch.randn(weight.shape, generator=rng)


def rolled_out(denoiser: Denoiser, shape: Shape, case: Case) -> tuple[Trajectory, Sampler]:
    """Return the rollouts of a case and their sampler; half of IGPO's have a hint at every fourth position."""
    schedule: dict[str, Any] = {"name": "blocks", "size": shape.block, "per_step": shape.per_step}
    if case.steps is not None:
        schedule = {"name": "uniform", "steps": case.steps}
    elif case.method == "justgrpo":
        schedule = {"name": "blocks", "size": 1, "per_step": 1}
    sampler = build_sampler({"schedule": schedule, "eos": {"suppress": True}})
    rng, rows = torch.Generator().manual_seed(0), shape.rollouts
    prompt_BQ = torch.randint(0, shape.vocabulary - 2, (rows, shape.prompt), generator=rng)
    canvas_BL = torch.full((rows, shape.canvas), denoiser.family.mask_token_id)
    hinted_B = torch.arange(rows) % 2 == 0 if case.method == "igpo" else torch.zeros(rows, dtype=torch.bool)
    hint_BL = torch.randint(0, shape.vocabulary - 2, canvas_BL.shape, generator=rng)
    canvas_BL = torch.where(hinted_B[:, None] & (torch.arange(shape.canvas) % 4 == 0), hint_BL, canvas_BL)
    trajectory = denoise(
        denoiser,
        sampler,
        prompt_BQ,
        torch.ones_like(prompt_BQ, dtype=torch.bool),
        canvas_BL,
        torch.arange(rows),
        seed=0,
        drafts=case.method == "mdpo",
    )
    return with_hints(trajectory, hinted_B), sampler


def objective_of(case: Case, shape: Shape) -> tuple[Objective, dict[str, Any]]:
    """Return a row's objective, blocks of the model's size where the row scores whole blocks, and its section."""
    section = dict(load_methods()[case.method]["objective"])
    if case.method in BLOCK_CAUSAL:
        section["estimator"] = {**section["estimator"], "size": shape.block}
    return build_objective(section), section


def credit_of(case: Case, trajectory: Trajectory) -> Credit:
    """Return advantages: of steps for MDPO, else of rollouts."""
    rows = len(trajectory)
    if case.method != "mdpo":
        return Credit(torch.linspace(-1, 1, rows))
    shape = (rows, int(trajectory.steps_B.max()))
    return Credit(torch.randn(shape, generator=torch.Generator().manual_seed(2)), by="step")


def plain_update(
    denoiser: Denoiser, reference: Denoiser, trajectory: Trajectory, advantage_B: Tensor, section: dict[str, Any]
) -> None:
    """Add the gradient of CJ-GRPO's loss: full-canvas logits, the graph of every step kept until the end."""
    born_BL, target_BL, length = trajectory.born_BL.long(), trajectory.tokens_BL, trajectory.canvas
    low, high = (section["surrogate"][key] for key in ("low", "high"))
    total = torch.zeros(())

    def logprobs(model: Any, ids_BT: Tensor) -> Tensor:
        logits_BLV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), logits_to_keep=length).logits
        logits_BLV[..., list(trajectory.banned_token_ids)] = -torch.inf
        logp_BLV = torch.log_softmax(logits_BLV.float() / trajectory.temperature, dim=-1)
        return logp_BLV.gather(-1, target_BL[..., None]).squeeze(-1)

    for step in range(int(trajectory.steps_B.max())):
        canvas_BL = torch.where((born_BL >= 0) & (born_BL < step), target_BL, trajectory.mask_token_id)
        ids_BT = torch.cat([trajectory.prompt_BQ, canvas_BL], dim=1)
        decided_BL = born_BL == step
        now_BL = logprobs(denoiser.model, ids_BT)
        with torch.no_grad():
            gone_BL = logprobs(reference.model, ids_BT) - now_BL
        # Positions that this step did not decide are computed and left out by their weight.
        ratio_BL = torch.where(decided_BL, now_BL - trajectory.logprob_BL, 0.0).exp()
        gain_BL = torch.minimum(
            ratio_BL * advantage_B[:, None], ratio_BL.clamp(1 - low, 1 + high) * advantage_B[:, None]
        )
        apart_BL = torch.where(decided_BL, gone_BL + (now_BL.detach() - now_BL), 0.0)
        loss_BL = section["beta"] * (apart_BL.exp() - apart_BL - 1) - gain_BL
        share_BL = decided_BL / decided_BL.sum(dim=1, keepdim=True).clamp(min=1) / trajectory.steps_B[:, None]
        total = total + (share_BL * loss_BL).sum()
    (total / len(trajectory)).backward()


def gradient(denoiser: Denoiser) -> Tensor:
    """Return the gradient as one vector, and clear it without giving its memory back."""
    vector = torch.cat([weight.grad.flatten() for weight in denoiser.model.parameters() if weight.grad is not None])
    denoiser.model.zero_grad(set_to_none=False)
    return vector.double()


def held_by_graphs(denoiser: Denoiser, update: Callable[[], Any]) -> int:
    """Return the most bytes that graphs hold while `update` runs."""
    memory = GraphMemory({weight.untyped_storage().data_ptr() for weight in denoiser.model.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(memory.save, lambda kept: kept):
        update()
    gc.collect()
    return memory.peak


def measure(case: Case, shape: Shape) -> dict[str, Any]:
    """Return seconds and memory of one case; runs in a process of its own."""
    denoiser = random_denoiser(shape, blocks=case.method in BLOCK_CAUSAL)
    objective, section = objective_of(case, shape)
    trajectory, sampler = rolled_out(denoiser, shape, case)
    reference = build_reference(denoiser, section["reference"], beta=objective.beta)
    move(denoiser)
    inner = section["inner_steps"]

    def plan(made: Trajectory, number: int) -> Any:
        rng = torch.Generator().manual_seed(number)
        credit = credit_of(case, made)
        return objective.plan(denoiser, reference, made, credit, rng=rng, sampler=sampler, inner=(0, inner))

    # Something small first: what is loaded lazily, and the gradients' own memory, are not what is measured.
    objective.backward(denoiser, plan(trajectory.select(torch.tensor([0])), 0))
    gradient(denoiser)
    gc.collect()
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (Linux)
    rounds, peak, made = [], 0, None
    for number in range(shape.rounds):
        started = time.perf_counter()
        made = None if case.plain else plan(trajectory, number)
        planned = time.perf_counter()
        if case.plain:
            plain_update(denoiser, reference, trajectory, credit_of(case, trajectory).value, section)  # type: ignore[arg-type]
        else:
            objective.backward(denoiser, made)
        rounds.append((planned - started, time.perf_counter() - planned))
        peak = peak or kilobytes("VmHWM")
        found = gradient(denoiser)
    held: dict[str, float] = {}
    if case.plain:
        advantage_B = credit_of(case, trajectory).value
        graph = held_by_graphs(
            denoiser,
            lambda: plain_update(denoiser, reference, trajectory, advantage_B, section),  # type: ignore[arg-type]
        )
        gradient(denoiser)
        objective.backward(denoiser, plan(trajectory, shape.rounds - 1))
        ours = gradient(denoiser)
        held["gradient_difference"] = float((found - ours).norm() / ours.norm())
    else:
        graph = held_by_graphs(denoiser, lambda: objective.backward(denoiser, made))
        held |= {"canvases": len(made.views), "tokens": len(made.weight_K)}
    share = 1.0 if objective.redraw else 1.0 / inner
    return {
        **asdict(case),
        "inner_steps": inner,
        "steps": int(trajectory.steps_B.max()),
        **held,
        "plan_s": mean_and_error([first for first, _ in rounds]),
        "backward_s": mean_and_error([second for _, second in rounds]),
        "update_s": mean_and_error([share * first + second for first, second in rounds]),
        "alone_s": mean_and_error([first + second for first, second in rounds]),
        "graph_mb": graph / 1e6,
        "peak_mb": (peak - before) / 1e3,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of methods."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("method", "steps", "canvases", "plan s", "backward s", "update s", "graphs MB", "peak MB"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        seconds = [f"{row[key]['mean']:.2f} ± {row[key]['stderr']:.2f}" for key in ("plan_s", "backward_s", "update_s")]
        memory = [f"{row[key]:.0f}" for key in ("graph_mb", "peak_mb")]
        table.add_row(row["method"], str(row["steps"]), str(row["canvases"]), *seconds, *memory)
    Console(width=120).print(table)


def compared(few: dict[str, Any], many: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """Return CJ-GRPO's memory at many steps against few, and its speed and gradient against the plain code."""
    return {
        "few": few,
        "many": many,
        "plain": plain,
        "memory_ratio_graphs": _ratio(many, few, "graph_mb"),
        "memory_ratio_peak": _ratio(many, few, "peak_mb"),
        "times_faster": plain["alone_s"]["mean"] / many["alone_s"]["mean"],
        "plain_memory_ratio_graphs": _ratio(plain, many, "graph_mb"),
        "plain_memory_ratio_peak": _ratio(plain, many, "peak_mb"),
        "gradient_difference": plain["gradient_difference"],
    }


def _ratio(one: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    """Return the ratio of two rows' numbers; None where shapes are so small that the process did not grow."""
    return one[key] / other[key] if other[key] else None


def main() -> None:
    """Measure every case in a fresh process, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--json", type=Path, default=None)
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = parser.parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in asdict(Shape())})
    most = shape.canvas
    cases = [Case(name) for name in arguments.methods]
    cases += [Case("cj_grpo", steps) for steps in (8, most)] + [Case("cj_grpo", most, plain=True)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unmask.rl.objective", "transformers.models.llama.modeling_llama"])
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for case in cases:
            rows.append(pool.submit(measure, case, shape).result())
            print(f"{case}: {rows[-1]['alone_s']['mean']:.2f} s a plan and a backward", flush=True)
    *methods, few, many, plain = rows
    show(methods)
    found = compared(few, many, plain)
    print({key: round(value, 7) for key, value in found.items() if isinstance(value, float)})
    weights = sum(weight.numel() for weight in random_denoiser(shape, blocks=False).model.parameters())
    result = {"shape": asdict(shape) | {"parameters": weights}, "methods": methods, "cj_grpo": found}
    print(f"wrote {save('update_cost', result, arguments.json, seeds={'weights': 0, 'prompts': 0, 'moved': 1})}")


if __name__ == "__main__":
    main()
