"""Schedules of single papers: published vectors, and plain loops over one row."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rollouts import sampler  # noqa: F401 (importing registers the parts)
from unmask.rollouts.schedules import Quota
from unmask.rollouts.state import State
from unmask.rollouts.traits import wants

MASK = -1


def plan(schedule: dict | str, canvas_L: list[int], seed: int = 0) -> list[list[int]]:
    """Return the positions of each step when the leftmost of the window are committed, as many as the quota says.

    A step of quota 0 commits nothing: the engine, not the schedule, makes one of it.
    """
    part = SLOTS["schedule"].build(schedule)
    canvas_BL = torch.tensor([canvas_L])
    open_B, steps = (canvas_BL == MASK).sum(1), []
    while (canvas_BL == MASK).any() and len(steps) < 3 * len(canvas_L) + 60:
        state = replace(State.of(canvas_BL, MASK), step_A=torch.tensor([len(steps)]), open_A=open_B, seed=seed)
        more = {"state": state} if wants(part, "state") else {}
        quota = part(canvas_BL == MASK, state.step_A, open_B, **more)
        assert not (quota.window_BL & (canvas_BL != MASK)).any()
        steps.append(quota.window_BL[0].nonzero().squeeze(1)[: int(quota.count_B[0])].tolist())
        canvas_BL[0, steps[-1]] = 0
    return steps


def counts(schedule: dict | str, masked: int) -> list[int]:
    return [len(step) for step in plan(schedule, [MASK] * masked)]


# --- Times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 64, 256, 900])
def test_dreams_schedule_of_a_step_a_token(length: int) -> None:
    """samplers.md 2.2: steps = L commits 0 at first and 2 at last, one forward wasted."""
    for schedule in ("time", {"name": "time", "steps": length}):
        assert counts(schedule, length) == [0, *[1] * (length - 2), 2]


def test_dreams_schedule_of_two_tokens_a_step() -> None:
    """samplers.md 2.2: steps 128, L 256 gives 1, 2, 2, ..., 3."""
    assert counts({"name": "time", "steps": 128}, 256) == [1, *[2] * 126, 3]


@pytest.mark.parametrize(("steps", "eps"), [(5, 1e-3), (16, 1e-3), (40, 1e-3), (16, 0.1)])
@pytest.mark.parametrize("masked", [1, 7, 16, 33])
def test_time_equals_the_released_loop(masked: int, steps: int, eps: float) -> None:
    """int(n (1 - s / t)) on linspace(1, eps, S + 1); the last step takes all."""
    grid = [1 - k * (1 - eps) / steps for k in range(steps + 1)]
    left, expected = masked, []
    for k in range(steps):
        take = left if k == steps - 1 else math.floor(left * (1 - grid[k + 1] / grid[k]) + 1e-9)
        expected.append(take)
        left -= take
        if not left:
            break
    assert counts({"name": "time", "steps": steps, "eps": eps}, masked) == expected


@pytest.mark.parametrize("steps", [4, 16, 33, 50])
@pytest.mark.parametrize("masked", [1, 7, 16, 33])
def test_realigned_time_equals_dimples_loop(masked: int, steps: int) -> None:
    """t is the share of masks, s the first later time at which at least one position opens."""
    eps = 1e-3
    grid = [1 - k * (1 - eps) / steps for k in range(steps + 1)]
    left, expected, k = masked, [], 0
    while left:
        ratio = left / masked
        take = left
        for s in range(max(k + 1, next(i for i, t in enumerate(grid) if t < ratio - 1e-12)), steps):
            take = math.floor(left * (1 - grid[s] / ratio) + 1e-9)
            if take >= 1:
                break
        else:
            take = left
        expected.append(take)
        left, k = left - take, k + 1
    assert counts({"name": "time", "steps": steps, "realign": True}, masked) == expected
    assert min(expected) >= 1


def test_realigned_time_never_goes_back() -> None:
    """Where nothing was committed so far, the next time is still that of the step: floor(30 - 30 t_6) of 10 steps."""
    masked_BL = torch.ones(1, 30, dtype=torch.bool)
    part = SLOTS["schedule"].build({"name": "time", "steps": 10, "realign": True})
    for step, expected in ((0, 2), (5, 17), (8, 26), (9, 30), (12, 30)):
        assert part(masked_BL, torch.tensor([step]), torch.tensor([30])).count_B.tolist() == [expected]


def test_time_follows_a_rows_own_masks() -> None:
    """samplers.md 8.20: the released schedule takes the batch's mean."""
    masked_BL = torch.arange(100) < torch.tensor([[100], [20], [60]])
    quota = SLOTS["schedule"].get("time")(masked_BL, torch.tensor([3, 3, 3]), masked_BL.sum(1), steps=10)
    alone = [counts({"name": "time", "steps": 10}, n)[3] for n in (100, 20, 60)]
    drop = 0.999 / 10
    assert quota.count_B.tolist() == [math.floor(n * drop / (1 - 3 * drop)) for n in (100, 20, 60)]
    assert alone == [10, 2, 6]


def test_origin_opens_masks_independently_at_dreams_rate() -> None:
    """4,000 rows: each of 30 masks opens with 1 - t_{k+1} / t_k, whatever the others do; the last step opens all."""
    rows, steps = 4000, 7
    masked_BL = (torch.arange(32) >= 2).expand(rows, -1)
    state = State.of(torch.where(masked_BL, MASK, 0), MASK)
    part = SLOTS["schedule"].build({"name": "origin", "steps": steps})
    open_B = masked_BL.sum(1)
    for k in (0, 3, 5):
        quota = part(masked_BL, torch.full((rows,), k), open_B, state=replace(state, step_A=torch.full((rows,), k)))
        assert torch.equal(quota.count_B, quota.window_BL.sum(1)) and not quota.window_BL[:, :2].any()
        chance = (0.999 / steps) / (1 - k * 0.999 / steps)
        found_L = quota.window_BL[:, 2:].double().mean(dim=0)
        # Where none would open one does: that adds (1 - chance)^30 at most, 1 % at the first step.
        assert (found_L - chance - (1 - chance) ** 30 / 30).abs().max() < 4 * math.sqrt(chance * (1 - chance) / rows)
        spread = quota.count_B.double().var().item()
        assert spread == pytest.approx(30 * chance * (1 - chance), rel=0.12)
    assert part(masked_BL, torch.full((rows,), 6), open_B, state=state).window_BL.sum() == masked_BL.sum()


def test_origin_opens_at_least_one_and_ends() -> None:
    for seed in range(20):
        steps = plan({"name": "origin", "steps": 40}, [MASK] * 12, seed)
        assert sorted(itertools.chain(*steps)) == list(range(12))
        assert min(map(len, steps)) >= 1 and len(steps) <= 12
    assert plan("origin", [MASK] * 12, 0) != plan("origin", [MASK] * 12, 1)


# --- Ascending step sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (128, [1, 2, 4, 8, 16, 32, 65]),
        (256, [1, 2, 4, 8, 16, 32, 64, 129]),
        (200, [1, 2, 4, 8, 16, 32, 137]),
        (2, [2]),
        (1, [1]),
    ],
)
def test_ascending_steps_of_the_paper(length: int, expected: list[int]) -> None:
    """trajectory_rl.md 4.3: floor(log2 L) steps of 2^i, the last of what is left."""
    assert counts("ascending", length) == expected


@pytest.mark.parametrize(
    ("length", "blocks", "sizes", "steps"),
    [
        (128, 4, [15, 16, 32, 65], [[1, 2, 4, 8], [16], [32], [65]]),
        (128, 7, [1, 2, 4, 8, 16, 32, 65], [[1], [2], [4], [8], [16], [32], [65]]),
        (200, 3, [31, 32, 137], [[1, 2, 4, 8, 16], [32], [137]]),
    ],
)
def test_ascending_blocks_of_the_paper(length: int, blocks: int, sizes: list[int], steps: list[list[int]]) -> None:
    """trajectory_rl.md 4.3: blocks of powers of two from the right, the leftmost takes the steps that remain."""
    found = plan({"name": "ascending", "blocks": blocks}, [MASK] * length)
    assert [len(step) for step in found] == list(itertools.chain(*steps))
    assert list(itertools.chain(*found)) == list(range(length))
    edges = [sum(sizes[: n + 1]) for n in range(blocks)]
    flat = [n for n, block in enumerate(steps) for _ in block]
    for step, block in zip(found, flat, strict=True):
        assert edges[block] - sizes[block] <= step[0] and step[-1] < edges[block]


def test_ascending_counts_a_rows_own_masks() -> None:
    assert [len(step) for step in plan("ascending", [0, MASK, MASK, 0, 0, MASK, MASK, MASK])] == [1, 4]
    with pytest.raises(RecipeError, match=r"schedule.blocks: 8 exceed the 7 steps of a canvas of 128"):
        plan({"name": "ascending", "blocks": 8}, [MASK] * 128)


# --- Dilated and open blocks -----------------------------------------------------------------------------------------


def slow_rounds(size: int, base: int) -> list[list[int]]:
    """The rounds of one block, as samplers.md 2.23 says them."""
    rounds, seen, stride = [], set(), size // base
    while stride >= 1:
        rounds.append([i for i in range(0, size, stride) if i not in seen])
        seen |= set(rounds[-1])
        stride //= base
    rounds = [r for r in [*rounds, [i for i in range(size) if i not in seen]] if r]
    if len(rounds) > 1 and len(rounds[-1]) < len(rounds[-2]):
        rounds[-2:] = [sorted(rounds[-2] + rounds[-1])]
    return rounds


@pytest.mark.parametrize(("size", "base"), [(32, 2), (16, 2), (16, 4), (12, 2), (8, 3), (7, 3), (9, 3), (1, 2), (6, 5)])
def test_dilated_equals_its_rounds(size: int, base: int) -> None:
    found = plan({"name": "dilated", "size": size, "base": base}, [MASK] * (2 * size))
    rounds = slow_rounds(size, base)
    assert found == rounds + [[i + size for i in r] for r in rounds]


def test_dilated_takes_log2_steps_a_block() -> None:
    found = plan({"name": "dilated", "size": 32}, [MASK] * 64)
    assert [len(step) for step in found] == [2, 2, 4, 8, 16] * 2
    assert found[0] == [0, 16] and found[1] == [8, 24]
    # Given tokens drop out of their rounds, and an empty round takes no step.
    canvas = [MASK] * 8
    canvas[0] = canvas[4] = 7
    assert plan({"name": "dilated", "size": 8}, canvas) == [[2, 6], [1, 3, 5, 7]]


def test_dilated_keeps_to_a_familys_borders() -> None:
    """3 tokens of the prompt share the first block: its positions are 3 ... 7 of 8."""
    canvas_BL = torch.full((1, 16), MASK)
    state = replace(State.of(canvas_BL, MASK), offset_A=torch.tensor([3]))
    quota = SLOTS["schedule"].get("dilated")(canvas_BL < 0, torch.tensor([0]), torch.tensor([16]), size=8, state=state)
    assert quota.window_BL[0].nonzero().squeeze(1).tolist() == [1], "place 4 of the block is the first at stride 4"


def test_open_blocks() -> None:
    """The first unfinished block and the next one are open; the last has none behind it."""
    masked_BL = torch.ones(3, 12, dtype=torch.bool)
    masked_BL[1, :4], masked_BL[1, 6] = False, False
    masked_BL[2, :8] = False
    part = SLOTS["schedule"].build({"name": "cross_blocks", "size": 4, "ahead": 1, "per_step": 3})
    quota: Quota = part(masked_BL, torch.zeros(3).long(), masked_BL.sum(1))
    assert [row.nonzero().squeeze(1).tolist() for row in quota.window_BL] == [
        list(range(8)),
        [4, 5, 7, 8, 9, 10, 11],
        [8, 9, 10, 11],
    ]
    assert quota.count_B.tolist() == [3, 3, 3]
    assert counts({"name": "cross_blocks", "size": 4, "ahead": 0, "per_step": 4}, 12) == [4, 4, 4]
    assert counts({"name": "whole", "per_step": 5}, 12) == [5, 5, 2]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "time", "steps": 0}, r"schedule.steps: 0 must be at least 1"),
        ({"name": "time", "eps": 0.0}, r"schedule.eps: 0.0 must lie in \(0, 1\)"),
        ({"name": "origin", "eps": 1.0}, r"schedule.eps: 1.0 must lie in \(0, 1\)"),
        ({"name": "whole", "per_step": 0}, r"schedule.per_step: 0 must be at least 1"),
        ({"name": "ascending", "blocks": 0}, r"schedule.blocks: 0 must be at least 1"),
        ({"name": "dilated", "size": 5}, r"blocks of 5 do not divide the canvas of 12"),
        ({"name": "dilated", "size": 4, "base": 1}, r"schedule.base: 1 must be at least 2"),
        ({"name": "cross_blocks", "size": 4, "ahead": -1}, r"schedule.ahead: -1 must be at least 0"),
        (
            {"name": "cross_blocks", "size": 4, "ahead": 1, "per_step": 5},
            r"per_step: 5 must lie between 1 and the block size 4",
        ),
    ],
)
def test_schedules_refuse(schedule: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(schedule, [MASK] * 12)
