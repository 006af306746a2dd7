"""What an unmasking policy costs: of a rollout step at LLaDA-8B's shapes, by counting, and of an update, by the clock.

python benchmarks/planner_cost.py [--rollouts 128] [--steps 64] [--threads 2] [--repeat 3] [--json FILE]

A step: matrix products of the denoiser's trunk and head and of the planner's network are counted. Besides, features,
draw and the statistics that only a planner asks for count as one operation for every number that a kernel reads or
writes, whichever is more. An update: recorded features of the shape that a run of 128 rollouts stores, one inner step,
all steps with an advantage.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import mean_and_error, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from unmask.policies.planner import FEATURES, PlannerSpec, new_planner
from unmask.recipes.loading import load_recipe
from unmask.recipes.schema import Recipe
from unmask.rl.memory import known_config, on_meta
from unmask.rl.planning import Planning
from unmask.rl.speed import multiplicative
from unmask.rl.surrogates import ppo_clip
from unmask.rollouts.features import NEEDS, observe
from unmask.rollouts.measures import Request, Statistics, measure
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.state import State
from unmask.rollouts.trajectory import SAMPLED, Trajectory

RECIPE = "unmask_policy_llada8b_gsm8k"
SAMPLER = {"schedule": {"name": "whole", "per_step": 1}, "score": "planner", "selection": "planned"}


class Touched(TorchDispatchMode):
    """Counts the numbers that kernels read or write, whichever is more; views count too, so it is rather too much."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, tuple | list) else (found,)
        self.numbers += max((x.numel() for x in (*args, *outputs) if isinstance(x, Tensor)), default=0)
        return found


def products(function: Any, *arguments: Any, **options: Any) -> int:
    """Return the floating-point operations of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*arguments, **options)
    return counter.get_total_flops()


def touched(function: Any) -> int:
    """Return how many numbers the kernels of a call touch."""
    with Touched() as counter, torch.no_grad():
        function()
    return counter.numbers


def step_cost(recipe: Recipe, prompt: int) -> dict[str, float]:
    """Return the operations of one step of one rollout, all of its canvas open: of the denoiser and of the planner."""
    canvas, vendor = recipe.rollout.canvas, known_config(recipe.model.path)
    assert vendor is not None
    denoiser = on_meta(recipe, vendor, attention="sdpa")
    trunk = products(denoiser.hidden, torch.empty(1, prompt + canvas, dtype=torch.long, device="meta"))
    width, vocabulary = denoiser.base.config.hidden_size, denoiser.family.vocab_size
    # On the meta device, where fused attention is taken apart and its products are counted.
    network = products(
        new_planner(PlannerSpec()).network.to("meta"), torch.empty(1, canvas, len(FEATURES), device="meta")
    )
    planner, feature_BLF = new_planner(PlannerSpec()), torch.rand(1, canvas, len(FEATURES))
    candidate_BL = torch.ones(1, canvas, dtype=torch.bool)
    elements = touched(lambda: planner.distribution(feature_BLF, candidate_BL).mode())
    return {
        "trunk": trunk,
        "head": 2 * canvas * width * vocabulary,
        "network": network,
        "network_and_draw_elements": elements,
        "feature_elements": touched(lambda: seen(canvas)),
        "statistics_elements": canvas * (statistics_per_logit(NEEDS) - statistics_per_logit(())) * vocabulary,
    }


def seen(length: int) -> Tensor:
    """Return the features of a blank canvas."""
    state = State.of(torch.full((1, length), -1), -1, eos_token_ids=(0,))
    state.window_AL = state.masked_AL
    zero_1L = torch.zeros(1, length)
    state.statistics = Statistics.blank(1, length)._replace(second=zero_1L, entropy=zero_1L)
    return observe(state, FEATURES, torch.ones(1))


def statistics_per_logit(needs: tuple[str, ...], vocabulary: int = 4096, rows: int = 64) -> float:
    """Return how many numbers the statistics pass touches for each logit."""
    logits_KV, uniform_K = torch.randn(rows, vocabulary), torch.rand(rows, dtype=torch.float64)
    request = Request(0.0, 1.0, (vocabulary - 1,), (), frozenset(needs))
    return touched(lambda: measure(logits_KV, uniform_K, request)) / (rows * vocabulary)


def recorded(rollouts: int, steps: int, length: int) -> Trajectory:
    """Return rollouts whose canvas is opened evenly in `steps` steps, with random features."""
    rng = torch.Generator().manual_seed(0)
    born_L = torch.arange(length) * steps // length
    born_BL = torch.stack([born_L[torch.randperm(length, generator=rng)] for _ in range(rollouts)]).to(torch.int16)
    open_BSL = born_BL[:, None] >= torch.arange(steps)[:, None]
    features_BSLF = torch.rand(rollouts, steps, length, len(FEATURES), generator=rng).half() * open_BSL[..., None]
    features_BSLF[..., FEATURES.index("masked")] = open_BSL.half()
    return Trajectory(
        prompt_BQ=torch.zeros(rollouts, 1, dtype=torch.long),
        prompt_mask_BQ=torch.ones(rollouts, 1, dtype=torch.bool),
        tokens_BL=torch.zeros(rollouts, length, dtype=torch.long),
        source_BL=torch.full((rollouts, length), SAMPLED, dtype=torch.int8),
        born_BL=born_BL,
        rank_BL=torch.zeros_like(born_BL),
        logprob_BL=torch.zeros(rollouts, length),
        steps_B=torch.full((rollouts,), steps),
        rollout_id_B=torch.arange(rollouts),
        temperature=1.0,
        mask_token_id=1,
        eos_token_ids=(2,),
        choice_logprob_BS=torch.full((rollouts, steps), -10.0),
        features_BSLF=features_BSLF,
        candidate_BSL=open_BSL,
    )


def update_seconds(rollouts: int, steps: int, length: int, repeat: int) -> list[float]:
    """Return the seconds of one inner step of a planner on recorded rollouts, `repeat` times."""
    planning = Planning(new_planner(PlannerSpec()), ppo_clip, multiplicative, group=8)
    sampler = planning.acting(build_sampler(SAMPLER, temperature=0.0))
    advantage_B = torch.linspace(-1, 1, rollouts)
    plan = planning.plan(None, None, recorded(rollouts, steps, length), advantage_B, rng=None, sampler=sampler)
    assert len(plan.row_N) == rollouts * steps
    optimizer = torch.optim.AdamW(planning.learner.parameters(), lr=1e-4)
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        optimizer.zero_grad()
        planning.backward(None, plan)
        optimizer.step()
        found.append(time.perf_counter() - started)
    return found


def main() -> None:
    """Count, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt beside the recipe's canvas")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(RECIPE)
    assert isinstance(recipe, Recipe)
    cost = step_cost(recipe, arguments.prompt)
    planner = sum(value for name, value in cost.items() if name not in ("trunk", "head"))
    share = planner / cost["trunk"]
    print({name: f"{value:.3g}" for name, value in cost.items()})
    print(f"planner / trunk: {share:.4%} of the operations, its network {cost['network'] / cost['trunk']:.4%}")
    canvas = recipe.rollout.canvas
    seconds = update_seconds(arguments.rollouts, arguments.steps, canvas, arguments.repeat)
    mean = mean_and_error(seconds)
    shape = f"{arguments.rollouts} rollouts x {arguments.steps} steps, canvas {canvas}, {arguments.threads} threads"
    print(f"update of {shape}: {mean['mean']:.1f} ± {mean['stderr']:.1f} s (n={mean['n']})")
    result = {
        "recipe": RECIPE,
        "prompt": arguments.prompt,
        "canvas": canvas,
        "operations_a_step": cost,
        "planner_share_of_trunk": share,
        "update": {"seconds": seconds, **mean, "rollouts": arguments.rollouts, "steps": arguments.steps},
        "threads": arguments.threads,
    }
    print(f"wrote {save('planner_cost', result, arguments.json, seeds={'first': 0, 'count': 1})}")


if __name__ == "__main__":
    main()
