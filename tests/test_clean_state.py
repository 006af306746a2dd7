"""RLDF's canvases and weights by hand, and how often a step is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_estimators import E, M, trajectory
from test_slices import groups

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rl.clean_state import clean_state
from unmask.rl.estimators import trace
from unmask.rollouts.trajectory import Lifetimes


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_a_step_had_not_decided_is_scored_as_it_turned_out() -> None:
    """A row of three steps and one whose step 1 decided a token behind its EOS alone, which is no action."""
    example = trajectory([[1, 2, 3, 4], [1, E, 3, 4]], [[0, 2, 1, 2], [0, 2, 1, 3]])
    views = clean_state(example, rng=rng(), k=9)
    assert groups(views) == [
        (0, 0, [0, 1, 2, 3]),
        (0, 1, [1, 2, 3]),
        (0, 2, [1, 3]),
        (1, 0, [0, 1]),
        (1, 2, [1]),
    ]
    assert views.canvas().tolist() == [[M] * 4, [1, M, M, M], [1, M, 3, M], [M] * 4, [1, M, 3, M]]
    assert views.target_K.tolist() == [1, 2, 3, 4, 2, 3, 4, 2, 4, 1, E, E]
    assert views.views_B.tolist() == [3, 2] and views.count_B.tolist() == [4, 2] and not views.recorded


def test_an_unsure_step_is_drawn_more_often() -> None:
    """P(t) ~ exp(-mean log p / temperature) for one step, whatever stands beside a rollout."""
    rows = 4000
    example = trajectory([[1, 2, 3]] * rows, [[0, 1, 1]] * rows)
    logprob = torch.tensor([-0.2, -1.0, -2.0])
    example = replace(example, logprob_BL=logprob.expand(rows, -1).contiguous(), rollout_id_B=torch.arange(rows))
    odds = torch.tensor([0.2, 1.5])  # the second step is the mean of its tokens
    for temperature in (1.0, 0.5):
        views = clean_state(example, rng=rng(1), k=1, temperature=temperature)
        expected = (odds / temperature).softmax(0)[1].item()
        share = (views.step_N == 1).double().mean().item()
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / rows) ** 0.5)
    some = torch.arange(7, 300, 3)
    alone = clean_state(example.select(some), rng=rng(1), k=1, temperature=0.5)
    assert torch.equal(alone.step_N, views.step_N[some])
    both = clean_state(example, rng=rng(1), k=2)
    assert both.views_B.tolist() == [2] * rows


def test_the_weight_keeps_what_is_likely_and_what_the_step_decided() -> None:
    example = trajectory([[1, 2, 3, 4]], [[0, 1, 1, 2]])
    views = clean_state(example, rng=rng(), k=3)
    assert groups(views) == [(0, 0, [0, 1, 2, 3]), (0, 1, [1, 2, 3]), (0, 2, [3])]
    chance_K = torch.tensor([0.1, 0.7, 0.5, 0.6, 0.1, 0.2, 0.59, 0.0])
    confident = SLOTS["weight"].build({"name": "confident", "level": 0.6})
    weight_K, mass_B = confident(views, chance_K.log())
    kept = [1 / 3, 1 / 3, 0, 1 / 3, 1 / 2, 1 / 2, 0, 1]
    torch.testing.assert_close(weight_K, torch.tensor(kept) / 3)
    assert mass_B.tolist() == [1.0]
    weight_K, _ = confident(views)
    torch.testing.assert_close(weight_K, torch.tensor([1 / 4] * 4 + [1 / 3] * 3 + [1.0]) / 3)


def test_the_sum_of_a_steps_tokens_by_hand() -> None:
    """1 / S_b for each token, by the chance that its step was drawn."""
    example = trajectory([[1, 2, 3, 4], [1, E, 3, 4]], [[0, 2, 1, 2], [0, 2, 1, 3]])
    per_step_sum = SLOTS["weight"].build("per_step_sum")
    weight_K, mass_B = per_step_sum(trace(example, rng=None))
    torch.testing.assert_close(weight_K, torch.tensor([1 / 3] * 4 + [1 / 2] * 2))
    assert mass_B.tolist() == [1.0, 1.0]
    drawn = trace(example, rng=rng(), steps="uniform_k", k=1)
    weight_K, mass_B = per_step_sum(drawn)
    assert weight_K.tolist() == [1.0] * len(weight_K) and mass_B.tolist() == [1.0, 1.0]


def test_what_has_no_clean_state() -> None:
    example = trajectory([[1, 2]], [[0, 1]])
    with pytest.raises(RecipeError, match="clean states need a sampler that takes nothing back"):
        clean_state(replace(example, retracted=Lifetimes.none()), rng=rng())
    with pytest.raises(RecipeError, match=r"k, temperature: 0 must be at least 1, and 1.0 positive"):
        clean_state(example, rng=rng(), k=0)
    with pytest.raises(RecipeError, match=r"weight.level: 1.5 must lie in \[0, 1\]"):
        SLOTS["weight"].build({"name": "confident", "level": 1.5})(trace(example, rng=None))
