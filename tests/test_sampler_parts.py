"""Schedules, scores and selections one by one, against formulas computed by hand or in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rollouts.categorical import log_odds, log_probs
from unmask.rollouts.choices import tail_logprob
from unmask.rollouts.measures import Request, Statistics, measure, token_odds
from unmask.rollouts.sampler import build_sampler
from unmask.rollouts.schedules import Quota
from unmask.rollouts.selection import rank
from unmask.rollouts.state import State

MASK = -1


def commits(schedule: dict, canvas_L: list[int]) -> list[list[int]]:
    """Return the positions of each step when the leftmost of the window are committed, as many as the quota says."""
    sampler = build_sampler({"schedule": schedule})
    canvas_BL = torch.tensor([canvas_L])
    open_B, steps = (canvas_BL == MASK).sum(1), []
    while (canvas_BL == MASK).any():
        state = replace(State.of(canvas_BL, MASK), step_A=torch.tensor([len(steps)]), open_A=open_B)
        quota = sampler.quota(state)
        window = quota.window_BL[0].nonzero().squeeze(1)
        steps.append(window[: int(quota.count_B[0])].tolist())
        canvas_BL[0, steps[-1]] = 0
    return steps


def counts(schedule: dict, masked: int, length: int | None = None) -> list[int]:
    """Return the commits a step of `masked` masks, with given tokens between them up to `length`."""
    length = length or masked
    canvas = [0] * length
    for i in range(masked):
        canvas[i * length // masked] = MASK
    return [len(step) for step in commits(schedule, canvas)]


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 16, 30])
def test_uniform_shares(steps: int) -> None:
    """n_j = m // S + [j < m mod S]; with fewer masks than steps one a step and then the row is done."""
    for masked in range(1, 25):
        expected = [masked // steps + (j < masked % steps) for j in range(steps)]
        assert counts({"name": "uniform", "steps": steps}, masked, 24) == [n for n in expected if n]


def test_uniform_catches_up_with_a_selection_that_took_more() -> None:
    """8 masks in 4 steps; after 5 commits at the first step, 3 are left for three steps."""
    schedule = SLOTS["schedule"].build({"name": "uniform", "steps": 4})
    masked_BL = torch.tensor([[False] * 5 + [True] * 3])
    assert schedule(masked_BL, torch.tensor([1]), torch.tensor([8])).count_B.tolist() == [1]
    for late in (3, 4, 9):
        assert schedule(masked_BL, torch.tensor([late]), torch.tensor([8])).count_B.tolist() == [3]


@pytest.mark.parametrize(
    ("masked", "steps", "expected"),
    [
        # Stay after each step, floor(8 cos(pi/8)) = 7, floor(8 cos(pi/4)) = 5, floor(8 cos(3pi/8)) = 3, 0.
        (8, 4, [1, 2, 2, 3]),
        # 64 cos(pi/6) = 55.4, 64 cos(pi/3) = 32 exactly.
        (64, 3, [9, 23, 32]),
        (7, 1, [7]),
        # floor(3 cos) = 2, 2, 2, 2, 2, 1, 1, 0: shares of 0 become 1, and the row is done early.
        (3, 8, [1, 1, 1]),
    ],
)
def test_cosine_shares(masked: int, steps: int, expected: list[int]) -> None:
    assert counts({"name": "cosine", "steps": steps}, masked) == expected


@pytest.mark.parametrize("name", ["uniform", "cosine"])
def test_totals_equal_the_masks(name: str) -> None:
    for masked, steps in itertools.product((1, 2, 7, 16, 24), range(1, 31)):
        found = counts({"name": name, "steps": steps}, masked, 24)
        assert sum(found) == masked
        assert len(found) <= steps
        assert min(found) >= 1


def test_cosine_plans_by_the_masks_at_the_start() -> None:
    """4 of 8 positions are given: floor(4 cos(pi/4)) = 2 stay after the first of two steps, not floor(8 cos(pi/4))."""
    assert counts({"name": "cosine", "steps": 2}, 4, 8) == [2, 2]


def test_blocks_by_tokens_a_step() -> None:
    found = commits({"name": "blocks", "size": 4, "per_step": 3}, [MASK] * 8)
    assert found == [[0, 1, 2], [3], [4, 5, 6], [7]]


def test_blocks_by_steps() -> None:
    """3 steps a block of 8: 8 // 3 + [j < 8 mod 3] = 3, 3, 2, in both blocks."""
    found = commits({"name": "blocks", "size": 8, "steps": 6}, [MASK] * 16)
    assert [len(step) for step in found] == [3, 3, 2, 3, 3, 2]
    assert [max(step) < 8 for step in found] == [True] * 3 + [False] * 3


def test_blocks_with_given_tokens() -> None:
    """A step goes to the next mark of the plan (8, 5, 2, 0 left): 6 masks take 1, 3, 2; 4 take 2, 2; 1 takes 1."""
    for masked, expected in ((6, [1, 3, 2]), (5, [3, 2]), (4, [2, 2]), (2, [2]), (1, [1])):
        assert counts({"name": "blocks", "size": 8, "steps": 3}, masked, 8) == expected
    # A block without masks takes no step, and a window never reaches into the next block.
    canvas = [0, 0, 0, 0, MASK, 0, MASK, MASK, MASK, 0, 0, 0]
    assert commits({"name": "blocks", "size": 4, "per_step": 2}, canvas) == [[4, 6], [7], [8]]
    assert commits({"name": "blocks", "size": 4, "per_step": 4}, canvas) == [[4, 6, 7], [8]]


@pytest.mark.parametrize("size", [1, 2, 3, 6, 12])
def test_blocks_totals(size: int) -> None:
    for per_step in range(1, size + 1):
        found = commits({"name": "blocks", "size": size, "per_step": per_step}, [MASK] * 12)
        assert sorted(itertools.chain(*found)) == list(range(12))
        assert len(found) == 12 // size * math.ceil(size / per_step)
    blocks = 12 // size
    for steps in range(blocks, 13, blocks):
        found = commits({"name": "blocks", "size": size, "steps": steps}, [MASK] * 12)
        assert sorted(itertools.chain(*found)) == list(range(12))
        assert len(found) == steps


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "blocks", "size": 5, "per_step": 1}, r"blocks of 5 do not divide the canvas of 12; use 4"),
        ({"name": "blocks", "size": 24, "per_step": 1}, r"blocks of 24 do not divide the canvas of 12; use 12"),
        ({"name": "blocks", "size": 4}, r"exactly one of per_step .* and steps"),
        ({"name": "blocks", "size": 4, "per_step": 1, "steps": 12}, r"exactly one of per_step .* and steps"),
        ({"name": "blocks", "size": 4, "per_step": 5}, r"per_step: 5 must lie between 1 and the block size 4"),
        ({"name": "blocks", "size": 4, "per_step": 0}, r"per_step: 0 must lie between 1"),
        ({"name": "blocks", "size": 4, "steps": 7}, r"steps: 7 must be a multiple of the 3 blocks"),
        ({"name": "blocks", "size": 4, "steps": 15}, r"at most the canvas 12"),
        ({"name": "blocks", "size": 0, "per_step": 1}, r"size: 0 must be at least 1"),
        ({"name": "uniform", "steps": 0}, r"schedule.steps: 0 must be at least 1"),
        ({"name": "cosine", "steps": -3}, r"schedule.steps: -3 must be at least 1"),
        ({"name": "uniform"}, r"needs the knob 'steps'"),
    ],
)
def test_schedules_refuse(schedule: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        commits(schedule, [MASK] * 12)


@pytest.mark.parametrize(
    ("section", "temperature", "message"),
    [
        ({}, -0.1, r"rollout.temperature: -0.1 must be at least 0"),
        ({"score_temperature": 0.0}, 1.0, r"score_temperature: 0.0 must be above 0"),
        ({"eos": {"rule": "halt"}}, 1.0, r"'halt' is not one of stop, none"),
        ({"score": "confidance"}, 1.0, r"sampler.score: .*Did you mean 'confidence'"),
        ({"selection": {"name": "top", "level": 0.5}}, 1.0, r"'top' has no knob 'level'"),
    ],
)
def test_samplers_refuse(section: dict, temperature: float, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_sampler({"schedule": {"name": "uniform", "steps": 4}, **section}, temperature=temperature)


# --- Scores ----------------------------------------------------------------------------------------------------------


def scored(name: str, logits_KV: Tensor, noise_K: Tensor | None = None, banned: tuple[int, ...] = ()) -> Tensor:
    position_K = torch.arange(len(logits_KV)) * 3
    noise_K = torch.full((len(logits_KV),), 0.5, dtype=torch.float64) if noise_K is None else noise_K
    request = Request(1.0, 1.0, banned, needs=frozenset(("second", "entropy")))
    return SLOTS["score"].get(name)(measure(logits_KV.clone(), noise_K, request), position_K, noise_K)


@pytest.mark.parametrize("scale", [0.3, 2.0, 10.0])
def test_scores_equal_their_definitions_in_float64(scale: float) -> None:
    logits_KV = scale * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    logits_KV[:, 4] = 99.0  # banned: must count nowhere
    p_KV = logits_KV.double()[:, [v for v in range(30) if v != 4]].softmax(dim=1)
    ordered_KV = p_KV.sort(dim=1, descending=True).values
    rest_K = ordered_KV[:, 1:].sum(dim=1)
    expected = {
        "confidence": torch.where(rest_K < 0.5, torch.log1p(-rest_K), ordered_KV[:, 0].log()),
        "entropy": (p_KV * p_KV.log()).sum(dim=1),
        "margin": torch.where(
            rest_K < 0.5, torch.log1p(-rest_K - ordered_KV[:, 1]), (ordered_KV[:, 0] - ordered_KV[:, 1]).log()
        ),
    }
    for name, value_K in expected.items():
        found_K = scored(name, logits_KV, banned=(4,)).double()
        torch.testing.assert_close(found_K, value_K, rtol=3e-4 if name == "margin" else 1e-5, atol=1e-6, msg=name)
        assert (found_K <= 0).all(), f"{name} is at most 0, as threshold needs"


def test_other_scores() -> None:
    noise_K = torch.tensor([0.25, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    logits_KV = torch.zeros(3, 4)
    torch.testing.assert_close(scored("random", logits_KV, noise_K), noise_K.log().float())
    assert scored("left_to_right", logits_KV).tolist() == [0.0, -3.0, -6.0]


@pytest.mark.parametrize(("name", "others"), [("confidence", 11), ("margin", 12)])
def test_scores_do_not_tie_among_confident_positions(name: str, others: int) -> None:
    """Leads of 14 ... 60 nats over 11 tokens: fp32 probabilities are 1 from 17 on, the scores are still precise.

    log p_1 and log (p_1 - p_2) are -11 and -12 exp(-lead) there.
    """
    lead_K = torch.arange(14.0, 60.0)
    logits_KV = torch.zeros(len(lead_K), 12)
    logits_KV[:, 7] = lead_K
    expected_K = -others * torch.exp(-lead_K.double())
    torch.testing.assert_close(scored(name, logits_KV).double(), expected_K, rtol=1e-4, atol=0)


def test_margin_of_a_tie_is_finite_and_lowest() -> None:
    logits_KV = torch.tensor([[2.0, 2.0, 0.0], [2.0, 1.999, 0.0], [2.0, -torch.inf, -torch.inf]])
    score_K = scored("margin", logits_KV)
    assert score_K.isfinite().all()
    assert score_K.argsort().tolist() == [0, 1, 2]
    assert score_K[2] == 0


# --- Selections ------------------------------------------------------------------------------------------------------


def chosen(selection: dict | str, score_L: list[float], count: int, window: list[int] | None = None) -> list[int]:
    """Return the chosen positions of one row."""
    inside_L = torch.ones(len(score_L), dtype=torch.bool)
    if window is not None:
        inside_L = torch.zeros_like(inside_L)
        inside_L[window] = True
    score_BL = torch.where(inside_L, torch.tensor(score_L), -torch.inf)[None]
    found_BL = SLOTS["selection"].build(selection)(score_BL, Quota(inside_L[None], torch.tensor([count])))
    return found_BL[0].nonzero().squeeze(1).tolist()


def test_rank_breaks_ties_by_index() -> None:
    score_BL = torch.tensor([[1.0, 3.0, 1.0, 3.0], [-torch.inf, 0.0, -torch.inf, -1.0]])
    assert rank(score_BL).tolist() == [[2, 0, 3, 1], [2, 0, 3, 1]]


def test_top() -> None:
    name = "top"
    score = [-3.0, -1.0, -2.0, -0.5]
    assert chosen(name, score, 1) == [3]
    assert chosen(name, score, 2) == [1, 3]
    assert chosen(name, score, 9) == [0, 1, 2, 3]
    assert chosen(name, score, 1, window=[0, 2]) == [2]
    assert chosen(name, score, 3, window=[0, 2]) == [0, 2]
    assert chosen(name, [-1.0] * 4, 2) == [0, 1], "ties go to the smaller index"


def test_threshold() -> None:
    rule = {"name": "threshold", "level": 0.5}
    level = math.log(0.5)
    score = [level, level - 1e-3, level + 0.1, -5.0]
    assert chosen(rule, score, 1) == [0, 2], "a score at the level passes"
    assert chosen(rule, score, 3) == [0, 1, 2], "never fewer than the quota"
    assert chosen(rule, [-5.0, -4.0, -4.0, -6.0], 1) == [1], "the quota's fallback breaks ties by index"
    assert chosen(rule, score, 1, window=[1, 3]) == [1]
    assert chosen({"name": "threshold", "level": 0.9}, [math.log(0.89), math.log(0.91)], 1) == [1]


@pytest.mark.parametrize("level", [0.0, -0.5, 1.5])
def test_threshold_refuses_levels_that_are_no_probability(level: float) -> None:
    with pytest.raises(RecipeError, match=rf"selection.level: {level} must lie in \(0, 1\]"):
        chosen({"name": "threshold", "level": level}, [-1.0, -2.0], 1)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"name": "confident", "level": 0.0}, r"selection.level: 0.0 must lie in \(0, 1\]"),
        ({"name": "factor", "f": 0.0}, r"selection.f: 0.0 must be above 0"),
        ({"name": "frechet", "f": -1}, r"selection.f: -1.0 must be above 0"),
        ({"name": "entropy_budget", "nats": -0.1}, r"selection.nats: -0.1 must be at least 0"),
        ({"name": "plackett_luce", "temperature": 0}, r"selection.temperature: 0.0 must be above 0"),
        ({"name": "plackett_luce", "of": "odds"}, r"'odds' is not allowed"),
        ({"name": "local_leap", "relaxed": 0.95}, r"selection.relaxed: 0.95 must lie in \(0, level\], here 0.9"),
        ({"name": "local_leap", "radius": 0}, r"selection.radius: 0 must be at least 1"),
        ({"name": "hierarchical", "low": 0.0}, r"selection.low: 0.0 must lie in \(0, level\]"),
        ({"name": "stable", "steps": 0}, r"selection.steps: 0 must be at least 1"),
        ({"name": "slow_fast", "reach": 1.1}, r"selection.reach: 1.1 must lie in \(0, 1\]"),
        ({"name": "slow_fast", "explore": 0}, r"selection.explore: 0 must be at least 1"),
        ({"name": "slow_fast", "spread": 0}, r"selection.spread: 0.0 must be above 0"),
        ({"name": "explore", "probes": 0}, r"selection.probes: 0 must be at least 1"),
    ],
)
def test_selections_refuse(selection: dict, message: str) -> None:
    window_BL = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(RecipeError, match=message):
        sampler = build_sampler({"schedule": {"name": "whole"}, "selection": selection})
        state = State.of(torch.full((1, 3), MASK), MASK)
        state.statistics = Statistics.blank(1, 3)
        sampler.choose(state, torch.zeros(1, 3), Quota(window_BL, torch.ones(1).long()))


@pytest.mark.parametrize(("temperature", "score_temperature"), [(1.0, 1.0), (0.7, 1.3), (1.5, 0.5)])
def test_tail_is_the_mass_of_the_tokens_below_the_bar(temperature: float, score_temperature: float) -> None:
    """log q({v: log p(v) < bar}) summed token by token; a token exactly at the bar is below it only where ties lose."""
    banned = (2,)
    logits_KV = 2 * torch.randn(40, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    odds_KV = token_odds(logits_KV, temperature=score_temperature, banned=banned)
    bar_K = torch.nn.functional.logsigmoid(odds_KV)[torch.arange(40), torch.arange(40) % 8]
    bar_K[bar_K.isinf()] = -0.5
    tie_K = torch.arange(40) % 3 == 0
    found_K = tail_logprob(
        logits_KV, bar_K, tie_K, temperature=temperature, score_temperature=score_temperature, banned=banned
    )
    for k in range(40):
        allowed = [v for v in range(8) if v not in banned]
        q = dict(zip(allowed, (logits_KV[k, allowed] / temperature).softmax(0).tolist(), strict=True))
        p = dict(zip(allowed, (logits_KV[k, allowed] / score_temperature).softmax(0).tolist(), strict=True))
        score = {v: math.log(p[v]) for v in allowed}
        equal = {v for v in allowed if abs(score[v] - bar_K[k].item()) < 1e-9}
        mass = sum(q[v] for v in allowed if (score[v] < bar_K[k] and v not in equal) or (tie_K[k] and v in equal))
        assert math.exp(found_K[k].item()) == pytest.approx(mass, abs=1e-12)


def test_the_gradient_of_the_tail_is_that_of_its_mass() -> None:
    """The set below the bar is held fixed: d log sum_S q / dlogit = (q [S] / sum_S q - q) / T."""
    logits_KV = torch.tensor([[1.0, 0.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    bar_K = torch.tensor([math.log(0.5)], dtype=torch.float64)
    tail_logprob(logits_KV, bar_K, torch.tensor([False]), temperature=0.8, score_temperature=1.0).sum().backward()
    odds_V = log_odds(log_probs(logits_KV.detach()))[0]
    q_V = (logits_KV.detach()[0] / 0.8).softmax(0)
    below_V = q_V * (odds_V < 0)
    torch.testing.assert_close(logits_KV.grad[0], (below_V / below_V.sum() - q_V) / 0.8)
