"""Scores of single papers: published vectors, formulas, and files that are refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unmask.recipes.registry import SLOTS, RecipeError
from unmask.rollouts import scores  # noqa: F401 (importing registers the parts)
from unmask.rollouts.measures import Statistics
from unmask.rollouts.state import State

MASK = -1
EOS = (5, 8)


def state_at(step: int, opened: int) -> State:
    state = State.of(torch.full((1, opened), MASK), MASK, step=step, eos_token_ids=EOS)
    return replace(state, open_A=torch.tensor([opened]))


def eos_factor(step: int, opened: int, **knobs: object) -> float:
    """Return what the score of an EOS is multiplied with; any other token's stays."""
    length = max(opened, 3)
    found = Statistics.blank(1, length)
    best = torch.zeros(1, length, dtype=torch.long)
    best[0, :3] = torch.tensor([EOS[0], 4, EOS[1]])
    logp = torch.linspace(-2, -1, length)[None]
    state = replace(state_at(step, opened), canvas_AL=best)
    score = SLOTS["score"].get("eoser")(found._replace(best=best, confidence=logp), best, logp, state=state, **knobs)
    factor = (score - logp)[0].exp()
    torch.testing.assert_close(factor[1], torch.tensor(1.0))
    torch.testing.assert_close(factor[2], factor[0])
    return factor[0].item()


def test_eoser_rises_linearly_over_the_whole_rollout() -> None:
    """trajectory_rl.md 4.2: gamma_t = 0.4 + 0.6 t / (S - 1); the released blockwise index never reached 1."""
    for t in range(9):
        assert eos_factor(t, 9) == pytest.approx(0.4 + 0.6 * t / 8, rel=1e-5)
        assert eos_factor(t, 30, steps=9, low=0.01) == pytest.approx(0.01 + 0.99 * t / 8, rel=1e-5)
    assert eos_factor(20, 9) == pytest.approx(1.0)
    assert eos_factor(0, 1) == pytest.approx(1.0), "one step is the last one"


def test_eoser_with_ascending_steps_has_the_papers_weights() -> None:
    """trajectory_rl.md 4.3: S = 7, low 0.01."""
    published = [0.0177, 0.0332, 0.064, 0.126, 0.250, 0.497, 0.992]
    for opened in (128, 200, 255):
        found = [eos_factor(t, opened, low=0.01, growth="doubling") for t in range(7)]
        assert found == pytest.approx(published, rel=5e-3)
    exact = [0.01 + 0.99 * (2 ** (t + 1) - 1) / 2**7 for t in range(7)]
    assert [eos_factor(t, 20, low=0.01, steps=7, growth="doubling") for t in range(7)] == pytest.approx(exact, rel=1e-5)


def test_sampled_eoser_scales_drawn_ends_and_their_tables_alike() -> None:
    part = SLOTS["score"].get("sampled_eoser")
    odds, token = torch.tensor([[0.3, -1.0, 2.0]]), torch.tensor([[EOS[0], 4, EOS[1]]])
    state = state_at(2, 9)
    found = part(Statistics.blank(1, 3)._replace(drawn=odds, token=token), token, odds, state=state, low=0.2)
    plain = torch.nn.functional.logsigmoid(odds)
    expected = plain + torch.tensor([[1.0, 0.0, 1.0]]) * math.log(0.2 + 0.8 * 2 / 8)
    torch.testing.assert_close(found, expected)
    table_KV = torch.full((2, 10), -1.0)
    tokens_KV = part.tokens(table_KV.clone(), state=state, row_K=torch.zeros(2).long(), low=0.2)
    assert (tokens_KV != table_KV).nonzero().tolist() == [[0, 5], [0, 8], [1, 5], [1, 8]]
    torch.testing.assert_close(tokens_KV[0, 5], -1 + torch.tensor(math.log(0.4)))


def calibrated(chance: Tensor, best: Tensor, **knobs: object) -> Tensor:
    found = Statistics.blank(*chance.shape)._replace(confidence=chance.log(), best=best)
    place = torch.arange(chance.shape[1]).expand_as(best)
    return SLOTS["score"].get("calibrated")(found, place, chance, **knobs)


def test_calibrated_equals_pc_samplers_formula(tmp_path: Path) -> None:
    """exp(-lambda i) min(-p ln f, alpha), divided by alpha: the same order, and at most 0 as a logarithm."""
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"num_token": 1000, "p_baseline_dict": {"0": 500, "3": 7, "2": 80}}))
    rng = torch.Generator().manual_seed(0)
    chance, best = torch.rand(4, 6, generator=rng), torch.randint(0, 9, (4, 6), generator=rng)
    frequency = {0: 0.5, 3: 0.007, 2: 0.08}
    for decay, alpha in ((0.25, 10.0), (0.0, 1.5), (1.0, 3.0)):
        found = calibrated(chance, best, decay=decay, ceiling=alpha, frequencies=str(file))
        for b in range(4):
            for i in range(6):
                information = -chance[b, i].item() * math.log(frequency.get(int(best[b, i]), 1e-3))
                expected = math.exp(-decay * i) * min(information, alpha) / alpha
                assert found[b, i].exp().item() == pytest.approx(expected, rel=1e-5)
        assert (found <= 0).all()
    plain = calibrated(chance, best, decay=0.25)
    torch.testing.assert_close(plain, chance.log() - math.log(10) - 0.25 * torch.arange(6))


def test_calibrated_keeps_its_digits_far_to_the_right() -> None:
    """exp(-0.25 x 2000) is 0 in any float; its logarithm is not."""
    chance = torch.full((1, 2001), 0.5)
    score = calibrated(chance, torch.zeros(1, 2001, dtype=torch.long))
    assert score.diff(dim=1).max() < -0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"is no file of counts \(TypeError"),
        ("{", r"is no file of counts \(JSONDecodeError"),
        ('{"num_token": 5}', r"is no file of counts \(KeyError: 'p_baseline_dict'\)"),
        ('{"num_token": 5, "p_baseline_dict": {"1": 5}}', r"every count of .* must lie between 0 and num_token 5"),
        ('{"num_token": 5, "p_baseline_dict": {}}', r"every count of .* must lie between"),
        (None, r"is no file of counts \(FileNotFoundError"),
    ],
)
def test_bad_frequency_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "counts.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        calibrated(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.long), frequencies=str(file))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"low": 0.0}, r"score.low, score.high: 0.0 and 1.0 must satisfy 0 < low <= high <= 1"),
        ({"low": 0.5, "high": 0.4}, r"score.low, score.high: 0.5 and 0.4"),
        ({"steps": 0}, r"score.steps: 0 must be at least 1"),
    ],
)
def test_eoser_refuses(knobs: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        eos_factor(0, 9, **knobs)
