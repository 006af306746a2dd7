"""Unmasking policies on two problems whose best value is known, with the engine and the objective of real runs.

python benchmarks/policy_toys.py [--seeds 3] [--json FILE]

`exchangeable`: 8 equal positions, each newly decided one right with probability 1 - c (1 - n/8)^2 when n are decided
already; the best value is found by dynamic programming. `trap`: 8 text positions in a random forest, certain only once
their parent stands, and 4 padding positions that always look certain and are right only behind the finished text.
"""

from __future__ import annotations

import argparse
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import save
from torch import Tensor

from unmask.policies.layout import Family
from unmask.policies.planner import Planner, PlannerSpec, new_planner
from unmask.rl.advantages import group_mean
from unmask.rl.planning import Planning, bound
from unmask.rl.speed import additive, multiplicative
from unmask.rl.surrogates import ppo_clip
from unmask.rollouts.engine import denoise
from unmask.rollouts.noise import uniform
from unmask.rollouts.planned import Acting
from unmask.rollouts.sampler import Sampler, build_sampler
from unmask.rollouts.trajectory import Trajectory

RIGHT, WRONG, PADDING, EARLY = range(4)
VOCABULARY, MASK = 16, 15
TEXT, PADS = 8, 4
PLANNED = {"schedule": {"name": "whole", "per_step": 1}, "score": "planner", "selection": "planned"}


class Exchangeable:
    """A denoiser that is right with probability 1 - c (1 - n/8)^2, whatever the position."""

    length, width = 8, 1

    def __init__(self, c: float) -> None:
        self.c = c
        self.family = Family("toy", VOCABULARY, MASK, ())

    def prompts(self, ids_B: Tensor, seed: int) -> Tensor:
        """Return prompts; all instances are equal."""
        return torch.zeros(len(ids_B), 1, dtype=torch.long)

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits at `positions_BT`."""
        canvas_BL = input_ids_BT[:, -self.length :]
        done_B1 = (canvas_BL != MASK).sum(dim=1, keepdim=True) / self.length
        right_BL = (1 - self.c * (1 - done_B1) ** 2).expand(-1, self.length)
        logits_BLV = torch.full((*canvas_BL.shape, VOCABULARY), -torch.inf)
        logits_BLV[..., RIGHT], logits_BLV[..., WRONG] = right_BL.log(), (1 - right_BL).log()
        assert positions_BT is not None
        return logits_BLV[positions_BT[:, -self.length :]]

    def solved(self, trajectory: Trajectory) -> Tensor:
        """Return which rollouts are right."""
        return (trajectory.tokens_BL == RIGHT).all(dim=1)

    def best(self, alpha: float, budget: int = 0) -> float:
        """Return the best value, by dynamic programming over (right, wrong, calls).

        With a `budget` up to so many wrong tokens are taken back in a step, fewer than are opened.
        """

        @functools.cache
        def value(right: int, wrong: int, calls: int) -> float:
            done, found = right + wrong, 0.0
            if done == self.length:
                return ((self.length - calls + 1) / self.length) ** alpha if not wrong else 0.0
            chance = 1 - self.c * (1 - done / self.length) ** 2
            for k in range(1, self.length - done + 1):
                share_K = [math.comb(k, n) * chance**n * (1 - chance) ** (k - n) for n in range(k + 1)]
                for back in range(min(k - 1, wrong, budget) + 1):
                    after = (value(right + n, wrong - back + k - n, calls + 1) for n in range(k + 1))
                    found = max(found, sum(p * v for p, v in zip(share_K, after, strict=True)))
            return found

        return value(0, 0, 0)


class Trap:
    """A denoiser of the padding trap; a prompt is the parent of each text position (the position itself: a root)."""

    length, width = TEXT + PADS, TEXT + 1

    def __init__(self, roots: float = 0.35) -> None:
        self.roots = roots
        self.family = Family("toy", VOCABULARY, MASK, (PADDING, EARLY))

    def prompts(self, ids_B: Tensor, seed: int) -> Tensor:
        """Return the forests of the instances `ids_B`, and a number from which their confidences follow."""
        place_L = torch.arange(TEXT)
        root_BL = uniform(seed, "root", 0, ids_B[:, None], place_L) < self.roots
        left_BL = (uniform(seed, "parent", 0, ids_B[:, None], place_L) * place_L).long()
        parent_BL = torch.where(root_BL | (place_L == 0), place_L, left_BL)
        return torch.cat([parent_BL, ids_B[:, None] + 1000 * seed], dim=1)

    def logits(
        self, input_ids_BT: Tensor, *, padding_mask_BT: Tensor | None = None, positions_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits at `positions_BT`: the likeliest token and its confidence, the rest spread evenly."""
        prompt_BP, canvas_BL = input_ids_BT[:, : self.width], input_ids_BT[:, -self.length :]
        place_L = torch.arange(self.length)
        decided_BL = canvas_BL != MASK
        parent_BL = prompt_BP[:, :TEXT]
        ready_BL = (parent_BL == place_L[:TEXT]) | decided_BL[:, :TEXT].gather(1, parent_BL)
        finished_B1 = decided_BL[:, :TEXT].all(dim=1, keepdim=True)
        count_B1 = decided_BL.sum(dim=1, keepdim=True)
        share_BL = uniform(0, "confidence", 0, prompt_BP[:, -1:], count_B1, place_L)
        text_BL = torch.where(ready_BL, 0.85 + 0.14 * share_BL[:, :TEXT], 0.2 + 0.4 * share_BL[:, :TEXT])
        confidence_BL = torch.cat([text_BL, 0.95 + 0.045 * share_BL[:, TEXT:]], dim=1)
        pad_BL = torch.where(finished_B1, PADDING, EARLY).expand(-1, PADS)
        token_BL = torch.cat([torch.where(ready_BL, RIGHT, WRONG), pad_BL], dim=1)
        others_BLV = ((1 - confidence_BL) / (VOCABULARY - 2))[..., None].expand(-1, -1, VOCABULARY)
        logits_BLV = others_BLV.scatter(2, token_BL[..., None], confidence_BL[..., None]).log().float()
        assert positions_BT is not None
        return logits_BLV[positions_BT[:, -self.length :]]

    def solved(self, trajectory: Trajectory) -> Tensor:
        """Return which rollouts are right."""
        tokens_BL = trajectory.tokens_BL
        return (tokens_BL[:, :TEXT] == RIGHT).all(dim=1) & (tokens_BL[:, TEXT:] == PADDING).all(dim=1)

    def depth(self, prompt_BP: Tensor) -> Tensor:
        """Return the calls of a perfect policy: the longest path of each forest, and one for the padding."""
        parent_BL, depth_BL = prompt_BP[:, :TEXT], torch.ones(len(prompt_BP), TEXT, dtype=torch.long)
        for place in range(TEXT):
            root_B = parent_BL[:, place] == place
            above_B = depth_BL.gather(1, parent_BL[:, place : place + 1]).squeeze(1)
            depth_BL[:, place] = torch.where(root_B, 1, above_B + 1)
        return depth_BL.amax(dim=1) + 1

    def best(self, alpha: float) -> float:
        """Return the mean reward of a perfect policy on the evaluation's instances."""
        calls_B = self.depth(self.prompts(torch.arange(HELDOUT), 1))
        share_B = (self.length - calls_B + 1).double() / self.length
        return share_B.pow(alpha).mean().item()


HELDOUT = 2000


def roll(
    toy: Any, sampler: Sampler, instances_B: Tensor, ids_B: Tensor, *, seed: int, step: int, instance_seed: int
) -> Trajectory:
    """Return a rollout of each instance."""
    prompt_BP = toy.prompts(instances_B, instance_seed)
    canvas_BL = torch.full((len(ids_B), toy.length), MASK)
    return denoise(toy, sampler, prompt_BP, torch.ones_like(prompt_BP) > 0, canvas_BL, ids_B, seed=seed, step=step)


def planned(planner: Planner, **score: Any) -> dict[str, Any]:
    """Return the sampler's section with which a planner acts."""
    takes = {"remasking": "planned"} if planner.spec.remasks else {}
    return {**PLANNED, **takes, "score": {"name": "planner", **score}}


def sampler_of(section: dict[str, Any], temperature: float) -> Sampler:
    """Return a sampler that fills the whole canvas."""
    return build_sampler({"eos": {"rule": "none"}, **section}, temperature=temperature)


def train(toy: Any, planning: Planning, *, batches: int, prompts: int, lr: float, temperature: float) -> None:
    """Train by the recipe's own steps: roll out, credit, advantage, plan, two updates."""
    sampler = planning.acting(sampler_of(planned(planning.planner), temperature))
    optimizer = torch.optim.Adam(planning.learner.parameters(), lr=lr, betas=(0.9, 0.99))
    rows = prompts * planning.group
    ids_B = torch.arange(rows)
    for batch in range(batches):
        instances_B = ids_B // planning.group + batch * prompts
        made = roll(toy, sampler, instances_B, ids_B, seed=planning.seed, step=batch, instance_seed=2)
        rewards = SimpleNamespace(total_B=toy.solved(made).float())
        reward_B = planning.credit(SimpleNamespace(trajectory=made, rewards=rewards), batch)  # type: ignore[arg-type]
        advantage_B = group_mean(reward_B, ids_B // planning.group)
        plan = planning.plan(None, None, made, advantage_B, rng=None, sampler=sampler)
        for _ in range(2):
            optimizer.zero_grad()
            planning.backward(None, plan)
            optimizer.step()


@torch.no_grad()
def measure(
    toy: Any, planner: Planner, alpha: float, *, temperature: float, sharp: float = 1.0, told: float | None = None
) -> dict[str, float]:
    """Return accuracy, calls and reward on held-out instances.

    The policy hears the trade-off `told` and divides its logits by `sharp`.
    """
    heard = alpha if told is None else told
    act = Acting(planner, lambda state: torch.full((len(state.step_A),), heard))
    ids_B = torch.arange(HELDOUT)
    sampler = bound(sampler_of(planned(planner, temperature=sharp), temperature), act)
    return scores(toy, roll(toy, sampler, ids_B, ids_B, seed=99, step=-1, instance_seed=1), alpha)


def scores(toy: Any, made: Trajectory, alpha: float) -> dict[str, float]:
    """Return accuracy, calls and multiplicative reward with standard error."""
    right_B, steps_B = toy.solved(made).double(), made.steps_B.double()
    length_B = torch.full_like(steps_B, toy.length)
    reward_B = multiplicative(right_B, steps_B, length_B, torch.full_like(steps_B, alpha))
    means = {"exact": right_B.mean().item(), "nfe": steps_B.mean().item(), "reward": reward_B.mean().item()}
    return means | {"stderr": reward_B.std().item() / math.sqrt(len(reward_B))}


def planning_of(spec: PlannerSpec, seed: int, *, group: int, speed: Any = multiplicative, **more: Any) -> Planning:
    """Return the objective of a new planner, clipped as published."""
    clip = functools.partial(ppo_clip, low=0.5, high=0.5)
    return Planning(new_planner(spec, seed=seed), clip, speed, group=group, seed=seed, chunk=4096, **more)


def exchangeable(alpha: float, seed: int, *, distribution: str = "count", batches: int = 80) -> dict[str, Any]:
    """Train on the exchangeable problem and compare with its best value."""
    toy = Exchangeable(0.12)
    features, counts = ("candidate", "masked", "time", "left"), tuple(range(1, 9))
    kind: Any = distribution
    spec = PlannerSpec(features=features, distribution=kind, counts=counts, width=32, mlp=64)
    planning = planning_of(spec, seed, group=16, alpha=(alpha, alpha))
    train(toy, planning, batches=batches, prompts=16, lr=3e-3, temperature=1.0)
    found, best = measure(toy, planning.planner, alpha, temperature=1.0, sharp=0.1), toy.best(alpha)
    about = {"alpha": alpha, "seed": seed, "distribution": distribution}
    return {**about, **found, "best": best, "share": found["reward"] / best}


def hacking(speed: Any, seed: int, *, batches: int = 80) -> dict[str, Any]:
    """Train where answers are seldom right: the additive reward decides all at once, the multiplicative does not."""
    toy = Exchangeable(0.9)
    spec = PlannerSpec(features=("candidate", "masked", "time", "left"), width=32, mlp=64)
    planning = planning_of(spec, seed, group=16, speed=speed, alpha=(1.0, 1.0))
    train(toy, planning, batches=batches, prompts=16, lr=3e-3, temperature=1.0)
    return {"speed": speed.__name__, "seed": seed, **measure(toy, planning.planner, 1.0, temperature=1.0)}


def trap(
    seed: int,
    *,
    told: tuple[float, float] = (1.0, 1.0),
    fallback: str = "sampled",
    network: str = "transformer",
    lr: float = 3e-3,
    warmup: int = 30,
    batches: int = 60,
    alphas: tuple[float, ...] = (1.0,),
    sharps: tuple[float, ...] = (1.0, 0.5),
) -> dict[str, Any]:
    """Train on the trap, after imitating a threshold of 0.8 in blocks of 4 for `warmup` batches; tell how it does."""
    toy, kind = Trap(), dict[str, Any](fallback=fallback, network=network)
    features = ("odds", "eos", "masked", "time", "left", "alpha")
    spec = PlannerSpec(features=features, width=32, mlp=64, **kind)
    expert: dict[str, Any] = {"levels": (0.8,), "block": 4, "warmup": warmup} if warmup else {}
    planning = planning_of(spec, seed, group=8, alpha=told, **expert)
    train(toy, planning, batches=batches, prompts=16, lr=lr, temperature=0.0)
    found: dict[str, Any] = {"seed": seed, "warmup": warmup, "told": list(told), **kind}
    for alpha in alphas:
        heard = alpha if told[0] < told[1] else told[0]
        for sharp in sharps:
            row = measure(toy, planning.planner, alpha, temperature=0.0, sharp=sharp, told=heard)
            found[f"alpha {alpha:g} temperature {sharp:g}"] = row | {"share": row["reward"] / toy.best(alpha)}
    return found


def thresholds() -> list[dict[str, Any]]:
    """Return how thresholds do in the trap, with and without blocks."""
    toy, ids_B, rows = Trap(), torch.arange(HELDOUT), []
    for block, level in ((12, 0.7), (12, 0.9), (4, 0.7), (4, 0.8)):
        schedule = {"name": "blocks", "size": block, "per_step": 1}
        sampler = sampler_of({"schedule": schedule, "selection": {"name": "threshold", "level": level}}, 0.0)
        made = roll(toy, sampler, ids_B, ids_B, seed=0, step=0, instance_seed=1)
        rows.append({"block": block, "level": level, **scores(toy, made, 1.0)})
    return rows


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    seeds = range(arguments.seeds)
    table: dict[str, Any] = {"thresholds": thresholds()}

    def note(name: str, row: dict[str, Any]) -> None:
        table.setdefault(name, []).append(row)
        print(name, row, flush=True)

    for seed in seeds:
        for alpha in (0.0, 0.3, 1.0, 3.0):
            note("exchangeable", exchangeable(alpha, seed))
        note("trap", trap(seed))
        settings = (0.1, 0.3, 1.0, 3.0, 10.0)
        note("conditioned", trap(seed, told=(0.1, 10.0), batches=150, alphas=settings, sharps=(0.5,)))
        for fallback in ("sampled", "argmax", "none"):
            for network, lr in (("transformer", 3e-3), ("linear", 3e-2)):
                kind: dict[str, Any] = {"fallback": fallback, "network": network, "lr": lr}
                note("from scratch", trap(seed, warmup=0, batches=90, **kind))
        for speed in (multiplicative, additive):
            note("hacking", hacking(speed, seed))
    print(f"wrote {save('policy_toys', table, arguments.json, seeds={'training': list(seeds), 'evaluation': 99})}")


if __name__ == "__main__":
    main()
