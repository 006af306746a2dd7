"""TraceRL: merged steps, sliced views of block-causal models, and one update of each by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import ModuleType
from typing import Any

import cachetoys
import numpy
import pytest
import torch
from test_estimators import E, M, trajectory
from torch import Tensor

from unmask.recipes.loading import load_methods
from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl import advantages  # noqa: F401 (importing registers the parts)
from unmask.rl.credit import Credit
from unmask.rl.estimators import trace
from unmask.rl.objective import build_objective
from unmask.rl.replay import replay_all
from unmask.rl.slices import sliced
from unmask.rl.views import Views
from unmask.rollouts.engine import denoise
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.trajectory import Lifetimes, Trajectory


def groups(views: Views) -> list[tuple[int, int, list[int]]]:
    """Return (rollout, step, positions) of every view."""
    found = [(r, s, []) for r, s in zip(views.row_N.tolist(), views.step_N.tolist(), strict=True)]
    for n, i in zip(views.view_K.tolist(), views.position_K.tolist(), strict=True):
        found[n][2].append(i)
    return found


def test_neighbouring_steps_merged() -> None:
    """The example of trajectory_rl.md section 6.3, [1,3,2,4,6,5] by twos to [2,4,2,4,6,6], counted from 0."""
    example = trajectory([[1, 2, 3, 4, 5, 6]], [[0, 2, 1, 3, 5, 4]])
    views = trace(example, rng=None, merge=2)
    assert groups(views) == [(0, 0, [0, 2]), (0, 2, [1, 3]), (0, 4, [4, 5])]
    assert views.canvas().tolist() == [[M] * 6, [1, M, 3, M, M, M], [1, 2, 3, 4, M, M]]
    assert views.target_K.tolist() == [1, 3, 2, 4, 5, 6] and views.views_B.tolist() == [3]
    assert not views.recorded and views.sampler is None
    assert groups(trace(example, rng=None, merge=9)) == [(0, 0, [0, 1, 2, 3, 4, 5])]


def test_steps_are_merged_inside_blocks() -> None:
    """Blocks of 3: their own distinct steps by twos, also where a step decided tokens in both."""
    example = trajectory([[1, 2, 3, 4, 5, 6]], [[0, 2, 1, 2, 3, 4]])
    views = trace(example, rng=None, merge=2, block=3)
    assert groups(views) == [(0, 0, [0, 2]), (0, 2, [1]), (0, 2, [3, 4]), (0, 4, [5])]
    shifted = replace(example, offset_B=torch.tensor([1]))
    assert groups(trace(shifted, rng=None, merge=2, block=3)) == [
        (0, 0, [0, 1]),
        (0, 1, [2, 3]),
        (0, 3, [4]),
        (0, 4, [5]),
    ]


def test_steps_behind_an_eos_count_and_are_not_scored() -> None:
    """Ragged: step 0 of the first row decided a token behind its EOS alone; the rows have 4 and 2 steps."""
    example = trajectory([[1, E, 3, 4], [1, 2, 3, 4]], [[1, 2, 0, 3], [0, 0, 1, 1]])
    views = trace(example, rng=None, merge=2)
    assert groups(views) == [(0, 0, [0]), (0, 2, [1]), (1, 0, [0, 1, 2, 3])]
    assert views.views_B.tolist() == [2, 1] and views.count_B.tolist() == [2, 4]
    whole = trace(example, rng=None, merge=2, tokens="all")
    assert groups(whole) == [(0, 0, [0, 2]), (0, 2, [1, 3]), (1, 0, [0, 1, 2, 3])]


def test_without_merging_nothing_changes() -> None:
    example = trajectory([[1, E, 3, 4], [1, 2, 3, 4]], [[1, 2, 0, 3], [0, 0, 1, 1]])
    one, same = trace(example, rng=None), trace(example, rng=None, merge=1, block=2)
    assert groups(one) == groups(same) and one.recorded


def test_merged_steps_of_revised_rollouts_are_refused() -> None:
    example = replace(trajectory([[1, 2]], [[0, 1]]), retracted=Lifetimes.none())
    with pytest.raises(RecipeError, match="merged steps need a sampler that takes nothing back"):
        trace(example, rng=None, merge=2)
    with pytest.raises(RecipeError, match="sliced views need a sampler that takes nothing back"):
        sliced(example, rng=None, size=2)
    with pytest.raises(RecipeError, match="merge, block: 0 and None must be at least 1"):
        trace(example, rng=None, merge=0)


BLOCKED = replace(
    trajectory(
        [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, E, 5, 6, M]],
        [[0, 1, 1, 4, 2, 3, 5], [0, 0, 2, 3, 1, 4, -1]],
    ),
    offset_B=torch.tensor([1, 1]),
)


def test_slices_by_hand() -> None:
    """Blocks [0, 1], [2, 3, 4], [5, 6]; what lies behind the EOS of the second row is seen and not scored."""
    rows = replace(BLOCKED, born_BL=torch.tensor([[0, 1, 2, 4, 3, 5, 6], [0, 0, 2, 3, 1, 4, -1]], dtype=torch.int16))
    views = sliced(replace(rows, steps_B=torch.tensor([7, 5])), rng=None, size=3)
    assert views.clean and views.recorded
    # View r: the r-th step of each block; blocks with fewer steps show their tokens.
    assert views.row_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert [positions for _, _, positions in groups(views)] == [[0, 2, 5], [1, 4, 6], [3], [0, 1], [2], [3]]
    assert views.canvas().tolist() == [
        [M, M, M, M, M, M, M],
        [1, M, 3, M, M, 6, M],
        [1, 2, 3, M, 5, 6, 7],
        [M, M, M, M, M, M, M],
        [1, 2, M, M, 5, 6, M],
        [1, 2, 3, M, 5, 6, M],
    ]
    assert views.count_B.tolist() == [7, 4] and views.views_B.tolist() == [3, 3]


def family(name: str, **section: Any) -> tuple[Any, Trajectory]:
    """Return a block-causal tiny model and rollouts of it whose rows end at different steps."""
    denoiser = cachetoys.load(name, ending=True)
    return denoiser, cachetoys.rollouts(denoiser, None, section=section)


def by_token(views: Views, value_K: Tensor) -> dict[tuple[int, int], float]:
    """Return a value of each scored token by rollout and position."""
    return dict(zip(zip(views.row_K.tolist(), views.position_K.tolist(), strict=True), value_K.tolist(), strict=True))


@pytest.mark.parametrize("name", ["sdar", "llada2"])
@pytest.mark.parametrize("tokens", ["until_eos", "all"])
def test_sliced_log_probs_are_those_of_each_step(name: str, tokens: str) -> None:
    """On the rollout's own, and on those of `trace`, with fewer forwards."""
    denoiser, rollouts = family(name)
    size = denoiser.family.block_length
    views, whole = sliced(rollouts, rng=None, size=size, tokens=tokens), trace(rollouts, rng=None, tokens=tokens)
    assert len(set(rollouts.steps_B.tolist())) > 1 and len(views) <= 0.6 * len(whole)
    with torch.no_grad():
        found_K, expected_K = (replay_all(denoiser, v, 8).logprob_A for v in (views, whole))
    assert views.count_B.tolist() == whole.count_B.tolist()
    by_place = [by_token(views, found_K), by_token(whole, expected_K)]
    assert by_place[0].keys() == by_place[1].keys()
    assert max(abs(by_place[0][key] - by_place[1][key]) for key in by_place[0]) <= 1e-5
    torch.testing.assert_close(found_K, views.behaviour_K, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sdar"])
def test_merged_slices_are_merged_steps_of_blocks(name: str) -> None:
    denoiser, rollouts = family(name)
    size = denoiser.family.block_length
    views, whole = sliced(rollouts, rng=None, size=size, merge=2), trace(rollouts, rng=None, merge=2, block=size)
    assert not views.recorded
    with torch.no_grad():
        found, expected = (by_token(v, replay_all(denoiser, v, 8).logprob_A) for v in (views, whole))
    assert found.keys() == expected.keys()
    assert max(abs(found[key] - expected[key]) for key in found) <= 1e-5
    assert (torch.tensor(list(found.values())) - views.behaviour_K).abs().max() > 1e-3


def test_what_is_not_filled_block_by_block_is_refused() -> None:
    with pytest.raises(RecipeError, match="fill the model's blocks one after the other"):
        sliced(BLOCKED, rng=None, size=3)
    with pytest.raises(RecipeError, match="needs a block-causal family"):
        sliced(replace(BLOCKED, offset_B=None), rng=None, size=3)


def test_weights_of_steps_and_canvases_by_hand() -> None:
    views = trace(trajectory([[1, 2, 3, 4], [1, 2, 3, 4]], [[0, 0, 0, 1], [0, 0, 0, 0]]), rng=None)
    weight_K, mass_B = SLOTS["weight"].build("per_step")(views)
    torch.testing.assert_close(weight_K, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1, *[1 / 4] * 4]))
    assert mass_B.tolist() == [2.0, 1.0]
    weight_K, mass_B = SLOTS["weight"].build("per_canvas")(views)
    assert weight_K.tolist() == [0.25] * 8 and mass_B.tolist() == [2.0, 1.0]


def z_scores(reward: list[float], group: list[int]) -> list[float]:
    """Return (r - mean) / population std of the group."""
    found = []
    for b in range(len(reward)):
        members = numpy.array([r for r, g in zip(reward, group, strict=True) if g == group[b]])
        found.append((reward[b] - members.mean()) / members.std() if members.std() else 0.0)
    return found


REWARD, GROUP = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 1, 1, 1, 1]


def planned(method: str, policy: Any, old: Any, rollouts: Trajectory, **estimator: Any) -> tuple[Any, Any, Tensor]:
    """Return (objective, plan, log-probs that moved away from the old ones) of a method's row."""
    row = load_methods()[method]["objective"]
    chosen = build_objective({**row, "estimator": {**row["estimator"], **estimator}})
    advantage = SLOTS["advantage"].build(row["advantage"])
    credit = Credit(advantage(torch.tensor(REWARD), torch.tensor(GROUP)))
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 2}})
    plan = chosen.plan(old, old, rollouts, credit, rng=None, sampler=sampler)
    assert torch.equal(plan.reference_K, plan.old_A)  # the reference is the old policy
    noise_A = torch.randn(len(plan.old_A), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return chosen, plan, plan.old_A.double() + 0.3 * noise_A


def hand_update(new: dict, old: dict, views: dict[Any, list], advantage: list[float], share: Any, pull: Any) -> tuple:
    """Return loss and slopes: a mean over views of share x clipped surrogate + 0.01 x pull x k3, by TraceRL's eq. 3."""
    loss, slope, clipped = 0.0, {}, 0
    for (b, _), keys in views.items():
        for key in keys:
            ratio, gap, a = math.exp(new[key] - old[key]), new[key] - old[key], advantage[b]
            bounded = min(max(ratio, 0.8), 1.2)
            free = ratio * a <= bounded * a
            clipped += not free
            loss += (-share(keys) * min(ratio * a, bounded * a) + 0.01 * pull(keys) * (math.exp(-gap) - 1 + gap)) / len(
                views
            )
            slope[key] = (-share(keys) * a * ratio * free + 0.01 * pull(keys) * (1 - math.exp(-gap))) / len(views)
    assert clipped
    return loss, slope


def compare(chosen: Any, plan: Any, now_A: Tensor, loss: float, slope: dict, place: list) -> None:
    assert set(place) == set(slope) and len(place) == len(slope)
    assert chosen.loss(plan, now_A).value.item() == pytest.approx(loss, rel=1e-5)
    expected_A = torch.tensor([slope[key] for key in place], dtype=torch.float64)
    torch.testing.assert_close(chosen.loss.coefficients(plan, now_A).double(), expected_A, rtol=1e-5, atol=1e-8)


def test_one_update_is_that_of_the_published_formula(toys: ModuleType) -> None:
    """TraceRL for full attention (trajectory_rl.md section 6.4) in NumPy loops, two steps merged."""
    toy = toys.Toy(4, length=4)
    schedule = {"name": "blocks", "size": 2, "per_step": 1}
    sampler = build_sampler({"schedule": schedule, "eos": {"rule": "stop"}}, temperature=0.9)
    prompt_BQ = torch.tensor([[1, 3]] * 8)
    canvas_BL = torch.full((8, 4), toys.MASK)
    rollouts = denoise(toy, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.arange(8), seed=0)
    assert len(set(rollouts.steps_B.tolist())) > 1
    chosen, plan, now_A = planned("tracerl", toy, toy, rollouts, merge=2)
    views, old, lengths = defaultdict(list), {}, rollouts.length_B.tolist()
    for b in range(8):
        born, ids = rollouts.born_BL[b].tolist(), rollouts.tokens_BL[b].tolist()
        steps = sorted({t for t in born if t >= 0})
        for first in range(0, len(steps), 2):
            merged = steps[first : first + 2]
            canvas = [v if 0 <= t < merged[0] else toys.MASK for v, t in zip(ids, born, strict=True)]
            logits = toy.logits(torch.cat([prompt_BQ[b], torch.tensor(canvas)])[None])[0, 2:, : toys.V] / 0.9
            logits = logits.detach().numpy()
            log = logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))
            for i in range(lengths[b]):
                if born[i] in merged:
                    views[b, merged[0]].append((b, i))
                    old[b, i] = log[i, ids[i]]
    place = list(zip(plan.views.row_K.tolist(), plan.views.position_K.tolist(), strict=True))
    new = dict(zip(place, now_A.tolist(), strict=True))
    advantage = z_scores(REWARD, GROUP)
    loss, slope = hand_update(new, old, views, advantage, lambda keys: 1 / len(keys), lambda keys: 1)
    compare(chosen, plan, now_A, loss, slope, place)


def test_one_sliced_update_is_that_of_the_published_formula() -> None:
    """TraceRL for block-causal models (section 6.5): sums over a view's tokens by the canvas's length."""
    denoiser, _ = family("sdar")
    size = denoiser.family.block_length
    rollouts = cachetoys.rollouts(denoiser, None, lengths=(9, 6, 11, 7, 9, 6, 11, 7), canvas=12)
    chosen, plan, now_A = planned("tracerl_blocks", denoiser, denoiser, rollouts, size=size)
    views, lengths = defaultdict(list), rollouts.length_B.tolist()
    for b in range(8):
        offset, born = int(rollouts.offset_B[b]), rollouts.born_BL[b].tolist()
        steps = defaultdict(set)
        for i, t in enumerate(born):
            if t >= 0:
                steps[(i + offset) // size].add(t)
        for i in range(lengths[b]):
            if born[i] >= 0:
                views[b, sorted(steps[(i + offset) // size]).index(born[i])].append((b, i))
    place = list(zip(plan.views.row_K.tolist(), plan.views.position_K.tolist(), strict=True))
    old = dict(zip(place, plan.old_A.tolist(), strict=True))
    new = dict(zip(place, now_A.tolist(), strict=True))
    advantage = z_scores(REWARD, GROUP)
    loss, slope = hand_update(new, old, views, advantage, lambda keys: 1 / 12, lambda keys: 1 / 12)
    compare(chosen, plan, now_A, loss, slope, place)


@pytest.mark.parametrize("merge", [1, 2])
def test_merged_steps_need_recomputed_log_probs(toys: ModuleType, merge: int) -> None:
    toy = toys.Toy(1)
    sampler = build_sampler({"schedule": {"name": "uniform", "steps": 3}})
    prompt_BQ = torch.tensor([[1, 3]] * 8)
    canvas_BL = torch.full((8, toys.L), toys.MASK)
    rollouts = denoise(toy, sampler, prompt_BQ, prompt_BQ > 0, canvas_BL, torch.arange(8), seed=0)
    parts = {"unit": "token", "surrogate": "importance", "weight": "per_step"}
    chosen = build_objective({"estimator": {"name": "trace", "merge": merge}, **parts})
    if merge == 1:
        chosen.plan(toy, None, rollouts, torch.ones(8), rng=None, sampler=sampler)
        return
    with pytest.raises(RecipeError, match=r"no log-probs of the rollout's; set recompute"):
        chosen.plan(toy, None, rollouts, torch.ones(8), rng=None, sampler=sampler)
